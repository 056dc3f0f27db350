"""What every executor promises, whichever way it runs units."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from codeflow.errors import UsageError
from codeflow.exec import Executor, Limits, Outcome, Unit, make_executor

LIMITS = Limits(seconds=60, memory=2 << 30, attempts=2)
Make = Callable[[], Executor]


@pytest.fixture(params=["inline", "local"])
def make(request: pytest.FixtureRequest) -> Make:
    return lambda: make_executor(request.param, 2, LIMITS)


def unit(name: str, func: str, weight: float = 1.0, **args: object) -> Unit:
    return Unit(name, f"exec_units:{func}", args, weight)


def outcomes(make: Make, units: Iterator[Unit] | list[Unit]) -> dict[str, Outcome]:
    with make() as executor:
        found = list(executor.run(units))
    assert len({o.unit_id for o in found}) == len(found)
    return {o.unit_id: o for o in found}


def test_result_comes_back_with_its_measures(make: Make) -> None:
    found = outcomes(make, [unit("a", "square", n=3), unit("b", "square", n=4)])
    assert {k: o.result["square"] for k, o in found.items()} == {"a": 9, "b": 16}
    for outcome in found.values():
        assert (outcome.status, outcome.reason, outcome.attempts) == ("done", "", 1)
        assert 0 < outcome.seconds < 60
        assert outcome.peak_rss > 1 << 20


def test_two_hundred_tiny_units_from_a_generator_in_any_order(make: Make) -> None:
    numbers = list(range(200))
    random.Random(7).shuffle(numbers)
    units = (unit(f"u{n:03d}", "square", weight=n % 5, n=n) for n in numbers)
    found = outcomes(make, units)
    assert {k: o.result["square"] for k, o in found.items()} == {
        f"u{n:03d}": n * n for n in range(200)
    }


def test_no_units_give_no_outcomes(make: Make) -> None:
    assert outcomes(make, []) == {}


def test_an_executor_runs_several_times(make: Make) -> None:
    with make() as executor:
        for n in range(3):
            (outcome,) = executor.run([unit("a", "square", n=n)])
            assert outcome.result["square"] == n * n


def test_an_exception_is_a_failure_with_type_text_and_place(make: Make) -> None:
    found = outcomes(make, [unit("bad", "raises", what="thing"), unit("good", "square", n=1)])
    assert found["bad"].status == "failed"
    assert found["bad"].reason.startswith("ValueError: bad thing (exec_units.py:")
    assert found["bad"].result == {}
    assert found["bad"].attempts == 1
    assert found["good"].status == "done"


def test_an_error_on_purpose_is_its_message_without_escape_sequences(make: Make) -> None:
    (outcome,) = outcomes(make, [unit("a", "raises_on_purpose")]).values()
    assert (outcome.status, outcome.reason) == ("failed", "repository has no \ufffd[31mcommit")


def test_a_full_disk_is_told_apart(make: Make) -> None:
    (outcome,) = outcomes(make, [unit("a", "disk_full")]).values()
    assert outcome.status == "disk_full"
    assert "No space left" in outcome.reason


@pytest.mark.parametrize("func", ["no.such.module:f", "exec_units:no_such_function"])
def test_an_unknown_function_is_a_failure(make: Make, func: str) -> None:
    with make() as executor:
        (outcome,) = executor.run([Unit("a", func, {})])
    assert outcome.status == "failed"
    assert {"no.such.module:f": "'no'"}.get(func, "no_such_function") in outcome.reason


def test_what_a_unit_prints_is_not_taken_for_its_result(make: Make) -> None:
    units = [unit("a", "noisy", ok=1), unit("b", "noisy", ok=2)]
    assert {k: o.result for k, o in outcomes(make, units).items()} == {
        "a": {"ok": 1},
        "b": {"ok": 2},
    }


def test_five_megabytes_go_and_come(make: Make) -> None:
    found = outcomes(
        make,
        [unit("a", "large", bytes=5 << 20, ballast="y" * (5 << 20)), unit("b", "large", bytes=1)],
    )
    assert found["a"].result["text"] == "x" * (5 << 20)
    assert found["b"].result["text"] == "x"


def test_heavier_units_start_first() -> None:
    units = [unit(name, "square", weight, n=1) for name, weight in [("a", 1), ("b", 9), ("c", 5)]]
    for executor in ("inline", "local"):
        with make_executor(executor, 1, LIMITS) as e:
            assert [o.unit_id for o in e.run(units)] == ["b", "c", "a"]


def test_an_unknown_executor_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown executor `lokal`\. Did you mean `local`"):
        make_executor("lokal", 1, LIMITS)
