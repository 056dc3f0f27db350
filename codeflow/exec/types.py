"""The values that pass between whoever plans units and whoever runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["done", "failed", "crash", "timeout", "oom", "disk_full"]


@dataclass(frozen=True)
class Unit:
    """One piece of work: a function by dotted name and its JSON-able arguments.

    Attributes:
        id: Name of the unit, unique within one call of `Executor.run`.
        func: `package.module:function`, importable in another process; called as `func(args)`,
            returns a JSON-able dict.
        args: The function's only argument.
        weight: Estimated cost; heavier units start first.
    """

    id: str
    func: str
    args: dict[str, Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of one unit.

    Attributes:
        status: `done`; `failed` (the function raised); `crash` (the process died); `timeout`;
            `oom` (memory limit); `disk_full`.
        reason: For people, empty when done.
        result: What the function returned, empty unless done.
        seconds: Wall time of the last attempt.
        peak_rss: Largest resident memory of the last attempt, bytes; 0 = unknown.
        attempts: Times the unit was started.
    """

    unit_id: str
    status: Status
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss: int = 0
    attempts: int = 1


@dataclass(frozen=True)
class Limits:
    """Granted to each unit. `local` and `ray` enforce them, `inline` does not.

    Attributes:
        seconds: Wall time, after which the unit's process group is killed.
        memory: Bytes of private memory (`RLIMIT_DATA`: mapped pack files do not count).
        attempts: Starts granted to a unit whose process dies; errors, time-outs and exhausted
            memory are not tried again, because they would end the same way.
    """

    seconds: float = 3600.0
    memory: int = 8 << 30
    attempts: int = 3


class Executor(Protocol):
    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Run all units; yield each outcome as it becomes known, in no fixed order."""
        ...

    def close(self) -> None:
        """End all child processes; units at work are abandoned."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *exc: object) -> None: ...
