"""Checkpoints: written whole or not at all, resumed bit for bit.

A checkpoint is a folder `step-00000200` with `model.safetensors` and `config.json`, which other
tools can read, and `state.pt` (optimizer, random state, loader, counters), which only resuming
needs. It is written under a temporary name, flushed to disk and renamed, so a killed run leaves the
previous one valid; the price is room for one more checkpoint than are kept.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import read_hf_config, to_hf
from codeflow.train.model import LoopCoder


def save(out: Path, step: int, model: LoopCoder, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `out/step-…` atomically and delete all but the newest `keep` checkpoints.

    Args:
        out: Folder of the checkpoints; made when absent.
        step: Optimizer updates done.
        model: Its weights and configuration.
        state: Tensors, numbers, strings, lists and dicts, for `torch.save`.
        keep: Checkpoints to keep, at least 1.

    Raises:
        CheckpointError: The disk refuses.
    """
    final = out / f"step-{step:08d}"
    temporary = out / f"tmp-{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        # Not `save_file`: it makes the file unreadable to everybody but its owner.
        content = to_bytes(weights, metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(content)
        (temporary / "config.json").write_text(json.dumps(to_hf(model.config), indent=1) + "\n")
        torch.save(dict(state), temporary / "state.pt")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(out)
        for old in _steps(out)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"{final}: cannot be written: {e}") from e
    return final


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    steps = _steps(out)
    return steps[-1] if steps else None


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as state.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise CheckpointError(
            f"{folder / 'state.pt'}: cannot be read: {e}. Delete this checkpoint to resume from "
            "the one before it."
        ) from e
    return dict(state)


def require_config(folder: Path, config: ModelConfig) -> None:
    """Refuse to resume another model.

    Raises:
        CheckpointError: It names the settings that differ.
    """
    saved, now = to_hf(read_hf_config(folder)), to_hf(config)
    if differing := [f"model.{k} was {saved[k]}, is {now[k]}" for k in now if saved[k] != now[k]]:
        raise CheckpointError(
            f"{folder}: is another model: {'; '.join(differing)}. Repeat the size and settings of "
            "the first run, or start a new one in another folder."
        )


def _steps(out: Path) -> list[Path]:
    return sorted(p for p in out.glob("step-*") if p.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
