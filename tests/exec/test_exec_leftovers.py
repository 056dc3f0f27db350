"""No process outlives a run: not after a close, a Ctrl-C, nor a kill -9 of the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import all_gone, descendants, own_descendants, running, wait_for

from codeflow.exec import Limits, Unit
from codeflow.exec.local import LocalExecutor

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, sys
from codeflow.exec import Limits, Unit
from codeflow.exec.local import LocalExecutor

units = [Unit(*u) for u in json.loads(sys.argv[1])]
try:
    with LocalExecutor(2, Limits(seconds=600)) as executor:
        for outcome in executor.run(units):
            print(outcome.unit_id, outcome.status, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextmanager
def driver(units: Sequence[tuple[str, str, object]]) -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(units)],
        stdout=subprocess.PIPE,
        env=env,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            if running(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def pid_in(flag: Path) -> int:
    assert wait_for(lambda: flag.exists() and flag.read_text() != "")
    return int(flag.read_text())


def test_a_closed_executor_leaves_no_process() -> None:
    before = own_descendants()
    executor = LocalExecutor(2, Limits())
    units = [Unit(str(n), "exec_units:square", {"n": n}) for n in range(9)]
    assert len(list(executor.run(units))) == 9
    started = own_descendants() - before
    assert len(started) == 2
    executor.close()
    assert all_gone(started)
    executor.close()  # closing twice is no error


def test_units_at_work_are_abandoned_by_close(tmp_path: Path) -> None:
    before = own_descendants()
    executor = LocalExecutor(2, Limits())
    flag = tmp_path / "flag"
    hang = {"flag": str(flag), "then": "hangs"}
    quick = Unit("a", "exec_units:square", {"n": 1})
    running_units = executor.run([Unit("b", "exec_units:starts_sleeper", hang), quick])
    assert next(running_units).unit_id == "a"
    sleeper = pid_in(flag)
    started = own_descendants() - before
    assert sleeper in started
    executor.close()
    assert all_gone(started)


@pytest.mark.parametrize("then", ["", "segfault", "hangs"])
def test_processes_a_unit_started_end_with_its_child(tmp_path: Path, then: str) -> None:
    flag = tmp_path / "flag"
    args = {"flag": str(flag)} | ({"then": then} if then else {})
    with LocalExecutor(1, Limits(seconds=1.5, attempts=1)) as executor:
        (outcome,) = executor.run([Unit("a", "exec_units:starts_sleeper", args)])
        sleeper = pid_in(flag)
        if then:  # the child was ended, and its group with it; a good child lives until close
            assert all_gone([sleeper])
    assert outcome.status == {"": "done", "segfault": "crash", "hangs": "timeout"}[then]
    assert all_gone([sleeper])


def test_nothing_is_left_after_kill_9_of_the_driver(tmp_path: Path) -> None:
    flags = [tmp_path / "a", tmp_path / "b"]
    units = [
        (flag.name, "exec_units:starts_sleeper", {"flag": str(flag), "then": "hangs"})
        for flag in flags
    ]
    with driver(units) as process:
        sleepers = {pid_in(flag) for flag in flags}
        family = descendants(process.pid)
        assert sleepers < family
        assert len(family) == 4
        process.kill()
        process.wait()
        assert all_gone(family)


def test_idle_children_end_with_the_driver(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    units = [
        ("a", "exec_units:square", {"n": 2}),
        ("b", "exec_units:starts_sleeper", {"flag": str(flag), "then": "hangs"}),
    ]
    with driver(units) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a done\n"
        pid_in(flag)
        family = descendants(process.pid)
        assert len(family) == 3
        process.kill()
        process.wait()
        assert all_gone(family)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    units = [("a", "exec_units:starts_sleeper", {"flag": str(flag), "then": "hangs"})]
    with driver(units) as process:
        sleeper = pid_in(flag)
        family = descendants(process.pid)
        assert sleeper in family
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert all_gone(family)
