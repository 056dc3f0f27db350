"""Which processes run, read from /proc: what a test needs to prove that none is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def running(pid: int) -> bool:
    """True while a process lives; a zombie does not."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> set[int]:
    """Live processes below one, by parenthood."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = _stat(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Poll until true; False when that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def all_gone(pids: Iterable[int]) -> bool:
    pids = list(pids)
    return wait_for(lambda: not any(running(pid) for pid in pids))


def _stat(pid: int) -> tuple[str, int]:
    # The name, in brackets, may hold anything, brackets too.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def own_descendants() -> set[int]:
    return descendants(os.getpid())
