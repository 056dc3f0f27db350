"""How units run. Nothing here knows what a stage does.

`make_executor` is the only door: `inline` runs units in this process (for debugging; no limits are
enforced), `local` runs each in a supervised child process with a time and a memory limit, `ray`
does that on the nodes of a Ray cluster.
"""

from __future__ import annotations

from codeflow.errors import UsageError, did_you_mean
from codeflow.exec.types import Executor, Limits, Outcome, Unit

EXECUTORS = ("local", "inline", "ray")


def make_executor(name: str, workers: int, limits: Limits, address: str | None = None) -> Executor:
    """An executor by name; use it as a context manager, so that its children end with it.

    Args:
        name: `local`, `inline` or `ray`.
        workers: Number of units at work at the same time (`inline` always has one, `ray` as many
            as fit into a cluster that runs already).
        limits: Time, memory and attempts granted to each unit.
        address: The Ray cluster, `host:port` or `auto`; None: RAY_ADDRESS, else one of this
            machine alone.

    Raises:
        UsageError: An unknown name, or an address for an executor that has none.
    """
    if address is not None and name != "ray":
        raise UsageError(f"an address is for the `ray` executor, not for `{name}`")
    if name == "inline":
        from codeflow.exec.inline import InlineExecutor

        return InlineExecutor()
    if name == "local":
        from codeflow.exec.local import LocalExecutor

        return LocalExecutor(workers, limits)
    if name == "ray":
        from codeflow.exec.ray import RayExecutor

        return RayExecutor(address, limits, workers)
    raise UsageError(f"unknown executor `{name}`. {did_you_mean(name, EXECUTORS)}")


__all__ = ["EXECUTORS", "Executor", "Limits", "Outcome", "Unit", "make_executor"]
