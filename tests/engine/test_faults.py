"""Builds whose workers are killed, crash, hang or eat memory: what the data is in the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
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
from processes import all_gone, descendants, running, wait_for

from codeflow.dataset import Dataset

pytestmark = pytest.mark.slow

Repositories = tuple[Path, Path, Path]
SETTINGS = [a for o in SMALL for a in ("--set", o)]
KILLS = 12
TABLES = ("triples", "changes", "blobs", "trees", "scores", "decisions", "documents")

# -- workers killed from outside ------------------------------------------------------------------


def kill_a_worker(build: subprocess.Popen[str], seconds: float, rng: random.Random) -> bool:
    """Kill -9 one worker of a build after a while, as the kernel does when memory runs out."""
    time.sleep(seconds)
    while build.poll() is None:
        workers = sorted(descendants(build.pid))
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            return True
        time.sleep(0.005)
    return False


def test_a_build_whose_workers_are_killed_ends_with_the_bytes_of_an_undisturbed_one(
    repositories: Repositories, tmp_path: Path
) -> None:
    listed = write_list(tmp_path / "list", repositories)
    arguments = ["build", "--repos", listed, *SETTINGS, "--workers", "2", "--out"]
    started = time.monotonic()
    codeflow(*arguments, tmp_path / "whole")
    seconds = time.monotonic() - started
    expected = fingerprint(tmp_path / "whole")
    kills = 0
    for n in range(KILLS):
        rng = random.Random(n)
        moment = seconds * (n + rng.random()) / KILLS
        killed = False
        while not killed:  # a moment after the end of the build is none
            out = tmp_path / f"out-{n}"
            shutil.rmtree(out, ignore_errors=True)
            build = subprocess.Popen(
                command(*arguments, out), env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            killed = kill_a_worker(build, moment, rng)
            said, _ = build.communicate(timeout=120)
            assert build.returncode == 0, said
            assert fingerprint(out) == expected
            assert temporary_files(out) == []
            moment *= 0.8
        kills += killed
    assert kills == KILLS


# -- workers that end themselves ------------------------------------------------------------------

#: Takes the place of one step. The unit of one repository misbehaves, the others are as ever.
FAULTY = '''
import ctypes, importlib, os, re, sys, time
from pathlib import Path


def run(work, recipe):
    if work.unit.startswith(os.environ["VICTIM"]) and os.environ["FAULT"] != "none":
        return globals()[os.environ["FAULT"]]()
    module, _, name = os.environ["GENUINE"].partition(":")
    return getattr(importlib.import_module(module), name)(work, recipe)


def segfault():
    ctypes.string_at(0)


def hang():
    time.sleep(1000)


def hang_in_c():
    """A catastrophic backtrack: no other thread of the process runs again."""
    Path(os.environ["FLAG"]).write_text(str(os.getpid()))
    re.match(r"(a*)*\\1b", "a" * 60)


def eat_memory():
    kept = []
    while True:
        kept.append(bytearray(16 << 20))
'''
DRIVER = """
import dataclasses, os, sys
from codeflow import pipeline
from codeflow.cli import main

step = next(s for s in pipeline.STEPS if s.name == os.environ["STEP"])
os.environ["GENUINE"] = step.run
faulty = dataclasses.replace(step, run="faulty:run")
pipeline.STEPS = tuple(faulty if s is step else s for s in pipeline.STEPS)
main()
"""


class Bench:
    """Builds with one misbehaving unit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flag = folder / "flag"
        (folder / "faulty.py").write_text(FAULTY)

    def start(self, fault: str, step: str, arguments: Sequence[object]) -> subprocess.Popen[str]:
        env = environment(FAULT=fault, STEP=step, VICTIM="ledger", FLAG=str(self.flag))
        env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(self.folder)])
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, arguments)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, fault: str, step: str, arguments: Sequence[object], expect: int) -> str:
        process = self.start(fault, step, arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == expect, said
        assert "Traceback" not in said
        return said


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rows(out: Path) -> dict[str, pa.Table]:
    dataset = Dataset.open(out)
    return {table: dataset.read(table) for table in TABLES}


@pytest.mark.parametrize(
    ("fault", "status", "setting"),
    [
        ("segfault", "crash: its process died: killed by SIGSEGV", "run.attempts=2"),
        ("hang", "timeout: no result after 2 s", "run.unit_seconds=2"),
        ("hang_in_c", "timeout: no result after 2 s", "run.unit_seconds=2"),
        ("eat_memory", "oom: ", "run.unit_memory_mib=512"),
    ],
)
def test_a_build_goes_on_without_the_unit_that_ends_badly(
    bench: Bench,
    repositories: Repositories,
    tmp_path: Path,
    fault: str,
    status: str,
    setting: str,
) -> None:
    everything = write_list(tmp_path / "all", repositories)
    others = write_list(tmp_path / "others", [repositories[0], repositories[2]])
    common = [*SETTINGS, "--set", setting, "--workers", "2", "--out"]
    codeflow("build", "--repos", others, *common, tmp_path / "others-data")
    out = tmp_path / "data"
    build = ["build", "--repos", everything, *common, out]
    bench.run(fault, "mine", build, expect=3)
    stored = fingerprint(out)
    assert rows(out) == rows(tmp_path / "others-data")
    (quarantined,) = [m for m in Dataset.open(out).all_markers() if m.status != "done"]
    assert quarantined.unit.startswith("ledger")
    assert quarantined.step == "mine"
    assert quarantined.reason.startswith(status)
    assert "nothing to do" in bench.run(fault, "mine", build, expect=3)
    assert fingerprint(out) == stored
    bench.run(fault, "mine", [*build, "--failed"], expect=3)  # the same again, from scratch
    assert fingerprint(out) == stored
    bench.run("none", "mine", [*build, "--failed"], expect=0)
    codeflow("build", "--repos", everything, *common, tmp_path / "whole")
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


# -- the driver killed while a unit lets no other thread run --------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel's signal for a pipe's end is Linux's"
)
def test_a_unit_that_hangs_in_native_code_ends_with_a_killed_driver(
    bench: Bench, repositories: Repositories, tmp_path: Path
) -> None:
    listed = write_list(tmp_path / "list", repositories)
    arguments = ["build", "--repos", listed, *SETTINGS, "--workers", "2", "--out"]
    process = bench.start("hang_in_c", "mine", [*arguments, tmp_path / "data"])
    assert wait_for(lambda: bench.flag.exists() and bench.flag.read_text() != "")
    hanging = int(bench.flag.read_text())
    family = descendants(process.pid)
    assert hanging in family
    process.kill()
    process.communicate()
    killed = time.monotonic()
    try:
        assert all_gone(family)
        assert time.monotonic() - killed < 5  # its time limit is an hour
    finally:
        for pid in family:
            if running(pid):
                os.kill(pid, signal.SIGKILL)
    bench.run("none", "mine", [*arguments, tmp_path / "data"], expect=0)
    codeflow(*arguments, tmp_path / "whole")
    assert fingerprint(tmp_path / "data") == fingerprint(tmp_path / "whole")
