"""Optimizers, with weight decay only where it regularises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from codeflow.errors import UsageError
from codeflow.train.recipe import TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices of the layers and the output layer only.

    Norms, biases and gates are scales, not directions, and a decayed embedding shrinks the rows of
    rare tokens, which get no gradient to grow back.
    """
    return parameter.ndim >= 2 and "gate_projection" not in name and "embed_tokens" not in name


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), or Muon and AdamW, over all parameters that train.

    Muon (Jordan et al. 2024) takes the matrices of the layers. Its updates are scaled to the size
    that AdamW's have (Liu et al. 2025), so both share learning rate and weight decay.

    Raises:
        UsageError: Muon for a sharded model: it needs whole matrices.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return [_adamw(named, config)]
    if any(isinstance(p, DTensor) for _, p in named):
        raise UsageError(
            "train.optimizer=muon needs whole matrices and cannot train a sharded model; set "
            "train.parallel=ddp, or train.optimizer=adamw"
        )
    muon = torch.optim.Muon(
        [p for n, p in named if _is_layer_matrix(n, p)],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _adamw([(n, p) for n, p in named if not _is_layer_matrix(n, p)], config)]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def forget_moments(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Back to the state of a new optimizer."""
    for optimizer in optimizers:
        optimizer.state.clear()


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return ".layers." in name and decays(name, parameter)


def _adamw(named: list[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for _, p in named)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused or None,
    )
