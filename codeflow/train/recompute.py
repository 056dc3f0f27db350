"""Activation checkpointing: what the backward pass finds in memory and what it computes again.

A layer runs once per loop, and each run is a region of its own. Keys and values of the first loop
leave their region and enter those of later loops, so they stay in memory under every policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from codeflow.errors import UsageError, did_you_mean

R = TypeVar("R")

POLICIES = ("none", "full", "save_attention")
"""`none` keeps every activation, `full` only the input of each region, `save_attention` also the
results of attention: at long context attention is most of the work, and its results are small."""

_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flex_attention")


def require_policy(name: str) -> str:
    """The name itself.

    Raises:
        UsageError: It is not one of `POLICIES`.
    """
    if name not in POLICIES:
        raise UsageError(f"checkpointing={name!r} does not exist. {did_you_mean(name, POLICIES)}")
    return name


def call(policy: str, function: Callable[..., R], *args: Any) -> R:
    """`function(*args)`, keeping for the backward pass only what the policy says.

    Gradients do not depend on the policy, to the last bit. The function must not draw random
    numbers: their state is not restored.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return function(*args)
    contexts = _keep_attention if policy == "save_attention" else noop_context_fn
    result: R = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = op.name().startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = functools.partial(create_selective_checkpoint_contexts, _policy)
