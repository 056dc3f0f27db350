from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from shard_factory import stdlib_texts, text_rows, write_shards
from small_runs import SMALL_ARGUMENTS, lines, losses, small

from codeflow.cli import cli
from codeflow.errors import RecipeError
from codeflow.train.__main__ import main
from codeflow.train.trainer import TrainResult


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = text_rows(stdlib_texts(), 64, 12)
    return write_shards(tmp_path_factory.mktemp("cli") / "data", rows, length=64)


def test_module(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    base = ["--shards", str(data / "shards"), *out, *SMALL_ARGUMENTS]
    assert main([*base, "--steps", "2", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert set(result) == {f.name for f in dataclasses.fields(TrainResult)}
    assert "step 2/2" in printed.err
    assert main([*base, "--steps", "3"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main([*base, "--steps", "3", "--resume"]) == 0
    assert capsys.readouterr().out.startswith("3 steps")
    assert main(["--shards", str(tmp_path), *out]) == 1
    assert main([*base, "--set", "train.stpes=1"]) == RecipeError.exit_code
    assert main(["--shards", str(data)]) == 2
    assert "--out" in capsys.readouterr().err


def test_command(data: Path, tmp_path: Path) -> None:
    base = ["train", "--shards", str(data), "--out", str(tmp_path / "out"), *SMALL_ARGUMENTS]
    done = CliRunner().invoke(cli, [*base, "--steps", "2", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["steps"] == 2
    done = CliRunner().invoke(cli, [*base, "--steps", "3", "--resume"], catch_exceptions=False)
    assert done.stdout.startswith("3 steps")


@pytest.mark.parametrize("call", ["module", "command"])
def test_dry_run_writes_and_allocates_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    out = tmp_path / "out"
    base = ["--shards", str(data), "--out", str(out), "--size", "40b", "--dry-run"]
    more = ["--gpu-memory", "80", "--world-size", "64", "--json"]

    def printed(arguments: list[str]) -> str:
        if call == "command":
            return CliRunner().invoke(cli, ["train", *arguments], catch_exceptions=False).stdout
        assert main(arguments) == 0
        return capsys.readouterr().out

    result = json.loads(printed([*base, *more]))
    assert result["parameters"] > 3e10
    assert (result["gpu_memory"], result["world_size"]) == (80 * 10**9, 64)
    assert result["fits"] is True
    assert sum(result["memory"].values()) == result["memory_total"]
    assert result["stages"][0]["steps"] == 200
    assert "does NOT fit" in printed(base)
    assert not out.exists()


def test_the_example_recipe_is_valid(data: Path, tmp_path: Path) -> None:
    """Every setting of the shipped recipes exists, with other data in the place of theirs."""
    pipelines = Path(__file__).parents[2] / "pipelines"
    found = sorted(pipelines.glob("train-*.toml"))
    assert found
    for file in found:
        for link in ("data-8k", "data-32k", "data-128k", "data-sft"):
            target = tmp_path / link
            if not target.exists():
                target.symlink_to(data)
        (tmp_path / file.name).write_text(file.read_text())
        done = CliRunner().invoke(
            cli, ["train", "--recipe", str(tmp_path / file.name), "--dry-run", "--json"]
        )
        assert done.exit_code == 0, done.exception
        assert json.loads(done.stdout)["parameters"] > 5e8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(data: Path, tmp_path: Path, strategy: str) -> None:
    """Same global batches, same losses; rank 0 alone prints and writes; resumes on one process."""
    more = ["train.batch_rows=4", "train.holdout=0.2", "train.evaluate_every=3"]
    said = [*SMALL_ARGUMENTS, "--set", f"train.parallel={strategy}"]
    said += [part for setting in more for part in ("--set", setting)]
    out = tmp_path / "two"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "codeflow.train", "--shards", str(data), "--out", str(out), "--steps", "6",
         "--json", *said],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    one = small(data, tmp_path / "one", 6, *more)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert result["heldout_loss"] == pytest.approx(one.heldout_loss, rel=1e-4)
    for name in ("tokens", "targets", "epoch"):
        assert [m[name] for m in lines(out)] == [m[name] for m in lines(tmp_path / "one")]
    for folder in (out, tmp_path / "one"):
        assert small(data, folder, 8, *more, resume=True).steps == 8
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_folder_that_cannot_be_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is made, in one sentence."""
    file = tmp_path / "list.txt"
    file.touch()

    def refused(out: Path, message: str) -> None:
        base = ["--shards", str(data), "--steps", "1", *SMALL_ARGUMENTS]
        assert main([*base, "--out", str(out)]) == 2
        assert f"--out {out}: {message}" in capsys.readouterr().err

    refused(file, "there is a file")
    refused(file / "run", "there is a file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind root
    refused(tmp_path, "no permission to write there")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(tmp_path / "run", "cannot be made: Permission denied")
