"""The Ray executor keeps every promise of the contract, and blames nobody for a lost worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from exec_ray import OBJECT_STORE, needs_ray, private_environment, starts
from processes import all_gone, running, wait_for
from test_exec_contract import *  # noqa: F403 - with `make` below: whatever is promised is tested here, too
from test_exec_contract import LIMITS, Make

from codeflow.errors import CodeflowError
from codeflow.exec import Executor, Limits, Outcome, Unit, make_executor
from codeflow.exec import ray as ray_executor
from codeflow.exec.local import LocalExecutor
from codeflow.exec.ray import RayExecutor

pytestmark = [*needs_ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_environment(tmp_path_factory.getbasetemp()):
        import ray

        ray.init(
            "local", num_cpus=2, object_store_memory=OBJECT_STORE, include_dashboard=False,
            log_to_driver=False, _memory=8 << 30,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def make() -> Make:
    return lambda: make_executor("ray", 2, LIMITS)


def run(executor: Executor, *units: Unit) -> dict[str, Outcome]:
    with executor:
        return {o.unit_id: o for o in executor.run(units)}


def first_start_hangs(path: Path, weight: float = 1) -> Unit:
    return Unit("slow", "exec_ray:first_start_hangs", {"starts": str(path)}, weight)


def test_faults_are_judged_as_under_local(tmp_path: Path) -> None:
    units = [
        Unit("segfault", "exec_units:segfault", {}),
        Unit("exit", "exec_units:exits", {"code": 3}),
        Unit("hang", "exec_units:hangs", {}),
        Unit("hang in C", "exec_units:hangs_with_gil", {"flag": str(tmp_path / "flag")}),
        Unit("memory", "exec_units:eats_memory", {}),
        Unit("native memory", "exec_units:fails_natively", {}),
        Unit("raise", "exec_units:raises", {"what": "x"}),
        Unit("good", "exec_units:square", {"n": 5}, weight=0),
    ]
    limits = Limits(seconds=5, memory=400 << 20, attempts=2)
    under_ray = run(RayExecutor(None, limits), *units)
    locally = run(LocalExecutor(2, limits), *units)
    assert under_ray.keys() == locally.keys() == {u.id for u in units}
    for name, outcome in under_ray.items():
        expected = locally[name]
        assert (outcome.status, outcome.attempts) == (expected.status, expected.attempts), name
        assert outcome.reason == expected.reason, name
    assert [under_ray[u.id].status for u in units] == [
        "crash", "crash", "timeout", "timeout", "oom", "oom", "failed", "done",
    ]  # fmt: skip


def test_a_child_is_kept_for_the_next_unit_and_replaced_when_limits_change() -> None:
    units = [Unit(f"u{n}", "exec_units:square", {"n": n}) for n in range(40)]
    before = {o.result["pid"] for o in run(RayExecutor(None, LIMITS), *units).values()}
    other = Limits(seconds=50, memory=1 << 30, attempts=2)
    after = {o.result["pid"] for o in run(RayExecutor(None, other), *units).values()}
    assert len(before) <= 4
    assert not before & after


def test_a_unit_whose_worker_is_killed_runs_again_and_that_is_no_attempt(tmp_path: Path) -> None:
    path = tmp_path / "starts"
    quick = [Unit(f"q{n}", "exec_units:square", {"n": n}) for n in range(4)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, RayExecutor(None, LIMITS), first_start_hangs(path, 9), *quick)
        assert wait_for(lambda: len(starts(path)) == 1)
        (child, worker), *_ = starts(path)
        os.kill(worker, signal.SIGKILL)
        found = future.result(timeout=60)
    assert (found["slow"].status, found["slow"].attempts) == ("done", 1)
    assert found["slow"].result == {"starts": 2}
    assert len(found) == 5
    assert all_gone([child])


def test_a_unit_that_kills_its_worker_each_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_LOST_WORKERS", 3)
    units = [
        Unit("bad", "exec_ray:kills_its_worker", {}),
        Unit("good", "exec_units:square", {"n": 2}),
    ]
    found = run(RayExecutor(None, LIMITS), *units)
    assert (found["bad"].status, found["bad"].attempts) == ("crash", 3)
    assert "3 Ray workers were lost under it" in found["bad"].reason
    assert found["good"].result["square"] == 4


def test_at_most_two_units_a_slot_are_in_flight() -> None:
    units = [Unit(f"u{n:02d}", "exec_units:square", {"n": n}) for n in range(30)]
    with RayExecutor(None, LIMITS) as executor:
        seen = [len(executor._in_flight) for _ in executor.run(units)]
    assert len(seen) == 30
    assert 2 <= max(seen) <= 4


def test_memory_limits_how_many_run_at_a_time() -> None:
    units = [Unit(f"u{n:02d}", "exec_units:square", {"n": n}) for n in range(9)]
    with RayExecutor(None, Limits(60, 5 << 30)) as executor:  # of the 8 GiB the cluster declares
        seen = [len(executor._in_flight) for _ in executor.run(units)]
    assert len(seen) == 9
    assert max(seen) <= 2


def test_the_heaviest_unit_starts_first() -> None:
    weights = {"a": 1, "b": 3, "c": 9, "d": 2}
    units = [Unit(name, "exec_units:square", {"n": 1}, w) for name, w in weights.items()]
    with RayExecutor(None, Limits(60, 5 << 30)) as executor:  # one slot
        assert [o.unit_id for o in executor.run(units)] == ["c", "b", "d", "a"]


@pytest.mark.parametrize("how", ["close", "generator"])
def test_units_at_work_are_abandoned(how: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    hang = {"flag": str(flag), "then": "hangs"}
    units = [Unit("b", "exec_units:starts_sleeper", hang), Unit("a", "exec_units:square", {"n": 1})]
    executor = RayExecutor(None, LIMITS)
    outcomes = executor.run(units)
    assert next(outcomes).unit_id == "a"
    assert wait_for(lambda: flag.exists() and flag.read_text() != "")
    sleeper = int(flag.read_text())
    assert running(sleeper)
    executor.close() if how == "close" else outcomes.close()  # type: ignore[attr-defined]
    assert all_gone([sleeper])
    assert run(RayExecutor(None, LIMITS), units[1])["a"].status == "done"


def test_no_usable_node_is_an_error_that_says_what_was_asked_for() -> None:
    executor = RayExecutor(None, Limits(memory=1 << 45), patience=1.5)
    with pytest.raises(
        CodeflowError, match=r"0\.025 minutes: 1 alive, none with 1 CPU and \d+ MiB"
    ):
        run(executor, Unit("a", "exec_units:square", {"n": 1}))
    assert run(RayExecutor(None, LIMITS), Unit("a", "exec_units:square", {"n": 1}))["a"].result


def test_another_version_on_a_node_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "__version__", "0.0.0")
    with pytest.raises(CodeflowError, match=r"has codeflow \d.*, not 0\.0\.0\nEvery node needs"):
        run(RayExecutor(None, LIMITS), Unit("a", "exec_units:square", {"n": 1}))
