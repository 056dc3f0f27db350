"""What an evaluation calls held out was never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shard_factory import random_rows, write_shards
from small_runs import evaluations, killed_at, small

from codeflow.load import read_manifest
from codeflow.train.errors import CheckpointError
from codeflow.train.evaluate import main
from codeflow.train.trained_on import TrainedOn, held_out, read, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = random_rows(20, 32)
    return write_shards(tmp_path_factory.mktemp("trained_on") / "data", rows, length=32)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held a fifth of the rows out, and one that held out none."""
    folder = tmp_path_factory.mktemp("runs")
    small(data, folder / "some", 2, "train.holdout=0.2")
    small(data, folder / "none", 2)
    return folder


def evaluated(run: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert main([str(run), "--shards", str(data), "--device", "cpu", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_rows_that_the_run_held_out(
    runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(runs / "some", data, capsys)
    assert (found["held_out"], found["share"], found["rows"]) == (True, 0.2, 4)
    assert found["loss"] == pytest.approx(evaluations(runs / "some")[-1]["eval/loss"], rel=1e-5)
    less = evaluated(runs / "some", data, capsys, "--holdout", "0.1")
    assert (less["held_out"], less["share"], less["rows"]) == (True, 0.1, 2)
    whole = evaluated(runs / "some", data, capsys, "--all")
    assert (whole["held_out"], whole["share"], whole["rows"]) == (False, None, 20)
    assert (
        whole["which"]
        == "all rows, not held out: all but 0.2 of them are the model's training data"
    )


def test_where_none_were_held_out_all_are_evaluated_and_called_so(
    runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(runs / "none", data, capsys)
    assert (found["held_out"], found["share"], found["rows"]) == (False, None, 20)
    assert main([str(runs / "none"), "--shards", str(data), "--device", "cpu"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "all rows, not held out: they are the model's training data"


@pytest.mark.parametrize(
    ("run", "message"),
    [("some", "held out 0.2 of these rows"), ("none", "held out none of these rows")],
)
def test_more_than_was_held_out_is_refused(
    runs: Path, data: Path, capsys: pytest.CaptureFixture[str], run: str, message: str
) -> None:
    assert main([str(runs / run), "--shards", str(data), "--holdout", "0.3"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--all" in error


def test_other_shards_are_not_called_held_out(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shards(tmp_path / "other", random_rows(10, 32, seed=1), length=32)
    found = evaluated(runs / "some", other, capsys, "--holdout", "0.3")
    assert (found["held_out"], found["share"], found["rows"]) == (None, 0.3, 3)
    assert found["which"] == "0.3 of the rows; whether the model was trained on them is not known"


def test_weights_remember_what_they_began_with(runs: Path, data: Path, tmp_path: Path) -> None:
    """Rows that the second run holds out were trained on by the first."""
    first = runs / "some" / "checkpoints" / "step-00000002"
    more = ("train.holdout=0.4", f"train.initialise_from={first}")
    small(data, tmp_path / "run", 4, *more)
    small(data, tmp_path / "run", 5, *more, resume=True)
    folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert [seen.holdout for seen in read(folder)] == [0.2, 0.4]
    assert held_out(folder, read_manifest(data)) == 0.2


def test_a_resumed_run_knows_its_finished_stages(data: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", random_rows(10, 32, seed=1), length=32)
    stages = "".join(
        f'[[stage]]\nname = "{folder.name}"\nshards = "{folder}"\nsteps = 6\nholdout = {share}\n'
        for folder, share in ((data, 0.1), (other, 0.2))
    )
    (tmp_path / "stages.toml").write_text(stages)
    config = {"config": tmp_path / "stages.toml"}
    killed_at(10, None, tmp_path / "run", None, **config)
    small(None, tmp_path / "run", None, resume=True, **config)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [seen.holdout for seen in read(folders[-1])] == [0.1, 0.2]


def test_a_stage_that_has_not_begun_is_no_training_data(data: Path, tmp_path: Path) -> None:
    small(data, tmp_path, 2)
    (seen,) = read(tmp_path / "checkpoints" / "step-00000002")
    assert seen == TrainedOn(str(data / "shards"), read_manifest(data).sha256, 0.0)


def test_files(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    write(tmp_path, [TrainedOn("a", "b", 0.5)])
    assert read(tmp_path) == [TrainedOn("a", "b", 0.5)]
    for damaged in ("{", "[1]", '[{"shards": 1}]', "7"):
        (tmp_path / "trained_on.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"trained_on\.json: cannot be read"):
            read(tmp_path)
