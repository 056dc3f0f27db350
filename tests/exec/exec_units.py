"""Unit functions, good and bad, that executors import by name in another process."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from codeflow.errors import RepositoryError

Args = dict[str, Any]


def square(args: Args) -> Args:
    return {"square": args["n"] ** 2, "pid": os.getpid()}


def large(args: Args) -> Args:
    return {"text": "x" * args["bytes"]}


def noisy(args: Args) -> Args:
    print("a line on standard output\n{}")
    os.write(1, b'{"status": "done", "result": {"forged": true}}\n')
    subprocess.run(["echo", "and a child's"], check=True)
    return {"ok": args["ok"]}


def raises(args: Args) -> Args:
    raise ValueError(f"bad {args['what']}")


def raises_on_purpose(_: Args) -> Args:
    raise RepositoryError("empty", "repository has no \x1b[31mcommit")


def disk_full(_: Args) -> Args:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_json(_: Args) -> Args:
    return {"value": {1, 2}}


def segfault(_: Args) -> Args:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


def exits(args: Args) -> Args:
    os._exit(args["code"])


def hangs(_: Args) -> Args:
    time.sleep(1000)
    return {}


def hangs_with_gil(args: Args) -> Args:
    """A catastrophic backtrack in C: no other thread of the process runs again."""
    Path(args["flag"]).write_text(str(os.getpid()))
    re.match(r"(a*)*\1b", "a" * 60)
    return {}


def eats_memory(_: Args) -> Args:
    kept = []
    while True:
        kept.append(bytearray(16 << 20))


def fails_natively(_: Args) -> Args:
    """How a C++ library ends that cannot allocate."""
    sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
    sys.stderr.flush()
    os.abort()


def complains_of_memory(_: Args) -> Args:
    sys.stderr.write("warning: almost out of memory\n")
    sys.stderr.flush()
    return {}


def killed_once(args: Args) -> Args:
    flag = Path(args["flag"])
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"ok": True}


def starts_sleeper(args: Args) -> Args:
    """Leave a process behind, and its id in a file; then do as told."""
    sleeper = subprocess.Popen(["sleep", "1000"])
    Path(args["flag"]).write_text(str(sleeper.pid))
    return globals()[args["then"]](args) if "then" in args else {}
