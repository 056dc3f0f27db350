"""What the Ray executor says without Ray, and that nothing pays for it who does not use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from codeflow.errors import CodeflowError, DatasetError, UsageError
from codeflow.exec import Limits, Outcome, Unit, make_executor
from codeflow.exec.inline import InlineExecutor
from codeflow.mine.sources import parse_sources
from codeflow.pipeline import build
from codeflow.recipe import Recipe
from codeflow.report.progress import make_progress


class Elsewhere(InlineExecutor):
    """Says that all is done, and it is: in a folder of the same name on another machine."""

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        return (Outcome(unit.id, "done") for unit in units)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(CodeflowError, match=r"needs ray: pip install 'codeflow\[ray\]'"):
        make_executor("ray", 1, Limits())


@pytest.mark.parametrize("name", ["local", "inline"])
def test_an_address_is_for_ray_only(name: str) -> None:
    with pytest.raises(UsageError, match=f"for the `ray` executor, not for `{name}`"):
        make_executor(name, 1, Limits(), "head:6379")


def test_the_command_line_offers_ray_without_importing_it() -> None:
    program = (
        "import sys\nfrom codeflow.cli import cli\n"
        "cli.main(['build', '--help'], standalone_mode=False)\n"
        "import codeflow.exec.ray\nsys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[local|inline|ray]" in done.stdout
    assert "--address" in done.stdout


def test_a_folder_that_nodes_do_not_share_is_found_out_at_the_first_unit(
    monkeypatch: pytest.MonkeyPatch, sample_repository: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("codeflow.pipeline.make_executor", lambda *_: Elsewhere())
    sources = parse_sources([str(sample_repository)], "list")
    with pytest.raises(DatasetError, match=r"is done, but .* all of them share"):
        build(tmp_path / "out", Recipe(), sources, make_progress(True))
