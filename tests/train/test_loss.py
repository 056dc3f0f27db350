from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from codeflow.train.loss import IGNORE, cross_entropy, log_probabilities


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


@pytest.mark.parametrize("targets", [3001, 100_003])
def test_a_share_of_the_loss_scales_its_gradients_exactly(targets: int) -> None:
    """1 / targets has no short binary fraction: in bfloat16 it would be off by 0.1 to 0.2 %."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 64, generator=g)
    labels = torch.randint(0, 50, (5000,), generator=g)
    norms = []
    for factor in (1.0, 1 / targets):
        hidden = torch.randn(5000, 64, generator=torch.Generator().manual_seed(1))
        hidden = hidden.bfloat16().requires_grad_()
        torch.autograd.backward(cross_entropy(hidden, weight, labels) * factor)
        assert hidden.grad is not None
        norms.append(hidden.grad.float().norm().item())
    assert norms[1] / norms[0] * targets == pytest.approx(1, abs=2e-4)


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


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 50),
    st.sampled_from([1e-4, 0.1, 1.0]),
)
def test_z_loss_equals_autograd(keep: list[bool], chunk: int, z_loss: float) -> None:
    full, chunked = inputs(len(keep), keep), inputs(len(keep), keep)
    logits = full[0] @ full[1].T
    z = logits.logsumexp(-1)[torch.tensor(keep)].square().sum()
    want = F.cross_entropy(logits, full[2], ignore_index=IGNORE, reduction="sum") + z_loss * z
    have = cross_entropy(*chunked, chunk=chunk, z_loss=z_loss)
    torch.testing.assert_close(have, want)
    torch.autograd.backward(want * 0.37)
    torch.autograd.backward(have * 0.37)
    torch.testing.assert_close(chunked[0].grad, full[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked[1].grad, full[1].grad, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 9))
def test_log_probabilities_equal_the_full_computation(
    keep: list[bool], chunk: int, seed: int
) -> None:
    full, chunked = inputs(len(keep), keep, seed), inputs(len(keep), keep, seed)
    slopes = torch.randn(len(keep), generator=torch.Generator().manual_seed(seed))
    want = -F.cross_entropy(full[0] @ full[1].T, full[2], ignore_index=IGNORE, reduction="none")
    have = log_probabilities(*chunked, chunk=chunk)
    torch.testing.assert_close(have, want)
    torch.autograd.backward((want * slopes).sum())
    torch.autograd.backward((have * slopes).sum())
    torch.testing.assert_close(chunked[0].grad, full[0].grad)
    torch.testing.assert_close(chunked[1].grad, full[1].grad)


def test_log_probabilities_in_bfloat16() -> None:
    hidden, weight, labels = inputs(30, [True] * 30)
    half = hidden.detach().bfloat16().requires_grad_()
    log_p = log_probabilities(half, weight, labels, chunk=7)
    torch.autograd.backward(log_p.sum())
    want = log_probabilities(hidden, weight.detach(), labels)
    torch.testing.assert_close(log_p, want, rtol=0.05, atol=0.05)
    assert log_p.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_log_probabilities_without_gradient() -> None:
    with torch.no_grad():
        assert not log_probabilities(*inputs(5, [True] * 5)).requires_grad


@pytest.mark.parametrize("loss", [cross_entropy, log_probabilities])
def test_logits_exist_for_one_chunk_only(loss: Callable[..., Tensor]) -> None:
    tokens, vocabulary, chunk = 512, 2048, 32
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.backward(loss(hidden, weight, labels, chunk=chunk).sum())
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    of_a_chunk = chunk * vocabulary * 4
    assert of_a_chunk < peak < 4 * of_a_chunk  # all logits at once would be 16
