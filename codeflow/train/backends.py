"""The back ends of attention by name, which of them can run here, and the choice between them."""

from __future__ import annotations

from torch import Tensor

from codeflow.errors import UsageError, did_you_mean
from codeflow.train import flex, varlen
from codeflow.train.attention import DENSE, SDPA, Attention, Documents

VARLEN_BELOW = 2048
"""Mean document length, in tokens, under which `auto` prefers one varlen call to a call of SDPA per
document: many small launches cost more than the faster kernels that SDPA has for long documents
gain. An estimate, not measured yet; to have one back end for all batches, name it."""


def backend_named(name: str) -> Attention:
    """A back end.

    Raises:
        UsageError: It does not exist, or cannot run here.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend={name!r} does not exist. {did_you_mean(name, BACKENDS)}")
    if obstacle := BACKENDS[name].obstacle():
        raise UsageError(f"backend={name!r} cannot run here: {obstacle}; use `auto` or `sdpa`")
    return BACKENDS[name]


def _auto_global(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    short = len(q) < VARLEN_BELOW * len(docs.lengths)
    chosen = varlen.VARLEN if short and varlen.takes(q) else SDPA
    return chosen.global_attention(q, k, v, docs)


def _auto_local(q: Tensor, k: Tensor, v: Tensor, docs: Documents, window: int) -> Tensor:
    chosen = varlen.VARLEN if varlen.takes(q) else SDPA
    return chosen.local_attention(q, k, v, docs, window)


BACKENDS = {
    "auto": Attention(_auto_global, _auto_local),
    "sdpa": SDPA,
    "dense": DENSE,
    "varlen": varlen.VARLEN,
    "flex": flex.FLEX,
}
"""`auto` is `sdpa` on a CPU and in float32; on CUDA in half precision it chooses per batch."""
