"""AdamW with decay only where it regularises, and the schedules of the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from codeflow.train.recipe import TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices of the layers and the output layer only.

    Norms, biases and gates are scales, not directions, and a decayed embedding shrinks the rows of
    rare tokens, which get no gradient to grow back.
    """
    return parameter.ndim >= 2 and "gate_projection" not in name and "embed_tokens" not in name


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with two parameter groups: decayed and not."""
    named = list(model.named_parameters())
    groups = [
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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 0, 1, …: linear warm-up to the peak, then the schedule.

    The first step is never zero, and the last step (`steps` - 1) has the smallest rate of the
    decay, `min_learning_rate` x peak.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup + 1) / max(1, config.steps - warmup))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (config.min_learning_rate + (1.0 - config.min_learning_rate) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
