"""Which updates not to make: those whose loss or gradient norm is not finite or far out.

A looped model can send one batch's gradient through the same weights into an explosion, and one
such update spoils the moments of the optimizer for long. The rule is that of OLMo-core: far out is
more than 6 standard deviations above the mean of the last 128 steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

HISTORY = 128
"""Steps that losses and gradient norms are compared with."""

ENOUGH = 64
"""Steps after which they are compared at all; until then only what is not finite is skipped."""


class SkipRule:
    """Judges every step by the ones before it; the same on every rank, for its input is.

    A far-out step joins the history all the same: weights stand still while updates are skipped, so
    a level that stays is the data's, and is accepted after a few steps.

    Args:
        sigmas: Standard deviations above the mean that are too far; 0 skips only what is not
            finite.

    Attributes:
        skipped: Steps without an update so far.
        in_a_row: Of these, the ones since the last update.
    """

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._norms: deque[float] = deque(maxlen=HISTORY)

    def skips(self, loss: float, norm: float) -> bool:
        """Whether to make no update at this step, which from now on is part of the history."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        skip = not finite or self._far(loss, self._losses) or self._far(norm, self._norms)
        if finite:
            self._losses.append(loss)
            self._norms.append(norm)
        self.skipped += skip
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def forget(self) -> None:
        """Start a new history: other data has another loss."""
        self._losses.clear()
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])

    def _far(self, value: float, history: deque[float]) -> bool:
        if not self.sigmas or len(history) < ENOUGH:
            return False
        limit = statistics.fmean(history) + self.sigmas * statistics.pstdev(history)
        return value > limit
