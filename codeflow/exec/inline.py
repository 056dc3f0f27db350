"""Units one after another in this process: for debuggers and unit tests. Enforces no limits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from codeflow.exec.child import call, peak_rss
from codeflow.exec.types import Outcome, Unit


class InlineExecutor:
    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        for unit in sorted(units, key=lambda u: (-u.weight, u.id)):
            started = time.monotonic()
            reply = call(unit.func, unit.args)
            yield Outcome(
                unit.id,
                reply["status"],
                reply.get("reason", ""),
                reply.get("result", {}),
                time.monotonic() - started,
                peak_rss(),
            )

    def close(self) -> None:
        pass

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
