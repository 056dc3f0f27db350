"""Where numbers of a run go: JSON lines for programs, one line of text for people.

TensorBoard and Weights & Biases get the same numbers, where they are asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from codeflow.errors import UsageError


class Sink(Protocol):
    """Something else that wants the numbers."""

    def log(self, numbers: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """`metrics.jsonl` of a run, one object per logged step or evaluation.

    Args:
        file: Made when absent.
        resumed_at: Lines of later steps are dropped: a run that is resumed does them again.
            0 starts an empty file.
        sinks: Get every line, too.
    """

    def __init__(self, file: Path, resumed_at: int = 0, sinks: Sequence[Sink] = ()) -> None:
        kept = []
        if resumed_at and file.exists():
            for line in file.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    break  # the line a killed run was writing; nothing follows it
        file.write_text("".join(kept))
        self._file, self._sinks = file, sinks

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Append one line, with its `step`; it is on its way to disk when this returns."""
        with self._file.open("a") as f:
            f.write(json.dumps(_finite(dict(numbers))) + "\n")
        for sink in self._sinks:
            sink.log(numbers)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class TensorBoard:
    """Event files in `folder`; entries of lists become scalars of their own.

    Raises:
        UsageError: The package is not installed.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UsageError(_missing("train.tensorboard", "tensorboard")) from e
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def log(self, numbers: Mapping[str, Any]) -> None:
        for name, value in scalars(numbers).items():
            self._writer.add_scalar(name, value, numbers["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project there; a resumed run goes on in the same one.

    Args:
        project: Its name.
        out: Folder of the run, which keeps the run's id.
        settings: What the run was started with.

    Raises:
        UsageError: The package is not installed.
    """

    def __init__(self, project: str, out: Path, settings: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")  # optional, and without types here
        except ImportError as e:
            raise UsageError(_missing("train.wandb_project", "wandb")) from e
        id_file = out / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=out.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(out),
            config=dict(settings),
        )

    def log(self, numbers: Mapping[str, Any]) -> None:
        self._run.log(scalars(numbers), step=numbers["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by flat name: `loss: [a, b]` becomes `loss/0` and `loss/1`."""
    flat: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, list):
            flat |= scalars({f"{name}/{i}": item for i, item in enumerate(value)})
        elif isinstance(value, (int, float)):
            flat[name] = value
    return flat


def say(text: str) -> None:
    """A line for a person, on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """For people: `1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing(setting: str, package: str) -> str:
    return f"{setting} needs {package}: pip install {package}"
