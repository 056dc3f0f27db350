from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopcoder_oracle import SMALL, W, tokens
from torch.utils.flop_counter import FlopCounterMode

from codeflow.train.attention import Documents
from codeflow.train.config import SIZES, ModelConfig
from codeflow.train.flops import (
    parameter_count,
    peak_flops,
    training_flops,
    training_flops_noncausal,
)
from codeflow.train.model import LoopCoder

LOOPS = pytest.mark.parametrize("loops", [1, 2, 3])
PLT = {"plt_emb_scale": 0.7, "plt_gate_use_hidden_states": True}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plt", [False, True])
def test_parameter_count(tied: bool, bias: bool, plt: bool) -> None:
    c = replace(SMALL, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    c = replace(c, **PLT) if plt else c
    model = LoopCoder(c)
    assert parameter_count(c) == sum(p.numel() for p in model.parameters())
    body = [p for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n]
    assert parameter_count(c, embeddings=False) == sum(p.numel() for p in body)


@LOOPS
@pytest.mark.parametrize("plt", [False, True])
def test_flops_are_what_torch_counts(loops: int, plt: bool) -> None:
    """The oracle does the counted work, and that of all pairs which it then masks."""
    c = replace(SMALL, loop_num=loops)
    c = replace(c, **PLT) if plt else c
    model = LoopCoder(c, backend="dense")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens(6), Documents.of([6])).hidden)
    pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    masked = pair * (loops * (36 - 21) + (loops - 1) * (36 - 18))
    assert training_flops(c, [6]) == 3 * (counter.get_total_flops() - masked)
    # The common convention counts the square of global attention, and not the local one.
    local = pair * (loops - 1) * 36
    assert training_flops_noncausal(c, [2, 4]) == 3 * (counter.get_total_flops() - local)
    assert training_flops_noncausal(c, [6, 6], 6) == 2 * training_flops_noncausal(c, [6])


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=4))
def test_flops_add_up_token_by_token(lengths: list[int]) -> None:
    width, layers = 24, 2
    one = training_flops(SMALL, [1]) // 3 - 4 * layers * width * 3  # without attention
    total = 0
    for n in lengths:
        for p in range(n):
            total += one + 4 * layers * width * (2 * (p + 1) + min(p + 1, W))
    assert training_flops(SMALL, lengths) == 3 * total


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ("tiny", 0.02045),
        ("small", 0.1012),
        ("0.6b", 0.63),
        ("1.2b", 1.19),
        ("3.4b", 3.45),
        ("7.6b", 7.61),
        ("7b-v2", 7.62),
        ("40b", 39.8),
    ],
)
def test_named_sizes(size: str, billions: float) -> None:
    assert parameter_count(ModelConfig(**SIZES[size])) / 1e9 == pytest.approx(billions, rel=5e-3)


def test_every_size_is_tested_and_fits_other_tools() -> None:
    for shape in SIZES.values():
        c = ModelConfig(**shape)
        assert c.num_attention_heads * c.head_dim == c.hidden_size


def test_work_of_1_2b_at_long_context() -> None:
    """Worked out by hand: 14.7, 24.3 and 63.0 GFLOP a token, and what squares add to them."""
    c = ModelConfig(**SIZES["1.2b"])
    for tokens_, giga, flattery in ((8192, 14.7, None), (32768, 24.3, 1.53), (131072, 63.0, 1.82)):
        exact = training_flops(c, [tokens_])
        assert exact / tokens_ / 1e9 == pytest.approx(giga, rel=5e-3)
        if flattery:
            assert training_flops_noncausal(c, [tokens_]) / exact == pytest.approx(flattery, 5e-3)
    assert training_flops_noncausal(c, [1] * 64, 64) == training_flops_noncausal(c, [64])


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA GeForce RTX 3060"])
def test_unknown_peaks(name: str) -> None:
    assert peak_flops(name) is None
