"""The learning rate of every step of a stage."""

from __future__ import annotations

import math

from codeflow.train.recipe import StageSettings


def learning_rate(stage: StageSettings, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up to the peak, then the stage's schedule.

    The first step is never zero, and the last step (`steps` - 1) has the smallest rate of the
    decay, `min_learning_rate` x peak. `wsd` (warm-up, stable, decay; Hu et al. 2024) stays at the
    peak until its decay, which takes the last steps of the stage.

    Args:
        stage: The schedule.
        step: Counted in the stage, from 0.
        steps: Length of the stage.
    """
    peak, warmup = stage.learning_rate, stage.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if stage.schedule == "constant":
        return peak
    start = max(warmup, steps - decay_steps(stage, steps)) if stage.schedule == "wsd" else warmup
    if step < start:
        return peak
    shape = stage.decay_shape if stage.schedule == "wsd" else stage.schedule
    left = _left(shape, min(1.0, (step - start + 1) / max(1, steps - start)))
    return peak * (stage.min_learning_rate + (1.0 - stage.min_learning_rate) * left)


def decay_steps(stage: StageSettings, steps: int) -> int:
    """Steps of the decay of `wsd`, at most the whole stage."""
    chosen = stage.decay_steps
    return min(steps, round(stage.decay_share * steps) if chosen is None else chosen)


def _left(shape: str, done: float) -> float:
    """What is left of the way down when `done`, from 0 to 1, of the decay is over."""
    if shape == "linear":
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - math.sqrt(done)  # Hägele et al. 2024: ends lower than linear at equal length
