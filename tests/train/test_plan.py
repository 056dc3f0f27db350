from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch

from codeflow.errors import UsageError
from codeflow.train.attention import Documents
from codeflow.train.config import SIZES, ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.plan import memory_plan

ONE = ModelConfig(**SIZES["1.2b"])
MEASURED = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    loop_window_size=32,
)


@pytest.mark.parametrize(
    ("size", "at_32k", "at_128k", "at_128k_with_small_moments"),
    [
        ("0.6b", 19, 40, 37),
        ("1.2b", 31, 61, 56),
        ("3.4b", 78, 143, 129),
        ("7.6b", 156, 255, 225),
    ],
)
def test_totals_worked_out_by_hand(
    size: str, at_32k: float, at_128k: float, at_128k_with_small_moments: float
) -> None:
    c = ModelConfig(**SIZES[size])
    cases = ((32768, 8, at_32k), (131072, 8, at_128k), (131072, 4, at_128k_with_small_moments))
    for tokens, optimizer_bytes, gigabytes in cases:
        plan = memory_plan(c, tokens=tokens, checkpointing="full", optimizer_bytes=optimizer_bytes)
        assert plan.total / 1e9 == pytest.approx(gigabytes, rel=0.04)


def test_parts_of_1_2b_at_128k() -> None:
    plan = memory_plan(ONE, tokens=131072, checkpointing="full")
    states = plan.weights + plan.gradients + plan.optimizer
    assert states / 1e9 == pytest.approx(19, rel=0.01)
    assert plan.activations / 1e9 == pytest.approx(17.2, rel=0.01)
    assert plan.loop_memory / 1e9 == pytest.approx(8.6, rel=0.01)
    assert plan.gathered == 0
    assert plan.total == sum(astuple(plan))


@pytest.mark.parametrize(("tokens", "gigabytes"), [(32768, 6.5), (131072, 26)])
def test_keeping_attention_costs_its_results(tokens: int, gigabytes: float) -> None:
    full = memory_plan(ONE, tokens=tokens, checkpointing="full").activations
    kept = memory_plan(ONE, tokens=tokens, checkpointing="save_attention").activations
    everything = memory_plan(ONE, tokens=tokens).activations
    assert (kept - full) / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert everything > 3 * kept


def test_sharding_divides_the_states_and_nothing_else() -> None:
    alone = memory_plan(ONE, tokens=32768, checkpointing="full")
    eight = memory_plan(ONE, tokens=32768, checkpointing="full", world_size=8)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(alone, part) / 8, abs=8)
    assert eight.gathered > 0
    for part in ("activations", "loop_memory", "workspace", "loss"):
        assert getattr(eight, part) == getattr(alone, part)


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_autograd_keeps(
    loops: int, policy: str, dtype: torch.dtype, size: int
) -> None:
    c, n = replace(MEASURED, loop_num=loops), 2048
    model = LoopCoder(c, backend="sdpa", checkpointing=policy, dtype=dtype)
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        alive.append(x)  # or its address could be used again
        return x

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.zeros(n, dtype=torch.long), Documents.of([n]))
    plan = memory_plan(c, tokens=n, checkpointing=policy, activation_bytes=size)
    expected = plan.activations
    if policy == "none":
        expected += plan.loop_memory // 2  # the other half are gradients
    else:
        kept[0] = -n * 64 * (4 + size)  # the final norm, which no region contains
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


def test_an_unknown_policy() -> None:
    with pytest.raises(UsageError, match="Did you mean `full`"):
        memory_plan(ONE, tokens=1, checkpointing="ful")
