"""The training loop: rows in, checkpoints and metrics out, one process, readable top to bottom.

Everything that decides a step (weights, optimizer, random state, position in the data) is in a
checkpoint, so a resumed run repeats what the uninterrupted one would have done, bit for bit on one
machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.load import Manifest, PackedRow, ShardDataset, read_manifest
from codeflow.train import checkpoint
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.errors import TrainingError
from codeflow.train.flops import parameter_count, training_flops
from codeflow.train.hf import load_weights
from codeflow.train.loss import IGNORE
from codeflow.train.metrics import Metrics, say
from codeflow.train.model import LoopCoder
from codeflow.train.optim import learning_rate, make_optimizer, set_learning_rate
from codeflow.train.recipe import RunConfig, TrainConfig
from codeflow.train.resolve import resolve


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: Optimizer updates in total, those before a resume included.
        first_loss, last_loss: Mean loss per target of the first and last step, in nats.
        first_losses_mean, last_losses_mean: The same over the first and last 10 steps.
        tokens: Tokens trained on, in total.
        tokens_cropped: Tokens that `train.max_length` cut off, in total.
        seconds: Wall time of this process in the loop.
        parameters: Of the model, embeddings included.
        checkpoint: Folder of the last checkpoint.
    """

    steps: int
    first_loss: float
    last_loss: float
    first_losses_mean: float
    last_losses_mean: float
    tokens: int
    tokens_cropped: int
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

    def add(self, loss: float, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens
        self.first_losses = [*self.first_losses, loss][:10]
        self.last_losses = [*self.last_losses, loss][-10:]


def run(
    shards: str | Path,
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
        shards: Dataset folder, shards folder or manifest.
        out: Folder of the run: `metrics.jsonl` and `checkpoints/`.
        steps: Overrides `train.steps`.
        size: A named model size, under what `config` and `overrides` say.
        config: TOML file with sections `[model]` and `[train]`.
        overrides: `section.key=value` strings, strongest.
        resume: Continue from the newest checkpoint of `out`.

    Raises:
        UsageError: Settings that do not exist or do not fit the data.
        ShardError: Data missing or damaged.
        CodeflowError: Anything else that stops a run on purpose.
    """
    manifest = read_manifest(shards)
    settings = resolve(manifest, steps=steps, size=size, config=config, overrides=overrides)
    return train(manifest, Path(out), settings, resume=resume)


def train(
    manifest: Manifest, out: Path, settings: RunConfig, *, resume: bool = False
) -> TrainResult:
    """Train with resolved settings; see `run`."""
    config, folder = settings.train, out / "checkpoints"
    found = checkpoint.latest(folder)
    if found and not resume:
        raise UsageError(f"{out}: holds a run ({found.name}); add --resume, or use another --out")
    if resume and not found:
        say(f"{out}: no checkpoint to resume from; starting at step 0")
    device = _device(config.device)
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = LoopCoder(settings.model, backend=config.backend, dtype=dtype, seed=config.seed)
    model.to(device)
    optimizer = make_optimizer(model, config)
    stream = ShardDataset(manifest, seed=config.seed, epochs=None)
    progress = Progress()
    if found:
        progress = _restore(found, model, optimizer, stream)
    out.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(out / "metrics.jsonl", resumed_at=progress.step)
    _introduce(settings, manifest, device, found)

    rows = iter(stream)
    start = logged = time.perf_counter()
    tokens_logged = flops_logged = 0
    while progress.step < config.steps:
        lr = learning_rate(config, progress.step)
        set_learning_rate(optimizer, lr)
        batch = _take(rows, config, progress)
        # Normalised by the targets of the whole step, so how it is cut into passes cannot matter.
        targets = sum(int((row.labels != IGNORE).sum()) for row in batch)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for i in range(0, len(batch), config.micro_rows):
            ids, labels, docs = collate(batch[i : i + config.micro_rows], device)
            output = model(ids, docs, labels)
            loss = output.loss / max(1, targets)
            torch.autograd.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        step_loss, step_norm = torch.stack([total, norm]).tolist()  # the one sync of a step
        _require_finite(step_loss, step_norm, progress.step, batch)
        optimizer.step()

        doc_lens = [n for row in batch for n in row.doc_lens.tolist()]
        progress.add(step_loss, sum(doc_lens))
        tokens_logged += sum(doc_lens)
        flops_logged += training_flops(settings.model, doc_lens)
        step, last = progress.step, progress.step == config.steps
        if step % config.log_every == 0 or step == 1 or last:
            now = time.perf_counter()
            gate = output.gate_means.mean().item() if output.gate_means.numel() else None
            metrics.log(
                {
                    "step": step,
                    "loss": step_loss,
                    "learning_rate": lr,
                    "grad_norm": step_norm,
                    "targets": targets,
                    "tokens": progress.tokens,
                    "tokens_cropped": progress.tokens_cropped,
                    "epoch": stream.epoch,
                    "gate_mean": gate,
                    "tokens_per_second": tokens_logged / (now - logged),
                    "flops_per_second": flops_logged / (now - logged),
                    "seconds": now - start,
                }
            )
            say(
                f"step {step}/{config.steps}  loss {step_loss:.4f}  norm {step_norm:.2f}  "
                f"lr {lr:.2e}  {tokens_logged / (now - logged):,.0f} tok/s"
            )
            logged, tokens_logged, flops_logged = now, 0, 0
        if step % config.checkpoint_every == 0 or last:
            found = _save(folder, model, optimizer, stream, progress, config)
    return _result(progress, settings.model, found, time.perf_counter() - start)


def collate(
    rows: Sequence[PackedRow], device: torch.device | str
) -> tuple[Tensor, Tensor, Documents]:
    """Lay rows one after another: `(input_ids (T,), labels (T,), documents)` on the device."""
    ids = torch.cat([row.input_ids for row in rows]).to(device, non_blocking=True)
    labels = torch.cat([row.labels for row in rows]).to(device, non_blocking=True)
    return ids, labels, Documents.of([n for row in rows for n in row.doc_lens.tolist()], device)


def _take(rows: Iterator[PackedRow], config: TrainConfig, progress: Progress) -> list[PackedRow]:
    batch = [next(rows) for _ in range(config.batch_rows)]
    if config.max_length is None:
        return batch
    cropped = [row.cropped(config.max_length) for row in batch]
    progress.tokens_cropped += sum(len(r.input_ids) for r in batch)
    progress.tokens_cropped -= sum(len(r.input_ids) for r in cropped)
    return cropped


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"train.device={name}: not usable here: {e}") from e


def _require_finite(loss: float, norm: float, step: int, batch: list[PackedRow]) -> None:
    if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the weights were not touched. "
            "Resume with a lower train.learning_rate or a longer train.warmup_steps. "
            f"Rows of this step: {[row.row_id for row in batch]}."
        )


def _save(
    folder: Path,
    model: LoopCoder,
    optimizer: torch.optim.Optimizer,
    stream: ShardDataset,
    progress: Progress,
    config: TrainConfig,
) -> Path:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    state = {
        "optimizer": optimizer.state_dict(),
        "loader": stream.state_dict(),
        "random": random,
        "progress": dataclasses.asdict(progress),
    }
    return checkpoint.save(folder, progress.step, model, state, keep=config.keep_checkpoints)


def _restore(
    found: Path, model: LoopCoder, optimizer: torch.optim.Optimizer, stream: ShardDataset
) -> Progress:
    checkpoint.require_config(found, model.config)
    load_weights(model, found)
    state = checkpoint.load_state(found)
    optimizer.load_state_dict(state["optimizer"])
    stream.load_state_dict(state["loader"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return Progress(**state["progress"])


def _introduce(
    settings: RunConfig, manifest: Manifest, device: torch.device, found: Path | None
) -> None:
    body = parameter_count(settings.model, embeddings=False)
    say(
        f"LoopCoder: {parameter_count(settings.model) / 1e6:.1f} M parameters "
        f"({body / 1e6:.1f} M without embeddings), {settings.model.loop_num} loops, {device}, "
        f"{settings.train.dtype}; {manifest.rows:,} rows, {manifest.tokens:,} tokens"
        + (f"; resumed from {found.name}" if found else "")
    )
    limit = settings.train.max_length
    if limit is not None and limit < manifest.length:
        say(f"rows are cropped to {limit:,} of up to {manifest.length:,} tokens")


def _result(
    progress: Progress, model: ModelConfig, found: Path | None, seconds: float
) -> TrainResult:
    first, last = progress.first_losses, progress.last_losses
    return TrainResult(
        steps=progress.step,
        first_loss=first[0],
        last_loss=last[-1],
        first_losses_mean=sum(first) / len(first),
        last_losses_mean=sum(last) / len(last),
        tokens=progress.tokens,
        tokens_cropped=progress.tokens_cropped,
        seconds=seconds,
        parameters=parameter_count(model),
        checkpoint=str(found),
    )
