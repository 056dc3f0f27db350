"""Units in supervised child processes on this machine: the default executor."""

from __future__ import annotations

import dataclasses
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from codeflow.exec.isolate import Child
from codeflow.exec.types import Limits, Outcome, Unit


class LocalExecutor:
    """Keeps up to `workers` children busy; replaces a child whose unit ended badly."""

    def __init__(self, workers: int, limits: Limits) -> None:
        self.workers = workers
        self.limits = limits
        self._idle: list[Child] = []
        self._busy: set[Child] = set()

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        waiting = deque(sorted(units, key=lambda u: (-u.weight, u.id)))
        attempts: Counter[str] = Counter()
        with selectors.DefaultSelector() as selector:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.workers:
                    unit = waiting.popleft()
                    attempts[unit.id] += 1
                    child = self._idle.pop() if self._idle else Child(self.limits)
                    self._busy.add(child)
                    selector.register(child, selectors.EVENT_READ)
                    child.start(unit)
                for child, outcome in self._wait(selector):
                    selector.unregister(child)
                    self._release(child, outcome)
                    tried = attempts[outcome.unit_id]
                    if outcome.status == "crash" and tried < self.limits.attempts:
                        assert child.unit is not None
                        waiting.appendleft(child.unit)
                    else:
                        yield dataclasses.replace(outcome, attempts=tried)

    def close(self) -> None:
        for child in [*self._idle, *self._busy]:
            child.close()
        self._idle.clear()
        self._busy.clear()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait(self, selector: selectors.BaseSelector) -> list[tuple[Child, Outcome]]:
        """Block until something ends; the children that ended and how."""
        soonest = min(child.deadline for child in self._busy)
        events = selector.select(max(0.0, soonest - time.monotonic()))
        ended = []
        for key, _ in events:
            child = key.fileobj
            assert isinstance(child, Child)
            outcome = child.poll()
            if outcome is not None:
                ended.append((child, outcome))
        replied = {child for child, _ in ended}
        now = time.monotonic()
        late = [c for c in self._busy if c not in replied and now >= c.deadline]
        return ended + [(child, child.time_out()) for child in late]

    def _release(self, child: Child, outcome: Outcome) -> None:
        self._busy.remove(child)
        if outcome.status in ("done", "failed", "disk_full"):
            self._idle.append(child)
        else:
            child.close()
