"""Stopping a run between two steps when a person or a scheduler asks for it."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from codeflow.errors import CodeflowError

_INSISTING_S = 5.0


class Stopped(CodeflowError):
    """The run was asked to stop, and has saved where it is."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """While open, SIGTERM and SIGINT are noted instead of obeyed.

    A second SIGINT is obeyed when it comes five seconds later, from a person who insists. Sooner,
    or as SIGTERM, it is the same request again: where a scheduler signals every process, torchrun
    signals them once more, and the run must still get to save. Programs that insist have SIGKILL.

    Python hands signals to the main thread alone, so in another one this does nothing.

    Attributes:
        caught: The signal that was noted, or None.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._caught_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught, self._caught_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._caught_at > _INSISTING_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
