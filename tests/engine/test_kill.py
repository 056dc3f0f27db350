"""kill -9 at random moments: run again, a build ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_builds import (
    SMALL,
    codeflow,
    command,
    environment,
    fingerprint,
    temporary_files,
    write_list,
)
from processes import all_gone, descendants, running

pytestmark = pytest.mark.slow

KILLS = 10
FIRST = [a for o in SMALL for a in ("--set", o)]
SECOND = ["--set", "filter.min_message_words=4", "--set", "pack.length=8192"]


@pytest.fixture
def arguments(repositories: tuple[Path, Path, Path], tmp_path: Path) -> list[str | Path]:
    listed = write_list(tmp_path / "list", repositories)
    return ["build", "--repos", listed, "--workers", "2", "--out"]


def kill_after(seconds: float, arguments: list[str | Path]) -> bool:
    """Start a build, kill driver and children after a while; False when it was done before."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    family = descendants(process.pid)
    for pid in [process.pid, *family]:
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    assert all_gone(family)
    return process.wait() != 0


def moments(n: int, seconds: float) -> Iterator[float]:
    """A random moment in the n-th slice of a run; earlier ones should the run be over by then."""
    moment = seconds * (n + random.Random(n).random()) / KILLS
    for _ in range(20):
        yield moment
        moment *= 0.8
    pytest.fail("no moment was early enough to kill the build")


def undisturbed(out: Path, arguments: list[str | Path]) -> tuple[dict[str, str], float]:
    started = time.monotonic()
    codeflow(*arguments)
    return fingerprint(out), time.monotonic() - started


@pytest.mark.parametrize("executor", ["local", "inline"])
def test_killed_builds_end_with_the_bytes_of_an_undisturbed_one(
    arguments: list[str | Path], tmp_path: Path, executor: str
) -> None:
    run = [*FIRST, "--executor", executor]
    expected, seconds = undisturbed(tmp_path / "whole", [*arguments, tmp_path / "whole", *run])
    for n, out in enumerate(tmp_path / f"out-{n}" for n in range(KILLS)):
        for moment in moments(n, seconds):
            shutil.rmtree(out, ignore_errors=True)
            if kill_after(moment, [*arguments, out, *run]):
                break
        codeflow(*arguments, out, *run)
        assert fingerprint(out) == expected
        assert temporary_files(out) == []


def test_a_build_killed_again_and_again_gets_there(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    expected, seconds = undisturbed(tmp_path / "whole", [*arguments, tmp_path / "whole", *FIRST])
    rng = random.Random(12)
    out = tmp_path / "out"
    killed = sum(
        kill_after(seconds * rng.uniform(0.2, 0.7), [*arguments, out, *FIRST]) for _ in range(12)
    )
    assert killed  # later rounds find ever less to do
    codeflow(*arguments, out, *FIRST)
    assert fingerprint(out) == expected
    assert temporary_files(out) == []


def test_a_killed_change_of_settings_ends_with_the_new_bytes(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    """The dataset that a rebuild starts from has shards, manifests and markers in the way."""
    whole = tmp_path / "whole"
    codeflow(*arguments, whole, *FIRST)
    expected, seconds = undisturbed(whole, [*arguments, whole, *FIRST, *SECOND])
    out = tmp_path / "out"
    for n in range(KILLS):
        for moment in moments(n, seconds):
            codeflow(*arguments, out, *FIRST, "--set", "filter.min_message_words=3")
            if kill_after(moment, [*arguments, out, *FIRST, *SECOND]):
                break
        codeflow(*arguments, out, *FIRST, *SECOND)
        assert fingerprint(out) == expected
        assert temporary_files(out) == []
