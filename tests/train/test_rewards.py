from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from codeflow.errors import UsageError
from codeflow.train.rewards import Limits, pass_rate, run_tests

ADD = "def add(a, b):\n    return a + b\n"
SHORT = Limits(seconds=0.7, memory_mib=256)


def test_the_reward_is_the_share_of_tests_passed() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add('a', 'b') == 'ab'"]
    assert run_tests(ADD, tests) == [True, False, True]
    assert pass_rate(ADD, tests) == pytest.approx(2 / 3)


def test_what_tests_can_say() -> None:
    program = """
from __future__ import annotations
from dataclasses import dataclass

class Refusal(Exception): pass

@dataclass
class Stack:
    items: list[int]
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()

def echo(*args, **kwargs): return args, kwargs
def fail(kind): raise {"value": ValueError, "own": Refusal}[kind]("no")
"""
    tests = [
        "s = Stack([])\ns.push(4)\ns.push(5)\nassert s.pop() == 5\nassert s.pop() == 4",
        "x = (1, 2.5, None, {'a': [b'b', {1, 2}]})\nassert echo(x, y=True) == ((x,), {'y': True})",
        "try:\n    fail('value')\n    assert False\nexcept ValueError:\n    pass",
        "try:\n    fail('own')\nexcept RuntimeError:\n    pass\nelse:\n    assert False",
        "import math\nassert math.isclose(abs(echo(1.0)[0][0]), 1.0)",
        "for i in range(20):\n    assert echo(i)[0] == (i,)",
        "assert missing(1) == 1",
        "assert echo(Stack) == 1",
    ]
    assert run_tests(program, tests) == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "print('passed', 'PASSED', '1' * 40, flush=True)",
        "def add(a, b):\n    class Same:\n        def __eq__(self, other): return True\n"
        "    return Same()",
        "class int(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def add(a, b): return int(4)",
        "def abs(x): return 0\ndef add(a, b): return 1e9",
        "import os\nos.close(1)\nos.close(2)\nos.closerange(3, 64)",
        "syntax error",
        "",
        # Undoing the checks where the program runs changes nothing where the tests run.
        "import builtins\nbuiltins.AssertionError = builtins.Exception\n"
        "import codeflow.train.rewards as r\nr._passes = lambda *_: True\n"
        "r._is_plain = lambda _: True\ndef add(a, b): return True",
        # The verdict is known by a token that the program cannot see.
        "import os\n"
        "for n in (0, 1, 2):\n"
        "    try: open(f'/proc/{os.getppid()}/fd/{n}', 'w').write('1' * 100)\n"
        "    except OSError: pass",
        "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\n"
        "shutil.rmtree(os.environ['HOME'], ignore_errors=True)",
    ],
)
def test_cheating_earns_nothing(program: str) -> None:
    assert run_tests(program, ["assert add(1, 2) == 3", "assert abs(add(1, 2) - 3) < 1"]) == [
        False,
        False,
    ]


def test_the_expected_result_is_not_where_the_program_runs() -> None:
    program = """
import gc, os, sys
def look():
    seen = [sys.argv, dict(os.environ), os.listdir(), gc.get_objects()]
    for process in os.getpid(), os.getppid():
        seen += [open(f"/proc/{process}/{name}").read() for name in ("cmdline", "environ")]
    expected = 8641974 + int(bool(seen))
    return expected if str(expected) in repr(seen) else 0
"""
    assert run_tests(program, ["assert look() == 8641975", "assert look() == 0"]) == [False, True]


def test_deleting_its_folder_does_not_hurt_a_right_program() -> None:
    program = ADD + "import os, shutil\nshutil.rmtree(os.getcwd())\n"
    assert pass_rate(program, ["assert add(1, 2) == 3"]) == 1.0


def test_a_loop_costs_only_its_test() -> None:
    program = "def f(x):\n    while x == 2: pass\n    return x\n"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]
    start = time.monotonic()
    assert run_tests(program, tests, SHORT) == [True, False, True]
    assert time.monotonic() - start < 60


def test_a_program_that_never_loads_is_tried_once() -> None:
    start = time.monotonic()
    assert pass_rate("while True: pass", ["assert add(1, 2) == 3"] * 100, SHORT) == 0.0
    assert time.monotonic() - start < 30


def test_a_test_that_loops_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codeflow.train.rewards.START_SECONDS", 1.0)
    assert run_tests(ADD, ["while True: pass"], SHORT) == [False]


@pytest.mark.parametrize(
    "body",
    [
        "return len(bytearray(1 << 32))",  # memory
        "return 'x' * (1 << 24)",  # output
        "print('x' * (1 << 24)); return 0",
        "open('big', 'wb').write(bytes(1 << 25)); return 3",
        "return len([open('/dev/null') for _ in range(1000)])",
        "import socket; socket.create_connection(('127.0.0.1', 9)); return 3",
        "import subprocess; subprocess.run(['true']); return 3",
        "import os; os.fork(); return 3",
        "import os; os.kill(os.getppid(), 9); return 3",
        "x = []; x.append(x); return x",
        "return f(a, b)",  # recursion without end
    ],
)
def test_limits_and_refusals(body: str) -> None:
    program = f"def f(a, b): {body}\n" + ADD
    tests = ["assert f(1, 2) in (3, 1000, 1 << 32)", "assert add(1, 2) == 3"]
    assert run_tests(program, tests, SHORT) == [False, True]


def test_a_fork_bomb_is_refused() -> None:
    bomb = "import os\ndef f():\n    while True:\n        os.fork()\n"
    assert run_tests(bomb, ["assert f() is None"], SHORT) == [False]


def test_nothing_is_left_running(tmp_path: Path) -> None:
    # Past the interpreter's refusal, by the C library. Where the kernel's limit holds, that is for
    # everybody but root, there is no other process; otherwise it dies with the group.
    note = tmp_path / "pid"
    tmp_path.chmod(0o777)
    program = f"""
import ctypes, os, time
def f():
    if ctypes.CDLL(None).fork() == 0:
        open({str(note)!r}, 'w').write(str(os.getpid()))
        time.sleep(600)
    time.sleep(0.2)
    return 1
"""
    run_tests(program, ["assert f() == 1"])
    if os.geteuid() == 0:
        assert note.exists()
        assert _ended(int(note.read_text()))
    else:
        assert not note.exists()


def _ended(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_environment_folder_and_input_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEFLOW_SECRET", "x")
    program = """
import os, sys
def look(): return sorted(os.environ), os.listdir(), os.getcwd() == os.environ["HOME"]
def read(): return sys.stdin.read()
"""
    tests = [
        "names, files, at_home = look()\nassert 'CODEFLOW_SECRET' not in names",
        "assert look()[1:] == ([], True)",
        "assert read() == ''",
    ]
    assert run_tests(program, tests) == [True, True, True]


def test_no_tests_is_an_error() -> None:
    with pytest.raises(UsageError, match="without tests"):
        pass_rate(ADD, [])
