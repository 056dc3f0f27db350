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
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from codeflow.errors import CodeflowError
from codeflow.train.config import ModelConfig, read_hf_config, to_hf
from codeflow.train.model import LoopCoder

_LEGACY_GATE = re.compile(r"model\.gate_projections\.(\d+)\.(weight|bias)")
_GATE = re.compile(r"model\.layers\.\d+\.gate_projection\.(weight|bias)")


class CheckpointError(CodeflowError):
    """A checkpoint or weights folder is missing, damaged, or of another model."""


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


def load_model(
    folder: str | Path, *, backend: str = "sdpa", dtype: torch.dtype = torch.float32
) -> LoopCoder:
    """A model from an HF folder: `config.json` and one or more `*.safetensors` with weights.

    Raises:
        UsageError: `config.json` is unusable.
        CheckpointError: The weights are.
    """
    config: ModelConfig = read_hf_config(folder)
    model = LoopCoder(config, backend=backend, dtype=dtype)
    load_weights(model, Path(folder))
    return model


def load_weights(model: LoopCoder, folder: Path) -> None:
    """Fill a model from a folder; every name and shape must match.

    Gates may have their old names (`model.gate_projections.N.*`). Weights of a dense Llama have
    no gates: then, and only then, all gates become zero, which means half global, half local.

    Raises:
        CheckpointError: No weights there, or names or shapes that do not fit.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: cannot be read: {e}") from e
    tensors = {
        _LEGACY_GATE.sub(r"model.layers.\1.gate_projection.\2", n): t for n, t in tensors.items()
    }
    own = model.state_dict()
    if not any(_GATE.fullmatch(name) for name in tensors):
        tensors |= {n: torch.zeros_like(t) for n, t in own.items() if _GATE.fullmatch(n)}
    problems = [f"{n} is missing" for n in own.keys() - tensors.keys()]
    problems += [f"{n} is not part of the model" for n in tensors.keys() - own.keys()]
    problems += [
        f"{n} is {list(tensors[n].shape)}, the model has {list(own[n].shape)}"
        for n in own.keys() & tensors.keys()
        if own[n].shape != tensors[n].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise CheckpointError(
            f"{folder}: weights do not fit its config.json ({len(problems)} differences): {shown}"
        )
    model.load_state_dict(tensors)


def _steps(out: Path) -> list[Path]:
    return sorted(p for p in out.glob("step-*") if p.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
