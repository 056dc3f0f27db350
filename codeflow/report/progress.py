"""Progress on standard error: a live bar on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from codeflow.exec import Outcome

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_LINE_SECONDS = 10.0


class QuietProgress:
    """Says nothing; for `--json` and for callers that watch by other means."""

    def note(self, text: str) -> None:
        pass

    def step_started(self, step: str, todo: int, done_before: int) -> None:
        pass

    def unit_ended(self, outcome: Outcome) -> None:
        pass

    def step_ended(self, step: str, counts: dict[str, int]) -> None:
        pass

    def close(self) -> None:
        pass


class LineProgress:
    """One line when a step ends, and one every ten seconds while it lasts."""

    def __init__(self) -> None:
        self._step = ""
        self._todo = 0
        self._ended = 0
        self._started = 0.0
        self._last_line = 0.0

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def step_started(self, step: str, todo: int, done_before: int) -> None:
        self._step, self._todo, self._ended = step, todo, 0
        self._started = self._last_line = time.monotonic()
        if done_before:
            self.note(f"{step:<10} {todo} of {todo + done_before} units to do")

    def unit_ended(self, outcome: Outcome) -> None:
        self._ended += 1
        if outcome.status != "done":
            self.note(f"{self._step:<10} {outcome.unit_id}: {outcome.status}: {outcome.reason}")
        now = time.monotonic()
        if now - self._last_line >= _LINE_SECONDS and self._ended < self._todo:
            self._last_line = now
            rate = self._ended / (now - self._started)
            left = (self._todo - self._ended) / rate
            self.note(
                f"{self._step:<10} {self._ended}/{self._todo} units  {rate:.2f}/s  ETA {left:.0f} s"
            )

    def step_ended(self, step: str, counts: dict[str, int]) -> None:
        seconds = time.monotonic() - self._started
        units = f"{self._ended} unit{'s' if self._ended != 1 else ''}"
        told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in _headline(step, counts))
        self.note(f"{step:<10} {units:<12} {seconds:6.1f} s   {told}".rstrip())

    def close(self) -> None:
        """Give the terminal back, also when a run ends in the middle of a step."""


class BarProgress(LineProgress):
    """A live bar with rate and ETA while a step runs; the same lines as elsewhere when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: RichProgress | None = None

    def step_started(self, step: str, todo: int, done_before: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().step_started(step, todo, done_before)
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(step, total=todo)
        self._bar.start()

    def unit_ended(self, outcome: Outcome) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
            self._last_line = time.monotonic()  # the bar tells the rate; no extra lines
        super().unit_ended(outcome)

    def step_ended(self, step: str, counts: dict[str, int]) -> None:
        self.close()
        super().step_ended(step, counts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_progress(quiet: bool) -> LineProgress | QuietProgress:
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


_HEADLINES = {
    "mine": ("window_commits", "triples"),
    "families": ("forks",),
    "survey": ("mined", "mainline_commits"),
    "cluster": ("clusters", "dropped"),
    "decide": ("kept",),
    "tokenizer": ("vocab_size",),
    "compose": ("documents", "document_tokens"),
    "pack": ("rows", "tokens"),
}


def _headline(step: str, counts: dict[str, int]) -> list[tuple[str, int]]:
    return [(name, counts[name]) for name in _HEADLINES.get(step, ()) if name in counts]
