from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codeflow.train.attention import Documents
from codeflow.train.backends import BACKENDS

EVERYWHERE = ["auto", "dense", "sdpa"]
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2)
    q, k, v = (torch.randn(tokens, h, 8, generator=g, requires_grad=True) for h in heads)
    return q, k, v


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """One query, one head at a time."""
    out, start = torch.zeros_like(q), 0
    for n in lengths:
        for i in range(start, start + n):
            first = start if window is None else max(start, i - window + 1)
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // 2], v[first : i + 1, h // 2]
                weights = (keys @ q[i, h] / math.sqrt(q.shape[2])).softmax(0)
                out[i, h] = weights @ values
        start += n
    return out


@pytest.mark.parametrize("backend", EVERYWHERE)
@settings(max_examples=15, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_against_the_definition(backend: str, lengths: list[int], window: int) -> None:
    q, k, v = (x.detach() for x in qkv(sum(lengths)))
    docs, attention = Documents.of(lengths), BACKENDS[backend]
    far = attention.global_attention(q, k, v, docs)
    near = attention.local_attention(q, k, v, docs, window)
    torch.testing.assert_close(far, naive(q, k, v, lengths, None), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(near, naive(q, k, v, lengths, window), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 100))
def test_back_ends_have_the_same_gradients(lengths: list[int], window: int, seed: int) -> None:
    docs, gradients = Documents.of(lengths), []
    for name in ("dense", "sdpa"):
        q, k, v = qkv(sum(lengths), seed)
        far = BACKENDS[name].global_attention(q, k, v, docs)
        near = BACKENDS[name].local_attention(q, k, v, docs, window)
        torch.autograd.backward((far.square() + near.sin()).sum())
        gradients.append((q.grad, k.grad, v.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@given(LENGTHS)
def test_documents(lengths: list[int]) -> None:
    docs = Documents.of(lengths)
    assert docs.positions.tolist() == [p for n in lengths for p in range(n)]
    assert docs.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert docs.cu_seqlens.dtype == torch.int32
    assert docs.lengths == tuple(lengths)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_keeps_the_dtype(backend: str) -> None:
    q, k, v = (x.detach().bfloat16() for x in qkv(7))
    docs = Documents.of([3, 4])
    assert BACKENDS[backend].global_attention(q, k, v, docs).dtype == torch.bfloat16
    assert BACKENDS[backend].local_attention(q, k, v, docs, 2).dtype == torch.bfloat16
