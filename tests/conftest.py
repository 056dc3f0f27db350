"""Shared by all tests: the project root on the import path, and one real repository."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "tests", ROOT):  # for helpers beside this file, and for `examples`
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def sample_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with the history of the demo. Read it; never write to it."""
    from examples.make_sample_repository import build

    path = tmp_path_factory.mktemp("sample") / "stockroom.git"
    build(path)
    return path


# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
