"""Losses over the vocabulary that never hold the logits of a whole batch.

Tokens without a target are dropped before the projection, so a mostly masked document is cheap.
Finding them costs one wait for the device per call: it happens once in a micro-batch, where the
forward pass ends, and leaves the device idle for the launch of one kernel, which is less than
projecting even a few masked tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100

_ROWS = 4096  # of a gradient that are in float32 at the same time


def chunk_of(device: torch.device) -> int:
    """Tokens whose logits exist at the same time.

    Each chunk reads and writes the gradient of the output layer once. On a CPU 256 tokens are as
    fast as more; an accelerator's matrix products outrun its memory unless there are some thousand.
    """
    return 256 if device.type == "cpu" else 2048


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens that have a target of -log p(label) + z_loss * logsumexp(logits)^2.

    A sum, so that micro-batches and ranks add up exactly: divide by the count of targets of the
    whole step, never by that of one micro-batch.

    Each chunk of tokens forms its logits, adds its loss, and at once the gradients of the hidden
    states and of the output layer; the backward pass only scales them. That is as fast as the full
    computation and needs memory for one chunk, at the price of no second derivative.

    Args:
        hidden: (T, h), float32 or bfloat16.
        weight: (V, h), the output layer; its gradient is summed in float32.
        labels: int64 (T,), already shifted; -100 where there is no target.
        chunk: Tokens whose logits exist at the same time; `chunk_of` the device when None.
        z_loss: Keeps logits from drifting (Chowdhery et al. 2022, PaLM, with 1e-4); 0 adds none.

    Returns:
        float32 scalar; 0 when there is no target.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, chunk or chunk_of(hidden.device), z_loss, needs_gradient
    )
    return loss


def log_probabilities(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """log p(target) of each token, for losses that weigh tokens one by one.

    How much a token counts is known only in the backward pass, so the gradients cannot be formed
    early as in `cross_entropy`: each chunk projects its tokens again instead. That is four matrix
    products in place of three and memory for one chunk. There is no second derivative.

    Args:
        hidden: (T, h), float32 or bfloat16. Divide it by a temperature to sharpen or flatten p.
        weight: (V, h), the output layer.
        targets: int64 (T,), already shifted; -100 where there is none.
        chunk: Tokens whose logits exist at the same time; `chunk_of` the device when None.

    Returns:
        float32 (T,); 0, without gradient, where there is no target.
    """
    log_p: Tensor = _ChunkedLogProbabilities.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, chunk or chunk_of(hidden.device)
    )
    return log_p


class _Gradients(NamedTuple):
    hidden: Tensor
    weight: Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        z_loss: float,
        needs_gradient: bool,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _zero_gradients(hidden, weight) if needs_gradient else None
        projection = weight.to(hidden.dtype)
        for rows in _rows_with_target(labels, chunk):
            loss += _chunk_loss(hidden, projection, labels, rows, z_loss, gradients)
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return _scaled(d_hidden, d_loss), _scaled(d_weight, d_loss), None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Their product, formed in float32: 1 / targets in bfloat16 is off by up to 0.4 %."""
    result = torch.empty_like(gradient)
    parts, products = torch.split(gradient, _ROWS), torch.split(result, _ROWS)
    for part, product in zip(parts, products, strict=True):
        torch.mul(part.float(), factor, out=product)
    return result


def _chunk_loss(
    hidden: Tensor,
    projection: Tensor,
    labels: Tensor,
    rows: Tensor,
    z_loss: float,
    gradients: _Gradients | None,
) -> Tensor:
    """Loss of some rows; a function, so that the logits are gone before the next chunk's exist."""
    h, target = hidden[rows], labels[rows, None]
    logits = h @ projection.T
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = log_p.gather(1, target)
    log_normaliser = logits.gather(1, target).float() - picked
    del logits
    loss = z_loss * log_normaliser.square().sum() - picked.sum()
    if gradients is not None:
        d_logits = log_p.exp_()  # the log-probabilities are not needed any more
        if z_loss:
            d_logits *= 1.0 + 2.0 * z_loss * log_normaliser
        d_logits.scatter_add_(1, target, torch.full_like(picked, -1.0))
        _add_gradients(gradients, rows, d_logits, h, projection)
    return loss


class _ChunkedLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        log_p = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        projection = weight.to(hidden.dtype)
        for rows in _rows_with_target(targets, chunk):
            log_p[rows] = _log_softmax(hidden[rows], projection).gather(1, targets[rows, None])[
                :, 0
            ]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_log_p: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        gradients = _zero_gradients(hidden, weight)
        projection = weight.to(hidden.dtype)
        for rows in _rows_with_target(targets, ctx.chunk):
            h, slope = hidden[rows], d_log_p[rows, None]
            d_logits = _log_softmax(h, projection).exp_().mul_(-slope)
            d_logits.scatter_add_(1, targets[rows, None], slope)
            _add_gradients(gradients, rows, d_logits, h, projection)
            del d_logits
        return gradients.hidden, gradients.weight.to(weight.dtype), None, None


def _rows_with_target(labels: Tensor, chunk: int) -> Iterator[Tensor]:
    """Indices of tokens that have a target, `chunk` at a time; none when there are none."""
    rows = (labels != IGNORE).nonzero().squeeze(1)
    return iter(torch.split(rows, chunk) if len(rows) else ())


def _log_softmax(h: Tensor, projection: Tensor) -> Tensor:
    return F.log_softmax(h @ projection.T, dim=-1, dtype=torch.float32)


def _zero_gradients(hidden: Tensor, weight: Tensor) -> _Gradients:
    return _Gradients(torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32))


def _add_gradients(
    gradients: _Gradients, rows: Tensor, d_logits: Tensor, h: Tensor, projection: Tensor
) -> None:
    d_logits = d_logits.to(h.dtype)
    gradients.hidden[rows] = d_logits @ projection
    gradients.weight.add_(d_logits.T @ h)
