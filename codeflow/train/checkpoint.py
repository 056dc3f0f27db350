"""Checkpoints: written whole or not at all, resumed on any number of processes, on one bit for bit.

A checkpoint is a folder `step-00000200` with `model.safetensors`, `config.json` and the data's
tokenizer, for other tools, `trained_on.json`, and `state.pt` (optimizer, random state, counters,
the sha256 of the weights), which only resuming needs. It is written under a temporary name, flushed
to disk and renamed, so a killed run leaves the previous one valid; the price is room for one more
checkpoint than are kept.

Weights and optimizer state are stored whole and by parameter name, whether the run was sharded or
not. Rank 0 gathers, writes and reads them: its host needs 12 bytes per parameter with AdamW.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from codeflow.errors import UsageError
from codeflow.train import trained_on
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf_config import read_hf_config, to_hf
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World, from_all_ranks, from_rank_0
from codeflow.train.trained_on import TrainedOn

_PARTS = {"optimizer", "random", "state", "weights"}
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def make_run_folder(out: Path, world: World) -> None:
    """Make the folder of a run, before minutes go into what could not be kept; every rank calls.

    Raises:
        UsageError: It cannot be written to.
    """
    problem = ""
    if world.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.R_OK | os.W_OK | os.X_OK):
                problem = "no permission to write there"
        except (FileExistsError, NotADirectoryError):
            problem = "there is a file where a folder is needed"
        except OSError as e:
            problem = f"cannot be made: {e.strerror or e}"
    if problem := from_rank_0(problem, world):
        raise UsageError(f"--out {out}: {problem}; name another folder")


def save(
    out: Path,
    step: int,
    model: LoopCoder,
    optimizer: Optimizers,
    state: Mapping[str, Any],
    *,
    keep: int,
    world: World,
    tokenizer: Path | None = None,
    data: Sequence[TrainedOn] = (),
) -> Path:
    """Write `out/step-…` atomically and delete all but the newest `keep` checkpoints.

    Every rank must call; rank 0 writes, and all fail when it does. Leftovers of killed runs in
    `out` are deleted. A checkpoint of the same step is replaced.

    Args:
        out: Folder of the checkpoints; made when absent.
        step: Optimizer updates done.
        model: Its weights and configuration; the model that was given to `distribute`.
        optimizer: One, or several that share out the model's parameters.
        state: What else resuming needs, of rank 0: tensors, numbers, strings, lists and dicts.
        keep: Checkpoints to keep, at least 1.
        world: The processes; the random state of each is saved.
        tokenizer: A `tokenizer.json` to put beside the weights, where there is such a file.
        data: What the model was trained on so far.

    Raises:
        CheckpointError: The disk refuses.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=whole)
    content: dict[str, Any] = {
        "optimizer": get_optimizer_state_dict(model, optimizer, options=whole),
        "random": from_all_ranks(_random_state(world), world),
        "state": dict(state),
    }
    problem = ""
    if world.rank == 0:
        try:
            _write(out, step, model.config, weights, content, keep, tokenizer, data)
        except CheckpointError as e:
            problem = str(e)
    if problem := from_rank_0(problem, world):
        raise CheckpointError(problem)
    return _folder(out, step)


def restore(folder: Path, model: LoopCoder, optimizer: Optimizers, world: World) -> dict[str, Any]:
    """Fill model and optimizer, and continue the random numbers; on as many ranks as one likes.

    Every rank must call; rank 0 reads. With the number of ranks that saved, each rank goes on with
    its own random state. With another number, rank r is seeded with r plus a number drawn from the
    saved state of rank 0: as good, and reproducible, but not what the first run would have drawn.

    Args:
        folder: A checkpoint of a model of the same configuration; see `require_config`.
        model: Distributed, before its first step.
        optimizer: Of the same kind as the saved one, over the same parameters.
        world: The processes.

    Returns:
        The state that was saved with it, on every rank.

    Raises:
        CheckpointError: It is missing or damaged, or of another model or optimizer.
    """
    weights: dict[str, Any] = {}
    optimizer_state: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    problem = ""
    if world.rank == 0:
        try:
            rest = _read_state(folder)
            weights = _read_weights(folder, model, rest.pop("weights"))
            optimizer_state = rest.pop("optimizer")
            _require_optimizer(folder, model, optimizer, optimizer_state)
        except CheckpointError as e:
            problem = str(e)
    stepped = bool(optimizer_state.get("state"))
    problem, rest, stepped = from_rank_0((problem, rest, stepped), world)
    if problem:
        raise CheckpointError(problem)
    several = world.world_size > 1
    whole = StateDictOptions(full_state_dict=several, broadcast_from_rank0=several)
    if stepped:  # else the state of a new optimizer is the saved one
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=whole)
    set_model_state_dict(model, weights, options=whole)
    _set_random_state(rest["random"], world)
    state: dict[str, Any] = rest["state"]
    return state


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    steps = _steps(out)
    return steps[-1] if steps else None


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as state.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    state: dict[str, Any] = _read_state(folder)["state"]
    return state


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


def _write(
    out: Path,
    step: int,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    content: Mapping[str, Any],
    keep: int,
    tokenizer: Path | None,
    data: Sequence[TrainedOn],
) -> None:
    final = _folder(out, step)
    temporary = out / f"tmp-{final.name}"
    replaced = final.with_suffix(".replaced")
    try:
        for leftover in out.glob("tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        file = temporary / "config.json"
        file.write_text(json.dumps(to_hf(config), indent=1) + "\n")
        tensors = {name: t.contiguous() for name, t in weights.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        # save_file lets nobody but the owner read; others shall, as far as the umask allows it.
        (temporary / "model.safetensors").chmod(file.stat().st_mode)
        sha256 = _sha256(temporary / "model.safetensors")
        torch.save({**content, "weights": sha256}, temporary / "state.pt")
        if tokenizer is not None and tokenizer.is_file():
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        trained_on.write(temporary, data)
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if final.exists():
            final.rename(replaced)  # counts as a checkpoint until the new one has the name
        temporary.rename(final)
        _flush(out)
        for old in [replaced] if replaced.exists() else _steps(out)[:-keep]:
            _delete(old)
    # torch.save reports a full disk as RuntimeError
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written: {e}. Earlier checkpoints are as they were; --resume "
            "continues from the newest when the disk has room for one more."
        ) from e


def _read_weights(folder: Path, model: LoopCoder, sha256: str) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    try:
        if _sha256(file) != sha256:  # the format has no checksum of its own
            raise SafetensorError("its content is not what was written")
        weights: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as e:
        raise _damaged(file, e) from e
    own = {name: t.shape for name, t in model.state_dict().items()}
    if {name: t.shape for name, t in weights.items()} != own:
        raise CheckpointError(f"{file}: has other tensors than its config.json promises")
    return weights


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / "state.pt"
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:  # torch.load does not look
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise _damaged(file, e) from e
    if not isinstance(content, dict) or content.keys() != _PARTS:
        raise CheckpointError(
            f"{file}: was not written by this version of codeflow. Its weights can start a new run."
        )
    return content


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read: {error}. Delete the folder {file.parent.name} to resume from the "
        "checkpoint before it."
    )


def _require_optimizer(
    folder: Path, model: LoopCoder, optimizer: Optimizers, saved: Mapping[str, Any]
) -> None:
    """Refuse what would fail later, on rank 0 alone, or be taken in part."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group["params"] for each in _each(optimizer) for group in each.param_groups]
    trained = {names[id(p)] for group in groups for p in group if p.requires_grad}
    same = [{names[id(p)] for p in group} for group in groups] == [
        set(group["params"]) for group in saved["param_groups"]
    ]
    if not same or (saved["state"] and trained - saved["state"].keys()):
        raise CheckpointError(
            f"{folder / 'state.pt'}: is the state of another optimizer (its parameter groups "
            "differ). Repeat the optimizer settings of the first run."
        )


def _random_state(world: World) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _set_random_state(saved: Sequence[Mapping[str, Tensor]], world: World) -> None:
    same = len(saved) == world.world_size
    own = saved[world.rank if same else 0]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and world.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], world.device)
    if not same:
        torch.manual_seed(int(torch.randint(2**62, ())) + world.rank)


def _folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def _steps(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; of a step, the one being replaced comes first."""
    folders = [p for p in out.glob("step-*") if p.is_dir()]
    return sorted(folders, key=lambda p: (p.stem, not p.suffix))


def _delete(folder: Path) -> None:
    """Delete a checkpoint without ever leaving half of one under its name."""
    doomed = folder.rename(folder.with_name(f"tmp-{folder.name}"))
    shutil.rmtree(doomed)


def _each(optimizer: Optimizers) -> Sequence[torch.optim.Optimizer]:
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
