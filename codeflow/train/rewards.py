"""Execution reward: the share of unit tests that a candidate program passes.

Tests are lines of Python such as `assert add(1, 2) == 3`. They run in a process of their own, the
judge; the candidate runs in another, and a test reaches its functions and classes only by calls
whose arguments and results travel as text. So an expected result never exists where the candidate
runs, and printing "passed", exiting early or an object that equals everything earn nothing. The
price: tests and candidate exchange plain data only (None, numbers but inf and nan, text, bytes,
lists, tuples, sets, dicts), changes of an argument stay unseen, and of the candidate's own objects
a test can only call methods, not read attributes or compare them.

This is not a sandbox. A candidate is held to limits of time, memory, file size, open files and
processes, refused the network and other programs, and started in an empty folder with an empty
environment. It runs as your user all the same: it reads what you can read and writes where you can
write, and the refusals are made by its own interpreter, so a program that sets out to get around
them does, and could attack the judge. As root the kernel does not enforce the limit of processes
either. Run models that you do not trust in a container without a network, as an ordinary user.

Linux only. Every candidate costs the start of two interpreters, one or two tenths of a second.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import json
import math
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeflow.errors import UsageError
from codeflow.settings import setting
from codeflow.train.errors import TrainingError

START_SECONDS = 20.0  # for the judge itself, on a busy machine
MESSAGE_BYTES = 1 << 20  # of one call or result
PLAIN = (type(None), bool, int, float, complex, str, bytes)
CONTAINERS = (tuple, list, set)
REFUSED = (  # events of `sys.addaudithook`
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "pty.spawn"),
    *("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo"),
)


@dataclass(frozen=True)
class Limits:
    """What a candidate program may use."""

    seconds: float = setting(5.0, "Wall-clock time of each test.", unit="seconds", minimum=0.01)
    memory_mib: int = setting(1024, "Address space.", unit="MiB", minimum=64)
    file_mib: int = setting(8, "Largest file it can write.", unit="MiB", minimum=0)
    open_files: int = setting(64, "Files open at once.", minimum=16)


def pass_rate(program: str, tests: Sequence[str], limits: Limits | None = None) -> float:
    """Share of `tests` that `program` passes, 0 to 1; see `run_tests`."""
    passed = run_tests(program, tests, limits)
    return sum(passed) / len(passed)


def run_tests(program: str, tests: Sequence[str], limits: Limits | None = None) -> list[bool]:
    """Run a candidate program against its tests, one after another.

    The candidate is loaded once and serves all tests; where a test ends it or runs out of time, it
    is started anew for the next one. Whatever it does, it fails tests; it raises nothing here.

    Args:
        program: Python source; it is loaded as a module, so `__name__` is not `__main__`.
        tests: Python source, one or more lines each; a test passes when it raises nothing.
        limits: Of time, memory and files.

    Raises:
        UsageError: There are no tests.
        TrainingError: The judge cannot be started on this machine.
    """
    if not tests:
        raise UsageError("a program without tests has no pass rate; drop such prompts beforehand")
    limits = limits or Limits()
    token = secrets.token_hex(16)  # by it the verdict is known to be the judge's
    order = (token, program, list(tests), dataclasses.asdict(limits))
    with (
        tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as verdict,  # files, unlike pipes, are bounded by a limit
        tempfile.TemporaryFile() as complaints,
    ):
        process = subprocess.Popen(
            _interpreter("judge()"),
            cwd=folder,
            env={
                "HOME": folder,
                "TMPDIR": folder,
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",  # the same program has the same reward tomorrow
                "OPENBLAS_NUM_THREADS": "1",  # more cannot be started
            },
            stdin=subprocess.PIPE,
            stdout=verdict,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            process.communicate(
                json.dumps(order).encode(), START_SECONDS + limits.seconds * len(tests)
            )
        except subprocess.TimeoutExpired:
            pass  # a test that loops, or a candidate that stopped the judge: nothing is passed
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        verdict.seek(0)
        _, found, passed = verdict.read().decode("utf-8", "replace").partition(token)
        if found:
            return [mark == "1" for mark in passed[: len(tests)].ljust(len(tests), "0")]
        if process.returncode > 0:
            complaints.seek(0)
            text = complaints.read(4000).decode("utf-8", "replace").strip()
            raise TrainingError(f"{sys.executable}: cannot run tests: {text}")
        return [False] * len(tests)


def judge() -> None:
    """The process that runs tests; reads its order from stdin, writes token and 0s and 1s."""
    token, program, tests, numbers = json.load(sys.stdin)
    limits = Limits(**numbers)
    _limit(resource.RLIMIT_AS, limits.memory_mib << 20)
    _limit(resource.RLIMIT_FSIZE, limits.file_mib << 20)
    candidate = _Candidate(program, limits, cpu_seconds=math.ceil(limits.seconds * len(tests)))
    marks = "".join("1" if _passes(test, candidate) else "0" for test in tests)
    candidate.stop()
    print(token + marks)


def _passes(test: str, candidate: _Candidate) -> bool:
    try:
        namespace = candidate.start_test()
        exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
    except BaseException:  # whatever a test ends with, it has not passed
        return False
    return True


class _Candidate:
    """The judge's side of the candidate: started when needed, stopped when it stops answering."""

    def __init__(self, program: str, limits: Limits, cpu_seconds: int) -> None:
        self._order = (program, dataclasses.asdict(limits), cpu_seconds)
        self._seconds = limits.seconds
        self._deadline = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._names: list[str] = []
        self._loads = True

    def start_test(self) -> dict[str, Any]:
        """The namespace of a test: everything callable that the candidate defines.

        Built-in functions stay the judge's, or a candidate could define `abs` to its advantage.
        """
        self._deadline = time.monotonic() + self._seconds
        if self._process is None:
            if not self._loads:
                raise RuntimeError("the candidate could not be loaded for an earlier test")
            self._loads = False
            ours, theirs = socket.socketpair()
            with theirs:
                self._link = ours
                self._process = subprocess.Popen(
                    _interpreter(f"serve({theirs.fileno()})"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            self._names = self._ask(self._order)
            self._loads = True
        return {n: _Remote(self, n) for n in self._names if not hasattr(builtins, n)}

    def call(self, target: str | int, method: str | None, args: Any, kwargs: Any) -> Any:
        """Call a function by name, or an object by number; or one of its methods."""
        if not _is_plain((args, kwargs)):
            raise TypeError("tests can pass plain data only")
        kind, value = self._ask((target, method, args, kwargs))
        if kind == "object":
            return _Remote(self, int(value))
        if kind == "error":
            raise _exception(value)("raised by the candidate")
        return value

    def stop(self) -> None:
        if self._process is not None and self._link is not None:
            self._link.close()
            self._process.kill()
            self._process.wait()
        self._process = self._link = None

    def _ask(self, message: Any) -> Any:
        assert self._link is not None
        try:
            self._link.settimeout(self._left())
            self._link.sendall(repr(message).encode() + b"\n")
            answer = bytearray()
            while not answer.endswith(b"\n"):
                self._link.settimeout(self._left())
                part = self._link.recv(1 << 16)
                if not part or len(answer) > MESSAGE_BYTES:
                    raise ConnectionError("the candidate ended, or answered too much")
                answer += part
            return ast.literal_eval(answer.decode())
        except BaseException:
            self.stop()
            raise

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the candidate took too long")
        return left


class _Remote:
    """A function, class or object of the candidate as tests see it."""

    def __init__(self, candidate: _Candidate, target: str | int) -> None:
        self.__candidate, self.__target = candidate, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__candidate.call(self.__target, None, args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.__candidate.call(self.__target, name, args, kwargs)


def serve(descriptor: int) -> None:
    """The process of the candidate: loads the program, then answers calls until it is killed."""
    with socket.socket(fileno=descriptor) as link, link.makefile("rwb") as stream:
        program, numbers, cpu_seconds = ast.literal_eval(stream.readline().decode())
        limits = Limits(**numbers)
        _limit(resource.RLIMIT_AS, limits.memory_mib << 20)
        _limit(resource.RLIMIT_CPU, cpu_seconds)
        _limit(resource.RLIMIT_FSIZE, limits.file_mib << 20)
        _limit(resource.RLIMIT_NOFILE, limits.open_files)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NPROC, 0)
        sys.addaudithook(_refuse)
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module
        exec(compile(program, "<candidate>", "exec", dont_inherit=True), module.__dict__)
        names = [name for name, value in vars(module).items() if callable(value)]
        stream.write(repr(names).encode() + b"\n")
        stream.flush()
        objects: list[Any] = []
        for line in stream:
            stream.write(repr(_answer(line, module, objects)).encode() + b"\n")
            stream.flush()


def _answer(line: bytes, module: types.ModuleType, objects: list[Any]) -> tuple[str, Any]:
    try:
        target, method, args, kwargs = ast.literal_eval(line.decode())
        called = getattr(module, target) if isinstance(target, str) else objects[target]
        value = (called if method is None else getattr(called, method))(*args, **kwargs)
        if _is_plain(value):
            return "value", value
    except Exception as e:  # the candidate's own: it is raised again in the test, by name
        return "error", type(e).__name__
    objects.append(value)
    return "object", len(objects) - 1


def _exception(name: str) -> type[Exception]:
    """The built-in exception of that name; RuntimeError for those that the candidate defines."""
    found = getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError


def _is_plain(value: Any) -> bool:
    """Whether `ast.literal_eval(repr(value))` gives the same again; subclasses are not plain."""
    if type(value) is dict:
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if type(value) in CONTAINERS:
        return all(_is_plain(item) for item in value)
    return type(value) in PLAIN


def _refuse(event: str, _arguments: tuple[Any, ...]) -> None:
    if event in REFUSED:
        raise PermissionError(f"{event}: not allowed here")


def _limit(kind: int, value: int) -> None:
    """Set a limit for good, at most what this process itself is held to."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _interpreter(call: str) -> list[str]:
    """A command that calls a function of this file, whatever folder it is started in."""
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); import codeflow.train.rewards as r; "
    return [sys.executable, "-s", "-P", "-c", f"{code}del sys.path[0]; r.{call}"]
