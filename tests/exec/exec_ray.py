"""What the tests of the Ray executor share: its environment, drivers to kill, units to lose."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import descendants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OBJECT_STORE = 80 << 20  # bytes
# Ray is looked for, not imported: it reads its environment when it is imported.
needs_ray = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the `ray` extra"),
]


@contextmanager
def private_environment(base: Path) -> Iterator[None]:
    """Ray on loopback, with its files and its token below `base`, and without any reports.

    The token is the same for all tests of a session, because Ray reads it once. Keep `base` short:
    Ray's sockets live below it, and a socket's path has at most 107 characters.
    """
    folder = base / "ray"
    token = folder / "token"
    if not token.exists():
        folder.mkdir()
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
    values = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


# -- drivers --------------------------------------------------------------------------------------

# Arguments: address, and a file for each unit, in which it names the process it leaves behind.
HANGS = """
import sys
from codeflow.exec import Limits, Unit
from codeflow.exec.ray import RayExecutor

args = [{"flag": flag, "then": "hangs"} for flag in sys.argv[2:]]
units = [Unit(a["flag"], "exec_units:starts_sleeper", a) for a in args]
with RayExecutor(sys.argv[1], Limits(seconds=600, memory=1 << 30), cpus=2) as executor:
    list(executor.run(units))
"""


@contextmanager
def driver(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is killed in the end, and with it whatever of Ray it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # Ray's agents outlive a killed driver by 60 s
        except ProcessLookupError:
            pass  # all gone already
        process.wait()


def kill_9(process: subprocess.Popen[bytes]) -> set[int]:
    """Kill a driver at work; the processes of its units, none of which may be left."""
    family = descendants(process.pid)
    units = {pid for child in family if is_codeflow(child) for pid in (child, *descendants(child))}
    process.kill()
    process.wait()
    return units


def is_codeflow(pid: int) -> bool:
    try:
        return b"codeflow.exec.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- units ----------------------------------------------------------------------------------------


def starts(path: Path) -> list[tuple[int, int]]:
    """Every start of a unit so far: its process, and the Ray worker above it."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(pid), int(parent)) for pid, parent in (line.split() for line in lines)]


def first_start_hangs(args: dict[str, Any]) -> dict[str, Any]:
    """Note the start in a file; stay for ever the first time, end the second."""
    path = Path(args["starts"])
    with path.open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    if len(starts(path)) == 1:
        time.sleep(1000)
    return {"starts": len(starts(path))}


def kills_its_worker(_: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
    return {}
