from __future__ import annotations

import math

import pytest

from codeflow.train.skip import ENOUGH, HISTORY, SkipRule


def wave(step: int) -> float:
    """Mean 1, standard deviation 0.1."""
    return 1.0 + (0.1 if step % 2 else -0.1)


def after(steps: int, sigmas: float = 6.0) -> SkipRule:
    rule = SkipRule(sigmas)
    assert not any(rule.skips(wave(i), wave(i)) for i in range(steps))
    return rule


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step(value: float) -> None:
    rule = SkipRule(0)
    assert rule.skips(value, 1.0)
    assert rule.skips(1.0, value)
    assert (rule.skipped, rule.in_a_row) == (2, 2)
    assert not rule.skips(1.0, 1.0)
    assert (rule.skipped, rule.in_a_row) == (2, 0)


def test_six_sigma_is_the_border() -> None:
    assert not after(HISTORY).skips(1.59, 1.0)
    assert after(HISTORY).skips(1.61, 1.0)
    assert after(HISTORY).skips(1.0, 1.61)
    assert not after(HISTORY, sigmas=7).skips(1.0, 1.61)
    assert not after(HISTORY).skips(-9.0, 0.0)  # low is good


def test_outliers_need_a_history() -> None:
    assert not after(ENOUGH - 1).skips(100.0, 1.0)
    assert after(ENOUGH).skips(100.0, 1.0)
    assert not after(HISTORY, sigmas=0).skips(100.0, 1.0)


def test_only_the_last_steps_count() -> None:
    rule = SkipRule(6.0)
    rule.skips(50.0, 1.0)
    assert not any(rule.skips(wave(i), 1.0) for i in range(HISTORY - 1))
    assert not rule.skips(1.7, 1.0)  # the first step is still remembered
    for i in range(HISTORY):
        rule.skips(wave(i), 1.0)
    assert rule.skips(1.7, 1.0)


def test_a_level_that_stays_is_accepted() -> None:
    rule = after(HISTORY)
    skips = [rule.skips(3.0, 1.0) for _ in range(10)]
    assert skips[0]
    assert not skips[-1]
    assert rule.skipped < 10


def test_not_a_number_never_enters_the_history() -> None:
    rule = after(HISTORY)
    rule.skips(math.nan, 1.0)
    assert rule.skips(1.61, 1.0)
    assert not rule.skips(1.0, 1.0)


def test_forgetting_starts_a_new_history_and_keeps_the_count() -> None:
    rule = after(HISTORY)
    assert rule.skips(9.0, 1.0)
    rule.forget()
    assert not rule.skips(9.0, 1.0)
    assert rule.skipped == 1


def test_state_continues_exactly() -> None:
    rule = after(ENOUGH + 5)
    rule.skips(math.nan, 1.0)
    copy = SkipRule(6.0)
    copy.load_state_dict(rule.state_dict())
    assert copy.state_dict() == rule.state_dict()
    values = [1.2, 1.55, 1.61, math.inf, 1.0, 2.0]
    assert [copy.skips(v, 1.0) for v in values] == [rule.skips(v, 1.0) for v in values]
    assert copy.state_dict() == rule.state_dict()
