"""How far a run is, and what is said about it."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codeflow.settings import to_mapping
from codeflow.train import parallel
from codeflow.train.batches import Batch
from codeflow.train.config import ModelConfig
from codeflow.train.flops import (
    parameter_count,
    peak_flops,
    training_flops,
    training_flops_noncausal,
)
from codeflow.train.metrics import Sink, TensorBoard, WeightsAndBiases, duration, say
from codeflow.train.model import Output
from codeflow.train.parallel import World, activation_dtype
from codeflow.train.resolve import Run


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: Steps in total, those before a resume and those without an update included.
        first_loss, last_loss: Mean loss per target of the first and last step, in nats.
        first_losses_mean, last_losses_mean: The same over the first and last 10 steps.
        heldout_loss: Of the last evaluation on held-out rows; None where no rows are held out.
        tokens: Tokens trained on, in total.
        tokens_cropped: Tokens that `train.max_length` cut off, in total.
        skipped: Steps without an update.
        seconds: Wall time of this process in the loop.
        parameters: Of the model, embeddings included.
        checkpoint: Folder of the last checkpoint.
    """

    steps: int
    first_loss: float
    last_loss: float
    first_losses_mean: float
    last_losses_mean: float
    heldout_loss: float | None
    tokens: int
    tokens_cropped: int
    skipped: int
    seconds: float
    parameters: int
    checkpoint: str


@dataclass
class Progress:
    """The counters that a checkpoint carries."""

    step: int = 0
    tokens: int = 0
    tokens_cropped: int = 0
    first_losses: list[float] = dataclasses.field(default_factory=list)
    last_losses: list[float] = dataclasses.field(default_factory=list)
    heldout_loss: float | None = None

    def add(self, loss: float, tokens: int, cropped: int) -> None:
        self.step += 1
        self.tokens += tokens
        self.tokens_cropped += cropped
        if not math.isfinite(loss):
            return
        self.first_losses = [*self.first_losses, loss][:10]
        self.last_losses = [*self.last_losses, loss][-10:]


@dataclass
class Window:
    """Work of this process since the last logged step, and when it began."""

    started: float
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    flops_noncausal: int = 0

    def add(self, batch: Batch, model: ModelConfig) -> None:
        for row in batch.rows:
            lengths = row.doc_lens.tolist()
            self.tokens += sum(lengths)
            self.flops += training_flops(model, lengths)
            self.flops_noncausal += training_flops_noncausal(model, lengths)
        self.steps += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def rates(self, world: World) -> dict[str, float | None]:
        """Work per second of all processes together; every one of them must call.

        The model FLOPs utilisation is None where the device's peak is not known.
        """
        work = torch.tensor([self.tokens, self.flops, self.flops_noncausal], dtype=torch.float32)
        done = parallel.total(work.to(world.device), world).tolist()
        tokens, flops, noncausal = (n / self.seconds for n in done)
        peak = None
        if world.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(world.device))
        peak = peak and peak * world.world_size
        return {
            "tokens_per_second": tokens,
            "flops_per_second": flops,
            "mfu": peak and flops / peak,
            "mfu_noncausal": peak and noncausal / peak,
        }


def step_line(numbers: Mapping[str, Any], run: Run, window: Window) -> str:
    """A logged step for a person; `numbers` are its metrics."""
    step, stage = numbers["step"], f" {numbers['stage']}" if len(run.stages) > 1 else ""
    left = (run.steps - step) * window.seconds / window.steps
    return (
        f"step {step}/{run.steps}{stage}  loss {numbers['loss']:.4f}  "
        f"norm {numbers['grad_norm']:.2f}  lr {numbers['learning_rate']:.2e}  "
        f"{numbers['tokens_per_second']:,.0f} tok/s"
        + (f"  MFU {numbers['mfu']:.1%}" if numbers["mfu"] else "")
        + (f"  {duration(left)} left" if left else "")
    )


def model_statistics(output: Output) -> dict[str, list[float]]:
    """What a pass says about the model: gates by layer, the residual stream by loop."""
    return {
        "gate_mean": output.gate_means.mean((0, 2)).tolist(),
        "gate_std": output.gate_stds.mean((0, 2)).tolist(),
        "residual_rms": output.residual_rms.tolist(),
    }


def introduce(run: Run, world: World, found: Path | None) -> None:
    """Say what is about to be trained."""
    body = parameter_count(run.model, embeddings=False)
    dtype = activation_dtype(run.train.dtype, world.device)
    say(
        f"LoopCoder: {parameter_count(run.model) / 1e6:.1f} M parameters "
        f"({body / 1e6:.1f} M without embeddings), {run.model.loop_num} loops, "
        f"{world.world_size} x {world.device.type}, {str(dtype).removeprefix('torch.')}"
        + (f"; resumed from {found.name}" if found else "")
    )
    for plan in run.stages:
        manifest, limit = plan.manifest, plan.row_length
        say(
            f"stage {plan.stage.name}: {plan.steps:,} steps of {plan.batch_rows:,} rows, "
            f"{plan.epochs:.2f} epochs of {manifest.rows:,} rows ({manifest.tokens:,} tokens)"
            + (f", {plan.holdout:.3g} of them held out" if plan.holdout else "")
        )
        if limit < manifest.length:
            say(f"rows are cropped to {limit:,} of up to {manifest.length:,} tokens")


def chosen_sinks(run: Run, out: Path, resumed_at: int) -> list[Sink]:
    """What gets the metrics beside the JSON lines."""
    sinks: list[Sink] = []
    if run.train.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", resumed_at))
    if run.train.wandb_project:
        settings = {
            "model": to_mapping(run.model),
            "train": to_mapping(run.train),
            "stage": [to_mapping(plan.stage) for plan in run.stages],
        }
        sinks.append(WeightsAndBiases(run.train.wandb_project, out, settings))
    return sinks


def peak_memory(device: torch.device) -> int:
    """Most bytes allocated so far on a GPU; on a CPU, the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
