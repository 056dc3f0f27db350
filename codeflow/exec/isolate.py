"""A supervised child process: the one place where a unit is started, watched and judged.

`concurrent.futures.ProcessPoolExecutor` fails every pending item when one child crashes, and
`multiprocessing.Pool` waits forever for it; neither limits time or memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from codeflow.exec.types import Limits, Outcome, Unit

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)


class Child:
    """One child process that serves units until one ends badly.

    A `Child` is either idle or busy with exactly one unit, so a death has exactly one culprit.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.unit: Unit | None = None
        self.started = 0.0
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        path = os.pathsep.join(p for p in (_PACKAGE_PARENT, os.environ.get("PYTHONPATH")) if p)
        env = os.environ | _ONE_THREAD
        env |= {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
        # Arrow's other pools reserve memory that they may never use, and the limit counts it.
        env.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        # Nothing is ever written to it: it only tells the child when this process is gone.
        lifeline, held = os.pipe()
        self._lifeline: IO[bytes] = os.fdopen(held, "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "codeflow.exec.child", str(limits.memory), str(lifeline)],
            pass_fds=(lifeline,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            bufsize=0,
            start_new_session=True,  # so that killing the group also ends a `git clone` of its
        )
        os.close(lifeline)
        self._reply = bytearray()
        self._errors_before = 0

    @property
    def deadline(self) -> float:
        """Monotonic time at which the unit at work is over its limit."""
        return self.started + self.limits.seconds

    def fileno(self) -> int:
        """Readable when the child replied or died; lets a selector watch many children."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def start(self, unit: Unit) -> None:
        assert self.unit is None, "the child is busy"
        self.unit, self.started = unit, time.monotonic()
        self._errors_before = os.fstat(self._errors.fileno()).st_size
        request = {"func": unit.func, "args": unit.args, "seconds": self.limits.seconds}
        data = memoryview(json.dumps(request).encode() + b"\n")
        assert self._process.stdin is not None
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except BrokenPipeError:
            pass  # it died already: `poll` reads end-of-file and says so

    def poll(self) -> Outcome | None:
        """Call when readable: the finished unit's outcome, or None while a reply is incomplete."""
        assert self.unit is not None
        chunk = os.read(self.fileno(), 1 << 20)
        if not chunk:
            return self._died()
        self._reply += chunk
        if not self._reply.endswith(b"\n"):
            return None
        reply = json.loads(bytes(self._reply))
        self._reply.clear()
        outcome = Outcome(
            self.unit.id,
            reply["status"],
            reply.get("reason", ""),
            reply.get("result", {}),
            time.monotonic() - self.started,
            reply["peak_rss"],
        )
        self.unit = None
        return outcome

    def time_out(self) -> Outcome:
        """Kill a unit that is over its time limit."""
        assert self.unit is not None
        self.kill()
        reason = f"no result after {self.limits.seconds:g} s (run.unit_seconds)"
        return Outcome(self.unit.id, "timeout", reason, seconds=time.monotonic() - self.started)

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the whole group is gone already
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors, self._lifeline):
            assert stream is not None
            stream.close()

    def _died(self) -> Outcome:
        assert self.unit is not None
        self.kill()
        code = self._process.returncode
        self._errors.seek(self._errors_before)  # what earlier units printed is not to blame
        errors = self._errors.read().decode(errors="replace")
        seconds = time.monotonic() - self.started
        if "bad_alloc" in errors or "out of memory" in errors.lower():
            reason = f"memory limit of {self.limits.memory >> 20} MiB reached (run.unit_memory_mib)"
            return Outcome(self.unit.id, "oom", reason, seconds=seconds)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        stack = errors.rpartition("Current thread")[2].splitlines()  # faulthandler shows all
        where = next((x.strip() for x in stack if x.startswith("  File ")), "")
        reason = f"its process died: {how}" + (f" in {where}" if where else "")
        return Outcome(self.unit.id, "crash", reason, seconds=seconds)
