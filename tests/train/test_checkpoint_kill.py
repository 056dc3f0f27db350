"""SIGKILL during a save: the previous checkpoint stays valid, and the next save tidies up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saving_worker import save

from codeflow.train import checkpoint
from codeflow.train.hf import load_model

pytestmark = pytest.mark.slow  # a process that imports torch, and its children


def kill(scenario: str, folder: Path, argument: int) -> None:
    worker = Path(__file__).with_name("saving_worker.py")
    environment = os.environ | {"PYTHONPATH": str(worker.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(worker), scenario, str(folder), str(argument)]
    subprocess.run(command, env=environment, check=True, timeout=60)


def newest(out: Path) -> tuple[int, str]:
    """Step and note of the checkpoint to resume from; whatever has a checkpoint's name is whole."""
    found = {folder: read(folder) for folder in out.glob("step-*")}
    last = checkpoint.latest(out)
    assert last is not None
    return found[last]


def read(folder: Path) -> tuple[int, str]:
    """Step and note of a checkpoint, after a look at all that is in it."""
    state = checkpoint.load_state(folder)
    assert folder.stem == f"step-{state['step']:08d}"
    for p in load_model(folder).parameters():
        assert torch.equal(p, torch.full_like(p, state["step"]))
    moments = checkpoint._read_state(folder)["optimizer"]["state"].values()
    assert all((m["exp_avg"] == state["step"]).all() for m in moments)
    return state["step"], state["note"]


def tidied(out: Path) -> bool:
    folder = save(out, 99)
    return list(out.iterdir()) == [folder]


@pytest.mark.parametrize(("step", "name"), [(2, "another step"), (1, "the same step")])
def test_killed_before_every_file_operation(tmp_path: Path, step: int, name: str) -> None:
    save(tmp_path / "base", 1, note="old")
    kill("points", tmp_path, step)
    outs = sorted(tmp_path.glob("point*"), key=lambda p: int(p.name.removeprefix("point")))
    found = [newest(out) for out in outs]
    old, new = (1, "old"), (step, "new")
    assert len(outs) > 15, name
    assert found[0] == old
    assert found[-1] == new
    switch = found.index(new)
    assert found == [old] * switch + [new] * (len(outs) - switch)
    assert all(tidied(out) for out in outs)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    save(tmp_path / "base", 1, hidden_size=256)
    kill("random", tmp_path, 20)
    outs = list(tmp_path.glob("kill*"))
    assert len(outs) == 20
    assert len({newest(out) for out in outs}) > 1
    assert any(list(out.glob("tmp-*")) for out in outs)  # some were in the middle
    assert all(tidied(out) for out in outs)
