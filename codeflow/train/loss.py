"""Cross-entropy that never holds the logits of a whole batch.

Each chunk of tokens forms its logits, adds its loss, and at once the gradients of the hidden states
and of the output layer; the backward pass only scales them. That is as fast as the full computation
and needs memory for one chunk, at the price of no second derivative. Tokens without a target are
dropped before the projection, so a mostly masked document is cheap.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """Sum of -log p(label) over tokens that have a target.

    A sum, so that micro-batches and ranks add up exactly: divide by the count of targets of the
    whole step, never by that of one micro-batch.

    Args:
        hidden: (T, h), float32 or bfloat16.
        weight: (V, h), the output layer.
        labels: int64 (T,), already shifted; -100 where there is no target.
        chunk: Tokens whose logits exist at the same time.

    Returns:
        float32 scalar; 0 when there is no target.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, chunk, needs_gradient
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, gradient: bool
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if gradient else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if gradient else None
        projection = weight.to(hidden.dtype)
        for rows in torch.split((labels != IGNORE).nonzero().squeeze(1), chunk):
            h, target = hidden[rows], labels[rows]
            log_p = F.log_softmax((h @ projection.T).float(), dim=-1)
            loss += F.nll_loss(log_p, target, reduction="sum")
            if d_hidden is not None and d_weight is not None:
                d_logits = log_p.exp_()  # the log-probabilities are not needed any more
                d_logits[torch.arange(len(rows), device=rows.device), target] -= 1.0
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[rows] = d_logits @ projection
                d_weight += d_logits.T @ h
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss, None, None, None
