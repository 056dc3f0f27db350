"""A trained model for evaluation and generation: the options and the loading that both share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from codeflow.errors import UsageError
from codeflow.train import checkpoint
from codeflow.train.errors import CheckpointError
from codeflow.train.hf_weights import load_model
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import usable_device


def open_model(options: argparse.Namespace) -> tuple[LoopCoder, torch.device]:
    """The model that the options of `arguments` name, and the device it is on.

    Raises:
        UsageError: A device or configuration that cannot be used.
        CheckpointError: No weights, or weights that do not fit their configuration.
    """
    device = usable_device(options.device, "--device ")
    folder = weights_folder(Path(options.checkpoint))
    model = load_model(folder, backend=options.backend, dtype=getattr(torch, options.dtype))
    return model.to(device).eval(), device


def weights_folder(path: Path) -> Path:
    """The folder itself, or the newest checkpoint in the folder of a training run.

    Raises:
        UsageError: No such folder.
        CheckpointError: A training run without a checkpoint.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder")
    if not (path / "checkpoints").is_dir():
        return path
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{path}: this training run has no complete checkpoint yet")
    return newest
