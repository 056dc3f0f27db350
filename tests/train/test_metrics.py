from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from codeflow.errors import UsageError
from codeflow.train.metrics import Metrics, TensorBoard, WeightsAndBiases, duration, scalars


def test_metrics_of_a_killed_run_lose_their_tail(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Metrics(file, resumed_at=2).log({"step": 3, "new": True})
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'
    Metrics(file)
    assert file.read_text() == ""


def test_lines_are_strict_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    Metrics(file).log({"step": 1, "loss": math.nan, "rms": [1.0, math.inf], "mfu": None})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "rms": [1.0, None], "mfu": None,
    }  # fmt: skip


def test_scalars_are_flat() -> None:
    line = {"step": 3, "stage": "sft", "mfu": None, "loss": 0.5, "gate": [0.25, 0.75], "a": []}
    assert scalars(line) == {"step": 3, "loss": 0.5, "gate/0": 0.25, "gate/1": 0.75}


def test_durations() -> None:
    said = [duration(seconds) for seconds in (0.4, 61, 3599.6, 90061)]
    assert said == ["0:00", "1:01", "1:00:00", "25:01:01"]


def fake_tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_tensorboard_gets_every_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_tensorboard(monkeypatch)
    metrics = Metrics(tmp_path / "m.jsonl", 4, [TensorBoard(tmp_path / "tb", 4)])
    metrics.log({"step": 5, "loss": 2.0, "gate": [0.5]})
    metrics.close()
    assert calls == [("tb", 5), ("step", 5, 5), ("loss", 2.0, 5), ("gate/0", 0.5, 5), "closed"]


def test_weights_and_biases_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[Any] = []

    class FakeRun:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((numbers, step))

        def finish(self) -> None:
            logged.append("finished")

    module = ModuleType("wandb")
    module.init = lambda **named: started.append(named) or FakeRun()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        sink = WeightsAndBiases("loops", tmp_path, {"train": {"seed": 1}})
    sink.log({"step": 5, "loss": 2.0})
    sink.close()
    assert started[0] == started[1]
    assert (started[0]["project"], started[0]["resume"]) == ("loops", "allow")
    assert started[0]["config"] == {"train": {"seed": 1}}
    assert logged == [({"step": 5, "loss": 2.0}, 5), "finished"]


def test_missing_packages_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"train\.tensorboard.*pip install tensorboard"):
        TensorBoard(tmp_path, 0)
    with pytest.raises(UsageError, match=r"train\.wandb_project.*pip install wandb"):
        WeightsAndBiases("loops", tmp_path, {})
