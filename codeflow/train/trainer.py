"""The training loop: rows in, checkpoints and metrics out, readable top to bottom.

The same loop runs in one process and in many; `parallel` hides the difference. Everything that
decides a step (weights, optimizer, random state, position in the data, what was skipped) is in a
checkpoint, so a resumed run repeats what the uninterrupted one would have done, bit for bit on one
machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from codeflow.errors import UsageError
from codeflow.load import Manifest, ShardDataset
from codeflow.train import checkpoint, parallel, trained_on
from codeflow.train.batches import Batch, batches, collate
from codeflow.train.errors import TrainingError
from codeflow.train.estimate import choose_checkpointing
from codeflow.train.evaluate import Evaluation, evaluate, token_bytes
from codeflow.train.flops import parameter_count
from codeflow.train.hf import initialise_from
from codeflow.train.metrics import Metrics, say
from codeflow.train.model import LoopCoder, Output
from codeflow.train.optim import forget_moments, make_optimizers, set_learning_rate
from codeflow.train.parallel import World
from codeflow.train.progress import (
    Progress,
    TrainResult,
    Window,
    chosen_sinks,
    introduce,
    model_statistics,
    peak_memory,
    step_line,
)
from codeflow.train.resolve import Run, StagePlan, resolve
from codeflow.train.schedule import learning_rate
from codeflow.train.signals import Stopped, StopSignals
from codeflow.train.skip import SkipRule
from codeflow.train.trained_on import TrainedOn

__all__ = ["TrainResult", "collate", "run", "train"]


@dataclass
class Job:
    """What all stages of a run share.

    Attributes:
        module: What to call: the model, or what `parallel` wrapped around it.
        metrics: On rank 0 alone.
        before: What the weights that the run began with were trained on.
        saved: The last checkpoint.
    """

    run: Run
    world: World
    model: LoopCoder
    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    rule: SkipRule
    signals: StopSignals
    metrics: Metrics | None
    folder: Path
    before: list[TrainedOn]
    saved: Path | None
    started: float


def run(
    shards: str | Path | Manifest | None,
    out: str | Path,
    *,
    steps: int | None = None,
    size: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> TrainResult:
    """Train from what a user says on a command line.

    Args:
        shards: Dataset folder, shards folder or manifest; None when every stage names its own.
        out: Folder of the run: `metrics.jsonl` and `checkpoints/`.
        steps: Length of a run without stages.
        size: A named model size, under what `config` and `overrides` say.
        config: TOML recipe with `[model]`, `[train]` and `[[stage]]` tables.
        overrides: `section.key=value` strings, strongest.
        resume: Continue from the newest checkpoint of `out`.

    Raises:
        UsageError: Settings that do not exist or do not fit the data.
        ShardError: Data missing or damaged.
        Stopped: By a signal; a checkpoint was saved.
        CodeflowError: Anything else that stops a run on purpose.
    """
    resolved = resolve(
        shards,
        steps=steps,
        size=size,
        config=config,
        overrides=overrides,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),  # torchrun's
    )
    world = parallel.start(resolved.train.device)
    try:
        return train(resolved, Path(out), world, resume=resume)
    finally:
        parallel.stop(world)


def train(run: Run, out: Path, world: World, *, resume: bool = False) -> TrainResult:
    """Train a resolved run; every process of `world` calls it. See `run`."""
    config, folder = run.train, out / "checkpoints"
    checkpoint.make_run_folder(out, world)
    found = parallel.from_rank_0(checkpoint.latest(folder), world)
    if found and not resume:
        raise UsageError(f"{out}: holds a run ({found.name}); add --resume, or use another --out")
    torch.manual_seed(config.seed)
    model = _build_model(run, world, fresh=found is None)
    module = parallel.distribute(
        model,
        world,
        strategy=config.parallel,
        dtype=model.dtype,
        reshard_after_forward=config.reshard,
    )
    if config.compile:
        model.compile_layers()
    optimizers = make_optimizers(model, config)
    progress, rule = Progress(), SkipRule(config.skip_sigmas)
    loader: dict[str, Any] = {}
    if found:
        checkpoint.require_config(found, run.model)
        state = checkpoint.restore(found, model, optimizers, world)
        progress, loader = Progress(**state["progress"]), state["loader"]
        rule.load_state_dict(state["skip"])
        run.require_stage(state["stage"], progress.step, found)
    source = found or config.initialise_from
    with contextlib.ExitStack() as closing:
        metrics = None
        if world.rank == 0:
            sinks = chosen_sinks(run, out, progress.step)
            metrics = Metrics(out / "metrics.jsonl", progress.step, sinks)
            closing.callback(metrics.close)
            introduce(run, world, found)
            if resume and not found:
                say("no checkpoint to resume from; starting at step 0")
        signals = closing.enter_context(StopSignals())
        job = Job(
            run, world, model, module, optimizers, progress, rule, signals, metrics, folder,
            before=trained_on.read(Path(source)) if source else [],
            saved=found, started=time.perf_counter(),
        )  # fmt: skip
        for plan in run.stages:
            if progress.step < plan.end:
                _train_stage(job, plan, loader)
    return _result(job)


def _train_stage(job: Job, plan: StagePlan, loader: dict[str, Any]) -> None:
    """Train a stage from where the run is; `loader` is the state of its data, if it has begun."""
    config, progress, rule = job.run.train, job.progress, job.rule
    stream = ShardDataset(
        plan.manifest,
        seed=config.seed,
        rank=job.world.rank,
        world_size=job.world.world_size,
        epochs=None,
        holdout=plan.holdout,
    )
    if progress.step > plan.first:
        stream.load_state_dict(loader)
    else:
        rule.forget()
        if plan.stage.reset_optimizer:
            forget_moments(job.optimizers)
    steps = batches(stream, plan, config.micro_rows, job.world)
    batch = next(steps)
    window = Window(time.perf_counter())
    while progress.step < plan.end:
        lr = learning_rate(plan.stage, progress.step - plan.first, plan.steps)
        set_learning_rate(job.optimizers, lr)
        sums, output = _forward_and_backward(job, batch)
        following = next(steps)  # read while the device works
        loss, norm, stopping = sums.tolist()  # the one wait for the device
        targets, tokens, cropped = batch.counts.tolist()  # before the optimizer gives it work again
        skip = rule.skips(loss, norm)
        if not skip:
            for optimizer in job.optimizers:
                optimizer.step()
        for optimizer in job.optimizers:
            optimizer.zero_grad(set_to_none=True)
        progress.add(loss, tokens, cropped)
        window.add(batch, job.run.model)

        step, last = progress.step, progress.step == plan.end
        if skip:
            _report_skip(job, batch, loss, norm)
        if step % config.log_every == 0 or step == 1 or last or stopping:
            _log(
                job,
                window,
                {
                    "step": step,
                    "stage": plan.stage.name,
                    "epoch": batch.epoch,
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": lr,
                    "targets": targets,
                    **model_statistics(output),
                },
            )
            window = Window(time.perf_counter())
        paused = time.perf_counter()
        if plan.holdout and (step % config.evaluate_every == 0 or last):
            _evaluate(job, plan)
        if step % config.checkpoint_every == 0 or last or stopping:
            _save(job, plan, batch)
        window.started += time.perf_counter() - paused
        if stopping and step < job.run.steps:
            _stop(job)
        batch = following


def _forward_and_backward(job: Job, batch: Batch) -> tuple[Tensor, Output]:
    """Gradients of a step, clipped: `(loss, their norm before, stop signals seen)`, on the device.

    The loss is normalised by the targets of the whole step on all ranks, so how the step is cut
    into passes and spread over ranks cannot matter.
    """
    targets = batch.counts[0].clamp(min=1)
    loss = torch.zeros((), device=job.world.device)
    for i, (ids, labels, docs) in enumerate(batch.passes, start=1):
        with parallel.accumulate(job.module, last=i == len(batch.passes)):
            output: Output = job.module(ids, docs, labels)
            share = output.loss / targets
            torch.autograd.backward(share)
        loss += share.detach()
    norm = parallel.clip_gradients(job.model, job.run.train.clip_norm, job.world)
    stop = torch.full_like(loss, float(job.signals.caught is not None))
    loss, stop = parallel.total(torch.stack([loss, stop]), job.world)
    return torch.stack([loss, norm, stop]), output


def _build_model(run: Run, world: World, *, fresh: bool) -> LoopCoder:
    """The model; with its first weights where these are needed: on rank 0 of a run that begins."""
    config, memory = run.train, None
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    with torch.device("cpu" if fresh and world.rank == 0 else "meta"):
        model = LoopCoder(
            run.model,
            backend=config.backend,
            dtype=parallel.activation_dtype(config.dtype, world.device),
            seed=config.seed,
            checkpointing=choose_checkpointing(run, memory, world.world_size),
            z_loss=config.z_loss,
        )
    if fresh and config.initialise_from and world.rank == 0:
        initialise_from(model, config.initialise_from, fold=config.fold)
    return model


def _report_skip(job: Job, batch: Batch, loss: float, norm: float) -> None:
    """Say that there was no update; end the run when that happens too often in a row."""
    step, limit = job.progress.step, job.run.train.skip_limit
    if job.metrics:
        say(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: no update")
    if job.rule.in_a_row < limit:
        return
    ids = [row.row_id for row in batch.rows]
    every = sorted(i for part in parallel.from_all_ranks(ids, job.world) for i in part)
    raise TrainingError(
        f"step {step}: loss {loss}, gradient norm {norm}: {limit} steps in a row were not finite "
        "or far out, and the weights were not touched. Resume from the last checkpoint with a "
        "lower train.learning_rate or a longer train.warmup_steps; train.skip_limit is how many "
        f"are allowed. Rows of this step: {every}."
    )


def _log(job: Job, window: Window, numbers: dict[str, Any]) -> None:
    """Complete the numbers of a step by those of the run, and write them; every rank must call."""
    rates = window.rates(job.world)
    if job.metrics is None:
        return
    numbers |= {
        "tokens": job.progress.tokens,
        "tokens_cropped": job.progress.tokens_cropped,
        "skipped": job.rule.skipped,
        **rates,
        "memory_bytes": peak_memory(job.world.device),
        "seconds": time.perf_counter() - job.started,
    }
    job.metrics.log(numbers)
    say(step_line(numbers, job.run, window))


def _evaluate(job: Job, plan: StagePlan) -> None:
    """Score the same held-out rows every time; each rank takes its share of them."""
    world, folder = job.world, plan.manifest.folder
    heldout = ShardDataset(
        plan.manifest,
        rank=world.rank,
        world_size=world.world_size,
        epochs=None,  # as many rows on every rank, were it by starting again
        holdout=plan.holdout,
        part="heldout",
        with_docs=True,
    )
    count = max(1, min(job.run.train.evaluate_rows, heldout.rows) // world.world_size)
    rows = (row.cropped(plan.row_length) for row in itertools.islice(heldout, count))
    try:
        lengths = token_bytes(folder / "tokenizer.json", job.run.model.vocab_size)
    except UsageError:  # a tokenizer whose tokens have no length in bytes
        lengths = None
    mine = evaluate(job.model, rows, world.device, lengths)
    result = sum(parallel.from_all_ranks(mine, world), start=Evaluation())
    job.progress.heldout_loss = result.loss
    if job.metrics:
        named = result.as_metrics()
        job.metrics.log({"step": job.progress.step, "stage": plan.stage.name, **named})
        shown = "  ".join(f"{n.removeprefix('eval/')} {value:.4f}" for n, value in named.items())
        say(f"step {job.progress.step}/{job.run.steps}  held out: {shown}")


def _save(job: Job, plan: StagePlan, batch: Batch) -> None:
    state = {
        "progress": dataclasses.asdict(job.progress),
        "skip": job.rule.state_dict(),
        "stage": {"name": plan.stage.name, "first": plan.first},
        "loader": batch.loader,
    }
    job.saved = checkpoint.save(
        job.folder,
        job.progress.step,
        job.model,
        job.optimizers,
        state,
        keep=job.run.train.keep_checkpoints,
        world=job.world,
        tokenizer=plan.manifest.folder / "tokenizer.json",
        data=_trained_on(job, plan),
    )


def _trained_on(job: Job, plan: StagePlan) -> list[TrainedOn]:
    """What the weights have seen by now; data of several stages are named once."""
    begun = (p for p in job.run.stages if p.first <= plan.first)
    seen = [TrainedOn(str(p.manifest.folder), p.manifest.sha256, p.holdout) for p in begun]
    return list(dict.fromkeys([*job.before, *seen]))


def _stop(job: Job) -> NoReturn:
    caught = job.signals.caught or signal.SIGTERM  # another process may have caught it
    raise Stopped(
        f"stopped by {caught.name} after step {job.progress.step} of {job.run.steps}; "
        f"{job.saved} is saved. Repeat the command with --resume to go on.",
        caught,
    )


def _result(job: Job) -> TrainResult:
    progress = job.progress
    first, last = progress.first_losses or [math.nan], progress.last_losses or [math.nan]
    return TrainResult(
        steps=progress.step,
        first_loss=first[0],
        last_loss=last[-1],
        first_losses_mean=sum(first) / len(first),
        last_losses_mean=sum(last) / len(last),
        heldout_loss=progress.heldout_loss,
        tokens=progress.tokens,
        tokens_cropped=progress.tokens_cropped,
        skipped=job.rule.skipped,
        seconds=time.perf_counter() - job.started,
        parameters=parameter_count(job.run.model),
        checkpoint=str(job.saved),
    )
