"""Where numbers of a run go: JSON lines for programs, one line of text for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Metrics:
    """`metrics.jsonl` of a run, one object per logged step.

    Args:
        file: Made when absent.
        resumed_at: Lines of later steps are dropped: a run that is resumed does them again.
            0 starts an empty file.
    """

    def __init__(self, file: Path, resumed_at: int = 0) -> None:
        kept = []
        if resumed_at and file.exists():
            for line in file.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    break  # the line a killed run was writing; nothing follows it
        file.write_text("".join(kept))
        self._file = file

    def log(self, numbers: dict[str, Any]) -> None:
        """Append one line; it is on its way to disk when this returns."""
        with self._file.open("a") as f:
            f.write(json.dumps(numbers) + "\n")


def say(text: str) -> None:
    """A line for a person, on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)
