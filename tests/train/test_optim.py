from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.optim import decays, learning_rate, make_optimizer, set_learning_rate
from codeflow.train.recipe import TrainConfig


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 300),
    st.integers(0, 50),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall(kind: str, steps: int, warmup: int, low: float) -> None:
    c = TrainConfig(steps=steps, warmup_steps=warmup, schedule=kind, min_learning_rate=low)
    rates = [learning_rate(c, step) for step in range(steps)]
    peak = c.learning_rate
    assert all(0 <= r <= peak * (1 + 1e-9) for r in rates)
    ramp, decay = rates[:warmup], rates[warmup:]
    assert ramp == [peak * (i + 1) / warmup for i in range(len(ramp))]
    assert all(a >= b - 1e-12 for a, b in pairwise(decay))
    if decay:
        assert decay[-1] == pytest.approx(peak if kind == "constant" else peak * low)


def test_midpoints() -> None:
    for kind, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)):
        c = TrainConfig(steps=100, warmup_steps=0, schedule=kind, learning_rate=1.0)
        assert learning_rate(c, 49) == pytest.approx(middle)
    c = TrainConfig(steps=100, warmup_steps=0, learning_rate=1.0, min_learning_rate=0.0)
    assert learning_rate(c, 24) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_only_matrices_decay() -> None:
    config = ModelConfig(vocab_size=32, attention_bias=True, mlp_bias=True)
    model = LoopCoder(config)
    decayed = {n for n, p in model.named_parameters() if decays(n, p)}
    ends = {name.removeprefix("model.layers.0.") for name in decayed if "layers.1" not in name}
    assert {e for e in ends if not e.startswith("model.layers")} == {
        "lm_head.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }


def test_optimizer_holds_every_parameter_once() -> None:
    model = LoopCoder(ModelConfig(vocab_size=32, tie_word_embeddings=True))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    set_learning_rate(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_decay_acts_where_it_should() -> None:
    model = LoopCoder(ModelConfig(vocab_size=32))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if decays(name, p) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
