"""LoopCoder-V2: what its four settings change, and that without them nothing does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopcoder_oracle import SMALL, W, logits, make, reference, tokens

from codeflow.train.attention import Documents
from codeflow.train.model import LoopCoder

SCALES = {"plt_emb_scale": 0.707, "plt_hidden_scale": 0.053}
NORM = {"plt_normalize_per_loop": True}
GATE = {"plt_gate_use_hidden_states": True}
VARIANTS = pytest.mark.parametrize(
    "variant", [SCALES, NORM, GATE, SCALES | NORM | GATE], ids=["scales", "norm", "gate", "all"]
)


@VARIANTS
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("n", [1, W + 1, 13])
def test_is_the_specification(variant: dict[str, float], loops: int, n: int) -> None:
    model, ids = make(replace(SMALL, loop_num=loops, **variant)), tokens(n)
    torch.testing.assert_close(logits(model, ids), reference(model, ids), atol=1e-4, rtol=1e-4)


@VARIANTS
def test_every_setting_changes_the_model(variant: dict[str, float]) -> None:
    ids = tokens(13)
    plain, changed = make(), make(replace(SMALL, **variant))
    assert (logits(plain, ids) - logits(changed, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("variant", [SCALES, NORM, SCALES | NORM])
def test_without_a_second_loop_it_is_a_llama(variant: dict[str, float]) -> None:
    ids, one = tokens(13), replace(SMALL, loop_num=1)
    assert torch.equal(logits(make(one), ids), logits(make(replace(one, **variant)), ids))


@VARIANTS
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_packed_documents_are_documents_alone(
    variant: dict[str, float], lengths: list[int]
) -> None:
    model, ids = make(replace(SMALL, loop_num=3, **variant)), tokens(sum(lengths))
    alone = torch.cat([logits(model, doc) for doc in ids.split(lengths)])
    torch.testing.assert_close(logits(model, ids, lengths), alone, atol=1e-4, rtol=1e-4)


@VARIANTS
def test_gradients_are_those_of_the_specification(variant: dict[str, float]) -> None:
    model, ids = make(replace(SMALL, **variant)), tokens(11)
    found = []
    for forward in (
        lambda: model.logits(model(ids, Documents.of([11])).hidden),
        lambda: reference(model, ids),
    ):
        model.zero_grad()
        torch.autograd.backward(forward().square().sum())
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-2, rtol=1e-3)


def test_new_gates_are_half_open() -> None:
    model = LoopCoder(replace(SMALL, **GATE))
    gates = model(tokens(8), Documents.of([8])).gate_means
    assert torch.equal(gates, torch.full_like(gates, 0.5))
    for layer in model.model.layers:
        assert layer.gate_projection.weight.shape == (4, 24)
        assert torch.equal(layer.gate_projection.gate_norm.weight, torch.ones(24))
