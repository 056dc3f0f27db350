"""Training on one or several processes, the same rows in either case; also a program for one rank.

`launch` starts the ranks as torchrun would. Each writes what its scenario returns.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codeflow.train import checkpoint, parallel
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World

VOCABULARY = 61
SMALL = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, loop_window_size=4,
    initializer_range=0.2,
)  # fmt: skip
TARGETS = (3, 0, 17, 8)
"""Of the four micro-batches of a step: rank 0 of 2 has 20, rank 1 has 8 and one batch without."""


@dataclass(frozen=True)
class Case:
    """How a model is trained.

    Attributes:
        build: `real` on all ranks; `rank0`: the others on meta; `meta`: all, initialised later.
    """

    strategy: str
    loops: int = 2
    checkpointing: str = "none"
    reshard: bool = True
    dtype: torch.dtype = torch.float32
    build: str = "real"


CASES = {
    "ddp-1": Case("ddp", loops=1),
    "ddp-2": Case("ddp", checkpointing="full", build="rank0"),
    "fsdp-1": Case("fsdp", loops=1, checkpointing="full"),
    "fsdp-2": Case("fsdp"),
    "fsdp-2-full": Case("fsdp", checkpointing="full", reshard=False),
    "fsdp-2-attention": Case("fsdp", checkpointing="save_attention", build="rank0"),
    "fsdp-meta": Case("fsdp", build="meta"),
    "fsdp-bf16": Case("fsdp", dtype=torch.bfloat16),
}


class Run:
    """A model, its optimizer and the loop of a trainer, with made-up rows."""

    def __init__(self, case: Case, world: World, *, seed: int = 0) -> None:
        config = replace(SMALL, loop_num=case.loops)
        on_meta = case.build == "meta" or (case.build == "rank0" and world.rank > 0)
        with torch.device("meta" if on_meta and world.world_size > 1 else "cpu"):
            self.model = LoopCoder(
                config, seed=seed, dtype=case.dtype, checkpointing=case.checkpointing
            )
        self.world, self.step = world, 0
        self.module: nn.Module = parallel.distribute(
            self.model,
            world,
            strategy=case.strategy,
            dtype=case.dtype,
            reshard_after_forward=case.reshard,
        )
        if case.build == "meta":
            self.model.initialise(seed)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        return [self.update() for _ in range(steps)]

    def update(self) -> tuple[float, float]:
        world = self.world
        mine = range(world.rank, len(TARGETS), world.world_size)
        targets = parallel.total(torch.tensor(float(sum(TARGETS[i] for i in mine))), world)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for i in mine:
            with parallel.accumulate(self.module, last=i == mine[-1]):
                part = self.module(*micro_batch(self.step, i)).loss / targets
                part.backward()
            loss += part.detach()
        norm = parallel.clip_gradients(self.model, 0.5, world)
        assert type(norm) is Tensor
        self.optimizer.step()
        self.step += 1
        return parallel.total(loss, world).item(), norm.item()

    def weights(self) -> dict[str, Tensor]:
        """Whole, on every rank, after `train`."""
        state = self.model.state_dict()
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t) for n, t in state.items()}

    def save(self, out: Path) -> Path:
        return checkpoint.save(
            out, self.step, self.model, self.optimizer, {"step": self.step}, keep=9,
            world=self.world,
        )  # fmt: skip

    def restore(self, folder: Path) -> None:
        state = checkpoint.restore(folder, self.model, self.optimizer, self.world)
        self.step = state["step"]


def micro_batch(step: int, i: int) -> tuple[Tensor, Documents, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + i)
    ids = torch.randint(0, VOCABULARY, (20,), generator=generator)
    labels = torch.full((20,), -100)
    labels[: TARGETS[i]] = ids[1 : TARGETS[i] + 1]
    return ids, Documents.of([13, 7]), labels


def equal_training(_: Path, world: World) -> dict[str, Any]:
    """Every case for three steps."""
    found: dict[str, Any] = {"auto": type(Run(Case("auto"), world).module).__name__}
    for name, case in CASES.items():
        run = Run(case, world)
        found[name] = (run.train(3), run.weights())
    return found


def resuming(folder: Path, world: World) -> dict[str, Any]:
    """Save sharded, go on; resume that checkpoint and one of a single process in every way."""
    run = Run(CASES["fsdp-2"], world)
    run.train(2)
    with torch.no_grad():  # scoring leaves weights gathered; a checkpoint must not mind
        run.module(*micro_batch(0, 0))
    run.save(folder / "two")
    random = torch.rand(3)
    found: dict[str, Any] = {"expected": run.train(2)}
    for source in ("one", "two"):
        for strategy in ("ddp", "fsdp"):
            run = Run(Case(strategy, build="rank0"), world, seed=9)
            run.restore(folder / source / "step-00000002")
            drawn = torch.rand(3)
            found[f"{source}-{strategy}"] = run.train(2)
            found[f"{source}-{strategy}-random"] = (drawn, random)
    return found


def failing(folder: Path, world: World) -> dict[str, Any]:
    """What each rank gets to know of the troubles of rank 0."""
    run = Run(CASES["fsdp-2"], world)
    run.train(1)
    messages = {}
    for name, action in {
        "damaged": lambda: run.restore(folder / "damaged" / "step-00000002"),
        "unwritable": lambda: run.save(folder / "a file"),
    }.items():
        try:
            action()
        except CheckpointError as e:
            messages[name] = str(e)
    run.train(1)  # they are still together
    return messages


def launch(scenario: str, folder: Path, *, world_size: int = 2, seconds: float = 60) -> list[Any]:
    """Run a scenario on several processes of this machine; returns what each rank returned.

    Raises:
        AssertionError: A rank failed, or took too long; none is left running.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo"}
    common["PYTHONPATH"] = str(Path(__file__).parents[2])
    ranks = []
    for rank in range(world_size):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, "-W", "error", __file__, scenario, str(folder)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        for process in ranks:
            process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass  # told below, with the logs
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{r}.log").read_text() for r in range(world_size))
    assert [p.returncode for p in ranks] == [0] * world_size, logs
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def main(scenario: str, folder: Path) -> None:
    world = parallel.start("cpu")
    torch.manual_seed(world.rank)
    scenarios = {f.__name__: f for f in (equal_training, resuming, failing)}
    found = scenarios[scenario](folder, world)
    torch.save(found, folder / f"rank{world.rank}.pt")
    parallel.stop(world)
    os._exit(0)  # threads of gloo can abort an interpreter that takes itself down


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
