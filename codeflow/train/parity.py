"""Compare the model with numbers recorded from another implementation.

    python -m codeflow.train.parity FOLDER [--backend NAME] [--device cpu|cuda]

FOLDER holds `config.json`, `model.safetensors`, `inputs.safetensors` (`input_ids`, `labels` (B, T),
not shifted, -100 ignored; optionally a packed row) and `expected.safetensors`. Every recorded
number is compared, or listed as not compared; nothing is passed over in silence. A back end that
runs in half precision only (`varlen`) is compared there. Exit code 0: all within tolerance, 1: not,
2: unusable input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codeflow.errors import CodeflowError, UsageError
from codeflow.train.attention import Documents
from codeflow.train.backends import BACKENDS
from codeflow.train.hf import load_model
from codeflow.train.loss import IGNORE
from codeflow.train.model import LoopCoder, Output

LOGITS, LOSS, GRADIENT, GATE, ADAMW, BFLOAT16 = 1e-4, 1e-5, 1e-4, 1e-5, 1e-4, 2.5e-2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """One comparison; `value` is None when it could not be made, and `note` says why."""

    name: str
    value: float | None
    tolerance: float
    note: str

    @property
    def passed(self) -> bool:
        return self.value is None or self.value <= self.tolerance  # False for NaN, as it should be


@dataclass(frozen=True, eq=False)
class Batch:
    """A flat batch with shifted labels."""

    input_ids: Tensor
    labels: Tensor
    docs: Documents

    @classmethod
    def of_rows(
        cls, input_ids: Tensor, labels: Tensor, device: torch.device | str = "cpu"
    ) -> Batch:
        """From (B, T) with labels that are not shifted; each row is a document."""
        shifted = torch.full_like(labels, IGNORE)
        shifted[:, :-1] = labels[:, 1:]
        docs = Documents.of([input_ids.shape[1]] * input_ids.shape[0], device)
        return cls(input_ids.flatten().to(device), shifted.flatten().to(device), docs)

    @classmethod
    def of_packed(
        cls, input_ids: Tensor, cu_seqlens: Tensor, device: torch.device | str = "cpu"
    ) -> Batch:
        """From a packed row; every token but the first of a document is a target."""
        ids = input_ids.flatten()
        labels = ids.roll(-1)
        labels[cu_seqlens[1:].long() - 1] = IGNORE
        docs = Documents.of(cu_seqlens.diff().tolist(), device)
        return cls(ids.to(device), labels.to(device), docs)

    def run(self, model: LoopCoder) -> tuple[Output, Tensor]:
        """The model's output and the mean loss per target."""
        out: Output = model(self.input_ids, self.docs, self.labels)
        return out, out.loss / (self.labels != IGNORE).sum().clamp(min=1)


@dataclass(frozen=True)
class Setup:
    """Which model is compared, and where it runs."""

    folder: Path
    backend: str
    device: str

    def model(self, dtype: torch.dtype = torch.float32) -> LoopCoder:
        model: LoopCoder = load_model(self.folder, backend=self.backend, dtype=dtype)
        return model.to(self.device)


def compare(folder: str | Path, backend: str = "sdpa", device: str = "cpu") -> list[Difference]:
    """All comparisons that a folder and a back end allow.

    Raises:
        CodeflowError: The folder, or the back end, cannot be used.
    """
    setup = Setup(Path(folder), backend, device)
    inputs = _read(setup.folder / "inputs.safetensors")
    expected = _read(setup.folder / "expected.safetensors")
    found: list[Difference] = []
    try:
        batch = Batch.of_rows(inputs["input_ids"], inputs["labels"], device)
        if backend != "varlen":
            found += _compare_batch(setup, batch, expected)
            found += _compare_packed(setup, inputs, expected)
            found += _compare_adamw(setup, batch, expected)
        found += _compare_bfloat16(setup, batch, expected)
    except (KeyError, RuntimeError, IndexError) as e:
        raise UsageError(f"{folder}: recorded data do not fit the model: {e}") from e
    return found + _unused(expected, found)


def _compare_batch(s: Setup, b: Batch, e: Tensors) -> Iterator[Difference]:
    model = s.model()
    out, loss = b.run(model)
    yield _largest("logits", model.logits(out.hidden), e, LOGITS)
    yield _largest("hidden_final_norm", out.hidden, e, LOGITS)
    yield _largest("loss", loss, e, LOSS)
    yield _largest("gate_mean", out.gate_means.mean(-1), e, GATE)
    yield _largest("gate_mean_per_head", out.gate_means, e, GATE)
    torch.autograd.backward(loss)
    yield from _gradients(model, e, "grad.", "grad_global_l2")


def _compare_packed(s: Setup, inputs: Tensors, e: Tensors) -> Iterator[Difference]:
    if "packed_input_ids" not in inputs:
        yield Difference("packed_input_ids", None, LOGITS, "absent")
        return
    b = Batch.of_packed(inputs["packed_input_ids"], inputs["packed_cu_seqlens"], s.device)
    yield _largest("packed_position_ids", b.docs.positions, inputs, 0.0)
    model = s.model()
    out, loss = b.run(model)
    yield _largest("packed_logits", model.logits(out.hidden), e, LOGITS)
    yield _largest("packed_loss", loss, e, LOSS)
    torch.autograd.backward(loss)
    yield from _gradients(model, e, "packed_grad.", "packed_grad_global_l2")


def _compare_adamw(s: Setup, b: Batch, e: Tensors) -> Iterator[Difference]:
    """Full-batch AdamW with decay on *all* parameters, as recorded; loss before each step."""
    model = s.model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    losses, norms = [], []
    for _ in range(max(len(e.get(key, ())) for key in ("adamw_losses", "adamw_grad_norms"))):
        optimizer.zero_grad()
        loss = b.run(model)[1]
        torch.autograd.backward(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    yield _largest("adamw_losses", torch.tensor(losses), e, ADAMW)
    yield _largest("adamw_grad_norms", torch.tensor(norms), e, ADAMW)


def _compare_bfloat16(s: Setup, b: Batch, e: Tensors) -> Iterator[Difference]:
    """Against the float32 logits and against another implementation's bfloat16 ones."""
    model = s.model(torch.bfloat16)
    with torch.no_grad():
        out, loss = b.run(model)
        logits = model.logits(out.hidden).float()
    yield _relative("logits", logits, e, BFLOAT16, name="logits in bfloat16")
    yield _relative("logits_bf16_model", logits, e, BFLOAT16)
    yield _relative("loss_bf16_model", loss, e, BFLOAT16)


def _gradients(model: LoopCoder, e: Tensors, prefix: str, norm: str) -> Iterator[Difference]:
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    total = torch.stack([g.norm() for g in named.values()]).norm()
    yield _relative(norm, total, e, GRADIENT)
    recorded = [key for key in e if key.startswith(prefix)]
    if not recorded:
        yield Difference(f"{prefix}*", None, GRADIENT, "absent")
    for key in recorded:
        name = key.removeprefix(prefix)
        if name not in named:
            yield Difference(key, float("inf"), GRADIENT, "the model has no such gradient")
        else:
            yield _relative(key, named[name], e, GRADIENT)


def _largest(key: str, ours: Tensor, e: Tensors, tolerance: float) -> Difference:
    if key not in e:
        return Difference(key, None, tolerance, "absent")
    difference = ours.detach().float().flatten().cpu() - e[key].float().flatten()
    return Difference(key, float(difference.abs().max()), tolerance, "max abs")


def _relative(
    key: str, ours: Tensor, e: Tensors, tolerance: float, name: str | None = None
) -> Difference:
    if key not in e:
        return Difference(name or key, None, tolerance, "absent")
    theirs = e[key].float().flatten()
    error = (ours.detach().float().flatten().cpu() - theirs).norm() / theirs.norm().clamp(min=1e-12)
    return Difference(name or key, float(error), tolerance, "rel L2")


def _unused(expected: Tensors, found: list[Difference]) -> list[Difference]:
    seen = {d.name for d in found}
    return [Difference(k, None, 0.0, "not compared") for k in sorted(expected.keys() - seen)]


def _read(file: Path) -> Tensors:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as e:
        raise UsageError(f"{file}: cannot be read: {e}") from e


def main(arguments: list[str] | None = None) -> int:
    """Print the table of differences; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m codeflow.train.parity")
    parser.add_argument("folder", help="config.json, model, inputs and expected.safetensors")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="sdpa")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    try:
        found = compare(options.folder, options.backend, options.device)
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return UsageError.exit_code
    width = max(len(d.name) for d in found)
    for d in found:
        value = f"{d.value:9.2e}" if d.value is not None else f"{'-':>9}"
        verdict = "ok" if d.passed else "FAILED"
        if d.value is None:
            verdict = "-"
        print(f"{d.name:{width}}  {value}  <= {d.tolerance:7.1e}  {d.note:12}  {verdict}")
    compared = [d for d in found if d.value is not None]
    failed = [d for d in compared if not d.passed]
    print(f"{len(compared)} compared, {len(failed)} failed, {len(found) - len(compared)} absent")
    return 1 if failed or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
