"""A program that saves checkpoints in children of its own and has them killed with SIGKILL.

Every child works in a copy of the folder `base`, whose weights and state tell their step.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from codeflow.train import checkpoint
from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def save(out: Path, step: int, *, hidden_size: int = 8, note: str = "") -> Path:
    """A checkpoint of one kept, with the step in every weight and in the optimizer."""
    config = ModelConfig(
        vocab_size=64, hidden_size=hidden_size, intermediate_size=hidden_size,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    model = LoopCoder(config)
    for p in model.parameters():
        p.data.fill_(step)
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(step)
    state = {"step": step, "note": note}
    return checkpoint.save(out, step, model, optimizer, state, keep=1, world=ALONE)


def kill_at_every_point(base: Path, root: Path, step: int) -> None:
    """One child per file operation of a save, killed just before it; the last one finishes."""
    for point in itertools.count():
        out = root / f"point{point}"
        shutil.copytree(base, out)
        child = os.fork()
        if child == 0:
            _kill_me_at(point, out)
            save(out, step, note="new")
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


def _kill_me_at(point: int, out: Path) -> None:
    left = iter(range(point, -1, -1))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        ours = event.startswith(("open", "os.", "shutil.")) and str(out) in str(arguments)
        if ours and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_random(base: Path, root: Path, kills: int) -> None:
    """Children that save step after step, killed at random moments."""
    moments = random.Random(0)
    for number in range(kills):
        out = root / f"kill{number}"
        shutil.copytree(base, out)
        child = os.fork()
        if child == 0:
            for step in _steps_after(checkpoint.latest(out)):
                save(out, step, hidden_size=256)
        time.sleep(moments.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _steps_after(folder: Path | None) -> Iterator[int]:
    return itertools.count(checkpoint.load_state(folder)["step"] + 1 if folder else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)  # children of fork have no other threads
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    save(folder / "first", 1)  # what is imported late is imported now, not in every child
    if scenario == "random":
        kill_at_random(folder / "base", folder, int(sys.argv[3]))
    else:
        kill_at_every_point(folder / "base", folder, int(sys.argv[3]))
