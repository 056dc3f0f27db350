from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.train.recipe import Stage
from codeflow.train.schedule import decay_steps, learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    stage = Stage(**{"learning_rate": 1.0, "warmup_steps": 0} | settings)  # type: ignore[arg-type]
    return [learning_rate(stage, step, steps) for step in range(steps)]


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(1, 300),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["linear", "1-sqrt"]),
)
def test_schedules_rise_then_fall(
    kind: str, steps: int, warmup: int, low: float, share: float, shape: str
) -> None:
    found = rates(
        steps,
        warmup_steps=warmup,
        schedule=kind,
        min_learning_rate=low,
        decay_share=share,
        decay_shape=shape,
    )
    assert all(0 <= r <= 1 + 1e-9 for r in found)
    ramp, decay = found[:warmup], found[warmup:]
    assert ramp == [(i + 1) / warmup for i in range(len(ramp))]
    assert all(a >= b - 1e-12 for a, b in pairwise(decay))
    stays = kind == "constant" or (kind == "wsd" and round(share * steps) == 0)
    if decay:
        assert decay[-1] == pytest.approx(1.0 if stays else low)


def test_midpoints() -> None:
    for kind, middle in (("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)):
        assert rates(100, schedule=kind)[49] == pytest.approx(middle)
    quarter = rates(100, schedule="cosine", min_learning_rate=0.0)[24]
    assert quarter == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_at_its_corners() -> None:
    stage = {"schedule": "wsd", "warmup_steps": 10, "min_learning_rate": 0.1}
    found = rates(100, **stage, decay_steps=20, decay_shape="linear")
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == found[79] == 1.0
    assert found[80] == pytest.approx(1 - 0.9 / 20)
    assert found[89] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1)
    root = rates(100, **stage, decay_share=0.2)
    assert root[79] == 1.0
    assert root[84] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert root[99] == pytest.approx(0.1)


def test_a_decay_longer_than_what_warm_up_leaves_begins_after_it() -> None:
    found = rates(10, schedule="wsd", warmup_steps=4, decay_steps=10, decay_shape="linear")
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx(1 - 0.9 / 6)
    assert decay_steps(Stage(schedule="wsd", decay_steps=99), 10) == 10


def test_a_warm_up_longer_than_the_stage() -> None:
    assert rates(3, warmup_steps=6) == [1 / 6, 2 / 6, 3 / 6]
