from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codeflow.train.loss import IGNORE, cross_entropy


def inputs(tokens: int, keep: list[bool], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=g, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, requires_grad=True)
    labels = torch.randint(0, 11, (tokens,), generator=g)
    return hidden, weight, labels.where(torch.tensor(keep), torch.tensor(IGNORE))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 9))
def test_equals_the_full_computation(keep: list[bool], chunk: int, seed: int) -> None:
    full, chunked = inputs(len(keep), keep, seed), inputs(len(keep), keep, seed)
    want = F.cross_entropy(full[0] @ full[1].T, full[2], ignore_index=IGNORE, reduction="sum")
    have = cross_entropy(*chunked, chunk=chunk)
    torch.testing.assert_close(have, want)
    torch.autograd.backward(want * 0.37)
    torch.autograd.backward(have * 0.37)
    torch.testing.assert_close(chunked[0].grad, full[0].grad)
    torch.testing.assert_close(chunked[1].grad, full[1].grad)


def test_without_targets_it_is_zero_and_has_zero_gradients() -> None:
    hidden, weight, labels = inputs(5, [False] * 5)
    loss = cross_entropy(hidden, weight, labels)
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_gradient_is_the_slope() -> None:
    hidden, weight, labels = inputs(5, [True, False, True, True, True])
    # Finite differences need more than the float32 that the loss is computed in.
    direction, step = torch.randn_like(hidden), 1e-2
    loss = cross_entropy(hidden, weight, labels, chunk=2)
    torch.autograd.backward(loss)
    with torch.no_grad():
        ahead = cross_entropy(hidden + step * direction, weight, labels)
        behind = cross_entropy(hidden - step * direction, weight, labels)
    assert hidden.grad is not None
    slope = (hidden.grad * direction).sum()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-2, atol=1e-3)


def test_evaluation_computes_no_gradients() -> None:
    hidden, weight, labels = inputs(5, [True] * 5)
    with torch.no_grad():
        assert not cross_entropy(hidden, weight, labels).requires_grad


def test_bfloat16_hidden_states_give_float32_weight_gradients() -> None:
    hidden, weight, labels = inputs(30, [True] * 30)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy(half, weight, labels, chunk=7)
    torch.autograd.backward(loss)
    want = cross_entropy(hidden, weight.detach(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-2)
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
