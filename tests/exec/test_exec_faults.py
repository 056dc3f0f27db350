"""`local` against units that end badly: one culprit, one reason, and the others still run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from processes import all_gone, own_descendants

from codeflow.exec import Limits, Outcome, Unit
from codeflow.exec.local import LocalExecutor

GOOD = [Unit(f"good{n}", "exec_units:square", {"n": n}, weight=0) for n in range(4)]
LIMITS = Limits(seconds=60, memory=2 << 30, attempts=3)


def run(
    bad: Unit | Iterable[Unit], limits: Limits = LIMITS, workers: int = 1
) -> dict[str, Outcome]:
    """Outcomes of bad units, after which four good ones must have run."""
    before = own_descendants()
    with LocalExecutor(workers, limits) as executor:
        found = {
            o.unit_id: o for o in executor.run([*([bad] if isinstance(bad, Unit) else bad), *GOOD])
        }
    assert [found.pop(u.id).result["square"] for u in GOOD] == [0, 1, 4, 9]
    assert all_gone(own_descendants() - before)
    return found


def bad(func: str, **args: object) -> Unit:
    return Unit("bad", f"exec_units:{func}", args, weight=1)


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_segfault_is_a_crash_after_all_its_attempts(attempts: int) -> None:
    outcome = run(bad("segfault"), Limits(60, 2 << 30, attempts))["bad"]
    assert (outcome.status, outcome.attempts) == ("crash", attempts)
    assert "SIGSEGV" in outcome.reason
    assert "ctypes" in outcome.reason  # the first frame of the native stack trace


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_is_a_crash(code: int) -> None:
    outcome = run(bad("exits", code=code), Limits(60, 2 << 30, 2))["bad"]
    assert (outcome.status, outcome.attempts) == ("crash", 2)
    assert outcome.reason == f"its process died: exit code {code}"


def test_a_killed_child_is_tried_again(tmp_path: Path) -> None:
    outcome = run(bad("killed_once", flag=str(tmp_path / "flag")))["bad"]
    assert (outcome.status, outcome.attempts, outcome.result) == ("done", 2, {"ok": True})


@pytest.mark.parametrize("func", ["hangs", "hangs_with_gil"])
def test_a_hang_is_killed_at_the_limit_and_not_tried_again(func: str, tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    outcome = run(bad(func, flag=flag), Limits(seconds=1.5, memory=2 << 30))["bad"]
    assert (outcome.status, outcome.attempts) == ("timeout", 1)
    assert outcome.reason == "no result after 1.5 s (run.unit_seconds)"
    assert 1.5 <= outcome.seconds < 10


def test_a_memory_eater_is_out_of_memory_and_not_tried_again() -> None:
    outcome = run(bad("eats_memory"), Limits(seconds=60, memory=400 << 20))["bad"]
    assert (outcome.status, outcome.attempts) == ("oom", 1)
    assert outcome.peak_rss < 500 << 20


def test_a_native_allocation_failure_is_out_of_memory() -> None:
    outcome = run(bad("fails_natively"))["bad"]
    assert (outcome.status, outcome.attempts) == ("oom", 1)
    assert "2048 MiB" in outcome.reason
    assert "run.unit_memory_mib" in outcome.reason


def test_a_unit_is_not_judged_by_what_an_earlier_one_printed() -> None:
    talker = Unit("talker", "exec_units:complains_of_memory", {}, weight=2)
    found = run([talker, bad("segfault")], Limits(60, 2 << 30, 1))
    assert (found["talker"].status, found["bad"].status) == ("done", "crash")


def test_a_result_that_is_not_json_is_a_failure_not_a_crash() -> None:
    outcome = run(bad("no_json"))["bad"]
    assert (outcome.status, outcome.attempts) == ("failed", 1)
    assert "not JSON" in outcome.reason


def test_a_failure_keeps_the_child_and_a_crash_replaces_it() -> None:
    units = [
        Unit("a", "exec_units:square", {"n": 1}, weight=5),
        Unit("b", "exec_units:raises", {"what": "x"}, weight=4),
        Unit("c", "exec_units:square", {"n": 1}, weight=3),
        Unit("d", "exec_units:segfault", {}, weight=2),
        Unit("e", "exec_units:square", {"n": 1}, weight=1),
    ]
    with LocalExecutor(1, Limits(60, 2 << 30, 1)) as executor:
        pids = {o.unit_id: o.result.get("pid") for o in executor.run(units)}
    assert pids["a"] == pids["c"] != pids["e"]


def test_all_faults_at_once_with_two_workers(tmp_path: Path) -> None:
    units = [
        Unit("segfault", "exec_units:segfault", {}),
        Unit("exit", "exec_units:exits", {"code": 1}),
        Unit("hang", "exec_units:hangs", {}),
        Unit("raise", "exec_units:raises", {"what": "x"}),
        Unit("once", "exec_units:killed_once", {"flag": str(tmp_path / "flag")}),
    ]
    found = run(units, Limits(seconds=3, memory=2 << 30, attempts=2), workers=2)
    assert {k: (o.status, o.attempts) for k, o in found.items()} == {
        "segfault": ("crash", 2),
        "exit": ("crash", 2),
        "hang": ("timeout", 1),
        "raise": ("failed", 1),
        "once": ("done", 2),
    }
