"""The process a unit runs in: reads one JSON request a line, answers one JSON reply a line.

Started by `isolate.Child` as `python -m codeflow.exec.child MEMORY_BYTES LIFELINE`, the latter a
pipe whose other end is the parent's. It serves units one after another, because importing Arrow and
libgit2 costs more than most units; its parent replaces it as soon as one unit ends badly. If the
parent dies, it and everything it started end at once.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from codeflow.errors import CodeflowError, printable

_RESET_PEAK = "5"  # written to clear_refs: resets the kernel's peak-memory mark (Linux)


def call(func: str, args: dict[str, Any]) -> dict[str, Any]:
    """Call `package.module:function` and turn whatever happens into a reply."""
    try:
        module, _, name = func.partition(":")
        result = getattr(importlib.import_module(module), name)(args)
        return {"status": "done", "result": result}
    except MemoryError:
        return {"status": "oom", "reason": "memory limit reached"}
    except CodeflowError as e:
        return {"status": "failed", "reason": printable(str(e))}
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"status": "disk_full", "reason": printable(str(e))}
        return {"status": "failed", "reason": _describe(e)}
    except Exception as e:  # reported as the outcome of this unit; the run goes on
        return {"status": "failed", "reason": _describe(e)}


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is `call`
    own = [f for f in frames if f"codeflow{os.sep}" in f.filename] or list(frames)
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return printable(f"{type(error).__name__}: {error}{where}")


def peak_rss() -> int:
    """Peak resident bytes since the last reset; since process start where that is unknown."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak_rss() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write(_RESET_PEAK)
    except OSError:
        pass  # not Linux: peaks are then those of the process so far


def _encoded(reply: dict[str, Any]) -> bytes:
    try:
        return json.dumps(reply).encode() + b"\n"
    except (TypeError, ValueError) as e:  # or the unit would look like a crash, and be retried
        reason = f"the unit's result is not JSON: {e}"
        return _encoded({"status": "failed", "reason": reason, "peak_rss": reply["peak_rss"]})


def _follow_parent(requests: BinaryIO, inbox: queue.Queue[bytes]) -> None:
    """Hand over requests; when the parent is gone, end this process group at once."""
    for line in requests:
        inbox.put(line)
    os.killpg(0, signal.SIGKILL)


def _end_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process group when the other end of a pipe is closed.

    `_follow_parent` cannot do so while a unit holds the interpreter lock in native code: it is a
    thread. The kernel signals the owner of a pipe opened with O_ASYNC when the last writer is gone
    (fcntl(2), F_SETOWN and F_SETSIG). Linux only: elsewhere such a unit ends 30 s after its limit.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


def main() -> None:
    os.set_inheritable(int(sys.argv[2]), False)
    _end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    memory = int(sys.argv[1])
    _, most = resource.getrlimit(resource.RLIMIT_DATA)  # only root may raise it
    granted = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (granted, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    # Replies own a private descriptor; whatever a library prints goes to standard error.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    inbox: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_follow_parent, args=(sys.stdin.buffer, inbox), daemon=True).start()
    while True:
        request = json.loads(inbox.get())
        _reset_peak_rss()
        # The parent enforces the limit; this also ends a hang that outlives it where the kernel
        # does not (see `_end_with_parent`).
        faulthandler.dump_traceback_later(request["seconds"] + 30, exit=True)
        reply = call(request["func"], request["args"])
        faulthandler.cancel_dump_traceback_later()
        reply["peak_rss"] = peak_rss()
        replies.write(_encoded(reply))


if __name__ == "__main__":
    main()
