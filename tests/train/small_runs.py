"""Training runs that take a second, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codeflow.train.checkpoint import load_state
from codeflow.train.hf import load_model
from codeflow.train.skip import SkipRule
from codeflow.train.trainer import TrainResult, run

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.head_dim=8",
    "model.loop_window_size=8",
    "train.warmup_steps=2",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.device=cpu",
]
SMALL_ARGUMENTS = [part for setting in SMALL for part in ("--set", setting)]


def small(data: Path | None, out: Path, steps: int | None, *more: str, **rest: Any) -> TrainResult:
    return run(data, out, steps=steps, overrides=[*SMALL, *more], **rest)


def lines(out: Path) -> list[dict[str, Any]]:
    """All metrics, without evaluations."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "loss" in line]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def evaluations(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "eval/loss" in line]


def killed_at(step: int, *arguments: Any, **rest: Any) -> None:
    """A `small` run that dies in the middle of a step, counted from 1."""
    real, calls = SkipRule.skips, 0

    def skips(rule: SkipRule, loss: float, norm: float) -> bool:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return real(rule, loss, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SkipRule, "skips", skips)
        with pytest.raises(KeyboardInterrupt):
            small(*arguments, **rest)


def assert_same_end(one: Path, two: Path, step: int) -> None:
    """Equal losses at every step and equal checkpoints at the last, bit for bit."""
    assert losses(one) == losses(two)
    folders = [out / "checkpoints" / f"step-{step:08d}" for out in (one, two)]
    models = [load_model(folder) for folder in folders]
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    states = [load_state(folder) for folder in folders]
    for key in ("progress", "skip", "stage", "loader"):
        assert states[0][key] == states[1][key]
