"""How units run. Nothing here knows what a stage does.

`make_executor` is the only door: `inline` runs units in this process (for debugging; no limits are
enforced), `local` runs each in a supervised child process with a time and a memory limit.
"""

from __future__ import annotations

from codeflow.errors import UsageError, did_you_mean
from codeflow.exec.types import Executor, Limits, Outcome, Unit

EXECUTORS = ("local", "inline")


def make_executor(name: str, workers: int, limits: Limits) -> Executor:
    """An executor by name; use it as a context manager, so that its children end with it.

    Args:
        name: `local` or `inline`.
        workers: Number of units at work at the same time (`inline` always has one).
        limits: Time, memory and attempts granted to each unit.
    """
    if name == "inline":
        from codeflow.exec.inline import InlineExecutor

        return InlineExecutor()
    if name == "local":
        from codeflow.exec.local import LocalExecutor

        return LocalExecutor(workers, limits)
    raise UsageError(f"unknown executor `{name}`. {did_you_mean(name, EXECUTORS)}")


__all__ = ["EXECUTORS", "Executor", "Limits", "Outcome", "Unit", "make_executor"]
