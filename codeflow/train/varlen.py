"""Attention by torch's kernels for packed documents (FlashAttention-2): CUDA, half precision.

One call whatever the number of documents, and none of its cost depends on how they lie. The
signature differs between releases of torch; what it has is looked up, not assumed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.train.attention import Attention, Documents

BUCKET = 64
"""Offsets of documents are padded to a multiple of this, so that shapes are few."""


def obstacle() -> str | None:
    """Why this back end cannot run here, or None."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if _kernel() is None:
        return f"it needs torch 2.11, whose kernel knows windows; this is {torch.__version__}"
    return None


def takes(q: Tensor) -> bool:
    """Whether these tensors can be attended to by this back end."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and _kernel() is not None


def attend(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int
) -> Tensor:
    """Attention by a `varlen_attn` of any release.

    Args:
        kernel: `torch.nn.attention.varlen.varlen_attn`.
        q: (T, Hq, D).
        k: (T, Hk, D).
        v: (T, Hk, D).
        docs: Documents of the T tokens.
        window: Tokens that a query sees, itself included; 0 for all before it.
    """
    arguments: dict[str, Any] = {"window_size": (window - 1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            arguments["enable_gqa"] = True
        else:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    offsets, longest = _offsets(docs), max(docs.lengths)
    out: Tensor = kernel(q, k, v, offsets, offsets, longest, longest, **arguments)
    return out


def _offsets(docs: Documents) -> Tensor:
    """Offsets, then documents of no tokens until the bucket is full."""
    if "offsets" not in docs.cache:
        end = sum(docs.lengths)
        docs.cache["offsets"] = F.pad(
            docs.cu_seqlens, (0, -len(docs.cu_seqlens) % BUCKET), value=end
        )
    offsets: Tensor = docs.cache["offsets"]
    return offsets


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = "window_size" in inspect.signature(varlen_attn).parameters
    return varlen_attn if known else None


def _require(q: Tensor) -> Callable[..., Any]:
    kernel = _kernel()
    if kernel is None or not takes(q):
        raise UsageError(
            f"backend='varlen' needs bfloat16 or float16 on CUDA, not {q.dtype} on "
            f"{q.device.type}: set the dtype of the activations, or use the back end `sdpa`"
        )
    return kernel


def _global(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    return attend(_require(q), q, k, v, docs, 0)


def _local(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    return attend(_require(q), q, k, v, docs, window)


VARLEN = Attention(_global, _local, obstacle)
