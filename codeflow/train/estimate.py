"""What a run comes to before it starts: parameters, FLOPs, steps, epochs, and memory of a GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from codeflow.train.flops import parameter_count, training_flops, training_flops_noncausal
from codeflow.train.plan import MemoryPlan, memory_plan
from codeflow.train.recipe import TrainConfig
from codeflow.train.resolve import Run

H200_BYTES = 141 * 10**9

USABLE = 0.9
"""Share of a device that a plan may fill: allocators fragment, libraries keep workspaces."""


@dataclass(frozen=True)
class StageEstimate:
    """A stage in numbers.

    Attributes:
        row_length: Tokens of its longest rows, for which FLOPs are given: one document per row.
        tokens: Tokens of the stage, by the mean row.
        flops_per_token: Forward and backward, attention counted causally, as it is.
        flops_per_token_noncausal: By the common convention, attention as the full square of a row.
    """

    name: str
    steps: int
    batch_rows: int
    row_length: int
    tokens: int
    epochs: float
    flops_per_token: float
    flops_per_token_noncausal: float


@dataclass(frozen=True)
class Estimate:
    """All that `codeflow train --dry-run` says.

    Attributes:
        parameters: Embedding and output layer included.
        parameters_without_embeddings: And not.
        stages: In order.
        world_size: Number of processes, a GPU each.
        sharded: Whether weights are sharded over them (FSDP).
        checkpointing: The policy, chosen if the recipe says `auto`.
        memory: Bytes on each GPU by use, in the stage with the longest rows.
        memory_total: Their sum.
        gpu_memory: Bytes of each GPU.
        fits: Whether the sum is within what can be used of it.
        advice: What makes it fit, where it does not.
    """

    parameters: int
    parameters_without_embeddings: int
    stages: tuple[StageEstimate, ...]
    world_size: int
    sharded: bool
    checkpointing: str
    memory: MemoryPlan
    memory_total: int
    gpu_memory: int
    fits: bool
    advice: str


def estimate(run: Run, *, gpu_memory: int = H200_BYTES, world_size: int = 1) -> Estimate:
    """Work out a run without a GPU and without weights."""
    sharded = shards(run, gpu_memory, world_size)
    checkpointing = choose_checkpointing(run, gpu_memory, world_size)
    memory = _memory(run, checkpointing, world_size if sharded else 1)
    fits = _fits(memory, gpu_memory)
    stages = []
    for plan in run.stages:
        n = plan.row_length
        stages.append(
            StageEstimate(
                name=plan.stage.name,
                steps=plan.steps,
                batch_rows=plan.batch_rows,
                row_length=n,
                tokens=plan.tokens,
                epochs=plan.epochs,
                flops_per_token=training_flops(run.model, [n]) / n,
                flops_per_token_noncausal=training_flops_noncausal(run.model, [n]) / n,
            )
        )
    return Estimate(
        parameters=parameter_count(run.model),
        parameters_without_embeddings=parameter_count(run.model, embeddings=False),
        stages=tuple(stages),
        world_size=world_size,
        sharded=sharded,
        checkpointing=checkpointing,
        memory=memory,
        memory_total=memory.total,
        gpu_memory=gpu_memory,
        fits=fits,
        advice="" if fits else _advice(run, checkpointing, gpu_memory, world_size),
    )


def shards(run: Run, gpu_memory: int, world_size: int) -> bool:
    """Whether `train.parallel` shards the model; `auto` does when its states fill half a GPU."""
    if world_size == 1 or run.train.parallel == "ddp":
        return False
    states = _memory(run, "full", 1)
    filled = states.weights + states.gradients + states.optimizer
    return run.train.parallel == "fsdp" or filled > gpu_memory // 2


def choose_checkpointing(run: Run, gpu_memory: int | None, world_size: int) -> str:
    """`train.checkpointing`, with `auto` decided: what computes least again and fits.

    Args:
        run: The run.
        gpu_memory: Bytes of each GPU; None on a CPU, where nothing is checkpointed.
        world_size: Number of processes.
    """
    if run.train.checkpointing != "auto":
        return run.train.checkpointing
    if gpu_memory is None:
        return "none"
    sharding = world_size if shards(run, gpu_memory, world_size) else 1
    # Where flex keeps its results is out of a policy's sight, so it would compute them again.
    kept = ("none",) if run.train.backend == "flex" else ("none", "save_attention")
    fitting = (p for p in kept if _fits(_memory(run, p, sharding), gpu_memory))
    return next(fitting, "full")


def render(result: Estimate) -> str:
    """The estimate for a person."""
    lines = [
        f"parameters      {result.parameters:,} "
        f"({result.parameters_without_embeddings:,} without embeddings)",
        "",
        f"{'stage':<12} {'steps':>9} {'rows/step':>9} {'row':>8} {'tokens':>15} {'epochs':>8} "
        f"{'GFLOP/token':>12} {'non-causal':>11}",
    ]
    lines += [
        f"{s.name:<12} {s.steps:>9,} {s.batch_rows:>9,} {s.row_length:>8,} {s.tokens:>15,} "
        f"{s.epochs:>8.2f} {s.flops_per_token / 1e9:>12.3f} "
        f"{s.flops_per_token_noncausal / 1e9:>11.3f}"
        for s in result.stages
    ]
    how = "one process"
    if result.world_size > 1:
        how = f"{result.world_size} processes, {'sharded' if result.sharded else 'replicated'}"
    lines += ["", f"memory of each GPU ({how}; checkpointing {result.checkpointing}), modelled:"]
    lines += [
        f"  {f.name.replace('_', ' '):<13} {_gigabytes(getattr(result.memory, f.name)):>9}"
        for f in dataclasses.fields(result.memory)
    ]
    lines += [
        f"  {'total':<13} {_gigabytes(result.memory_total):>9} of "
        f"{_gigabytes(result.gpu_memory)}: {'fits' if result.fits else 'does NOT fit'} "
        f"(a plan may fill {USABLE:.0%} of it, {_gigabytes(round(USABLE * result.gpu_memory))})"
    ]
    return "\n".join([*lines, result.advice] if result.advice else lines)


def _memory(run: Run, checkpointing: str, sharding: int) -> MemoryPlan:
    """Of the longest forward pass, with the states shared by `sharding` ranks."""
    return memory_plan(
        run.model,
        tokens=run.train.micro_rows * max(plan.row_length for plan in run.stages),
        checkpointing=checkpointing,
        world_size=sharding,
        optimizer_bytes=_optimizer_bytes(run),
        activation_bytes=4 if run.train.dtype == "float32" else 2,
    )


def _optimizer_bytes(run: Run) -> int:
    """Per parameter: two float32 moments in AdamW; one in Muon, which takes the layers."""
    if run.train.optimizer == "adamw":
        return 8
    layers = parameter_count(run.model, embeddings=False) / parameter_count(run.model)
    return math.ceil(8 - 4 * layers)


def _fits(memory: MemoryPlan, gpu_memory: int) -> bool:
    return memory.total <= USABLE * gpu_memory


def _advice(run: Run, checkpointing: str, gpu_memory: int, world_size: int) -> str:
    """The mildest change that makes the run fit, or that none does."""
    dtype = "float32" if run.train.dtype == "float32" else "bfloat16"
    decided = dataclasses.replace(run.train, checkpointing=checkpointing, dtype=dtype)
    for changed, ranks, words in _milder(decided, world_size):
        run = dataclasses.replace(run, train=changed)
        memory = _memory(run, changed.checkpointing, ranks if changed.parallel == "fsdp" else 1)
        if _fits(memory, gpu_memory):
            return f"It fits with {words} ({_gigabytes(memory.total)})."
    return (
        "Nothing here makes it fit: take a smaller model, or shorter rows (pack again, or "
        "train.max_length, which loses tokens)."
    )


def _milder(train: TrainConfig, world_size: int) -> Iterator[tuple[TrainConfig, int, str]]:
    """Settings that need less and less memory, each with all changes before it."""
    sets: list[str] = []
    changes: dict[str, Any] = {"dtype": "bfloat16", "checkpointing": "full", "micro_rows": 1}
    for name, value in changes.items():
        if getattr(train, name) != value:
            train = dataclasses.replace(train, **{name: value})
            sets.append(f"--set train.{name}={value}")
            yield train, world_size, " ".join(sets)
    train = dataclasses.replace(train, parallel="fsdp", optimizer="adamw")
    sets.append("--set train.parallel=fsdp")
    ranks = max(2, world_size)
    while ranks <= 1024:
        yield train, ranks, f"{' '.join(sets)} on {ranks} GPUs"
        ranks *= 2


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
