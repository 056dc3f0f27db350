"""Attention over packed documents: one interface, an oracle, and the back end that runs anywhere.

Tensors are (T, H, D) on a flat token axis without padding; documents never see each other. `dense`
forms the full (H, T, T) scores in float32 and is what everything else is tested against. `sdpa`
uses torch's fused kernels: one causal call per document for global attention (fast for long
documents, slow for thousands of tiny ones), and blocks of W queries against 2W keys for local
attention, which costs O(T W) whatever the documents are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a flat token axis lie; made once per batch, outside the model.

    Attributes:
        lengths: Length of each document, on the host, so that slicing needs no device sync.
        cu_seqlens: int32 (documents + 1,), starts of the documents and the end.
        positions: int64 (T,), from 0 in every document.
        cache: What a back end derives from the layout, once per batch and not once per layer.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor
    cache: dict[str, Any] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """From the lengths, all at least 1."""
        n = torch.tensor(lengths, dtype=torch.int64)
        ends = torch.cumsum(n, 0)
        positions = torch.arange(int(n.sum())) - torch.repeat_interleave(ends - n, n)
        cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
        return cls(tuple(lengths), to_device(cu_seqlens, device), to_device(positions, device))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy from the host; to a GPU out of pinned memory, which needs no wait for its work."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Attention:
    """A back end.

    Attributes:
        global_attention: `(q, k, v, docs) -> o`: causal inside each document. q and o are
            (T, Hq, D), k and v (T, Hk, D) with Hq a multiple of Hk.
        local_attention: `(q, k, v, docs, window) -> o`: query i sees key j of its own document
            when 0 <= i - j < window, so the window counts the token itself.
        obstacle: Says why the back end cannot run on this machine; None when it can.
    """

    global_attention: Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
    local_attention: Callable[[Tensor, Tensor, Tensor, Documents, int], Tensor]
    obstacle: Callable[[], str | None] = lambda: None


def _dense_global(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    return _dense_local(q, k, v, docs, q.shape[0])


def _dense_local(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    scores = torch.einsum("ihd,jhd->hij", q.float(), k) / math.sqrt(q.shape[2])
    token = torch.arange(q.shape[0], device=q.device)
    distance = token[:, None] - token[None, :]
    visible = (distance >= 0) & (distance < window) & (distance <= docs.positions[:, None])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


def _sdpa_global(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    parts = zip(*(torch.split(x, list(docs.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([_heads_first(*part) for part in parts])


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def _sdpa_local(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    tokens = q.shape[0]
    blocks = -(-tokens // window)
    tail = blocks * window - tokens
    # Block n of the queries meets blocks n-1 and n of the keys; block -1 is padding.
    q = F.pad(q, (0, 0, 0, 0, 0, tail)).view(blocks, window, *q.shape[1:])
    k, v = (_pairs_of_blocks(x, blocks, window, tail) for x in (k, v))
    i = torch.arange(window, device=q.device)[:, None] + window
    j = torch.arange(2 * window, device=q.device)[None, :]
    distance = i - j
    # A key lies in the query's document when it is not farther away than the document's start.
    # Padded queries get position 0: they see themselves, so that no row of the softmax is empty.
    position = F.pad(docs.positions, (0, tail)).view(blocks, window, 1)
    visible = (distance >= 0) & (distance < window) & (distance <= position)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(blocks * window, *q.shape[2:])[:tokens]


def _pairs_of_blocks(x: Tensor, blocks: int, window: int, tail: int) -> Tensor:
    """(T, H, D) to (blocks, 2 window, H, D): each block of keys after the block before it."""
    padded = F.pad(x, (0, 0, 0, 0, window, tail)).view(blocks + 1, window, *x.shape[1:])
    return torch.cat([padded[:-1], padded[1:]], dim=1)


DENSE = Attention(_dense_global, _dense_local)
SDPA = Attention(_sdpa_global, _sdpa_local)
