"""Attention by torch's FlexAttention: CUDA, compiled, with a mask of blocks made once per batch.

The blocks follow from the documents by arithmetic: the keys that a query sees, and so those that a
block of queries sees, lie side by side. No (T, T) mask is ever formed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from codeflow.errors import UsageError
from codeflow.train.attention import Attention, Documents

BLOCK = 128
"""Tokens of a block of queries and of keys; what the kernels are written for."""


def obstacle() -> str | None:
    """Why this back end cannot run here, or None."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device; on a CPU it has no backward pass"
    return None


def attend(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int
) -> Tensor:
    """Attention by `flex_attention`, compiled or not; arguments as `varlen.attend`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = kernel(q, k, v, block_mask=_cached_mask(docs, window), enable_gqa=True)
    return out[0].transpose(0, 1)


def block_mask(docs: Documents, window: int) -> BlockMask:
    """Which blocks of keys each block of queries sees, none of it through the host.

    Args:
        docs: Documents of the T tokens.
        window: Tokens that a query sees, itself included; 0 for all before it.
    """
    positions = docs.positions
    tokens = len(positions)
    reach = window or tokens
    block = torch.arange(-(-tokens // BLOCK), device=positions.device)
    start = block * BLOCK
    end = (start + BLOCK - 1).clamp(max=tokens - 1)
    # The oldest key that the first query of a block sees is the oldest of the block, and from the
    # oldest key that its last query sees on, every query of the block sees all older than itself.
    oldest = start - positions[start].clamp(max=reach - 1)
    common = end - positions[end].clamp(max=reach - 1)
    first_full = torch.minimum((common + BLOCK - 1) // BLOCK, block)
    key = block[None, :]
    seen = (key >= oldest[:, None] // BLOCK) & (key <= block[:, None])
    full = (key >= first_full[:, None]) & (key < block[:, None])
    partial_count, partial = _sparse(seen & ~full)
    full_count, full_index = _sparse(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(positions, reach),
        seq_lengths=(tokens, tokens),
    )


def visible(positions: Tensor, reach: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query i sees key j: of its own document, not later, and less than `reach` before."""

    def mask_mod(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i - j
        return (distance >= 0) & (distance < reach) & (distance <= positions[i])

    return mask_mod


def _sparse(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a bool matrix as counts (1, 1, n) and column indices, the set ones first."""
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _cached_mask(docs: Documents, window: int) -> BlockMask:
    key = f"blocks {window}"
    if key not in docs.cache:
        docs.cache[key] = block_mask(docs, window)
    mask: BlockMask = docs.cache[key]
    return mask


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _require(q: Tensor) -> Callable[..., Any]:
    if not q.is_cuda:
        raise UsageError(
            f"backend='flex' needs tensors on CUDA, not on {q.device.type}: move the model, "
            "or use the back end `sdpa`"
        )
    return _compiled()


def _global(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    return attend(_require(q), q, k, v, docs, 0)


def _local(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    return attend(_require(q), q, k, v, docs, window)


FLEX = Attention(_global, _local, obstacle)
