from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def units_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find `exec_units`, too; they inherit the import path by environment only."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", here)
    monkeypatch.syspath_prepend(here)
