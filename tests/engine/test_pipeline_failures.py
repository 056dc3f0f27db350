"""When a repository, a filter or a step gives nothing: what is said, and how a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from engine_builds import SMALL, codeflow, fingerprint, make_repository, run_build, write_list

from codeflow.dataset import Dataset
from codeflow.errors import CodeflowError
from codeflow.pipeline import RunOptions

Repositories = tuple[Path, Path, Path]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A repository whose pack or objects are damaged, with an undamaged copy beside it."""
    repository = make_repository(tmp_path / "broken.git", 4)
    shutil.copytree(repository, tmp_path / "whole")
    for path in (repository / "objects").glob("[0-9a-f][0-9a-f]/*"):
        path.chmod(0o644)
        path.write_bytes(b"x" * 20)
    return repository


def test_a_broken_repository_is_quarantined_reported_and_tried_again_on_demand(
    broken: Path, repositories: Repositories, tmp_path: Path
) -> None:
    listed = write_list(tmp_path / "list", [repositories[1], broken])
    overrides = [a for o in SMALL for a in ("--set", o)]
    arguments = ["build", "--repos", listed, "--out", tmp_path / "data", *overrides]
    first = codeflow(*arguments, expect=3)
    assert "failed: fetch broken-" in first.stdout
    assert "failed: failed" not in first.stdout
    assert "1 unit failed" in first.stderr
    assert "--failed" in first.stderr
    stored = fingerprint(tmp_path / "data")
    again = codeflow(*arguments, expect=3)
    assert "nothing to do" in again.stderr
    shutil.rmtree(broken)
    shutil.copytree(tmp_path / "whole", broken)
    codeflow(*arguments, expect=3)
    assert fingerprint(tmp_path / "data") == stored
    codeflow(*arguments, "--failed", expect=0)
    codeflow(*arguments[:4], tmp_path / "fresh", *overrides)
    assert fingerprint(tmp_path / "data") == fingerprint(tmp_path / "fresh")


def test_nothing_to_mine_stops_with_all_reasons(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CodeflowError, match=r"(?s)no repository could be mined:.*broken\.git: .*--failed"
    ):
        run_build(tmp_path / "data", [broken])


def test_short_histories_stop_with_advice(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "young.git", 5, commits=8)
    with pytest.raises(CodeflowError, match=r"no triple was found.*mine\.min_commits"):
        run_build(tmp_path / "data", [repository])


def test_filters_that_keep_nothing_stop_with_advice(
    repositories: Repositories, tmp_path: Path
) -> None:
    with pytest.raises(CodeflowError, match=r"no triple was kept .*\[filter\]"):
        run_build(tmp_path / "data", repositories[:1], "filter.min_message_words=9999")


def test_rows_that_hold_no_document_stop_with_advice(
    repositories: Repositories, tmp_path: Path
) -> None:
    with pytest.raises(CodeflowError, match=r"no document fits a row .*raise pack\.length"):
        run_build(tmp_path / "data", repositories[:1], "pack.length=128")
    rejects = Dataset.open(tmp_path / "data").read("rejects").to_pylist()
    assert {r["reason"] for r in rejects} == {"too_long"}
    assert all(r["detail"].endswith("tokens without context, pack.length is 128") for r in rejects)


@pytest.mark.parametrize(
    ("function", "step"),
    [
        ("codeflow.mine.run.run", "mine"),
        ("codeflow.filter.score.run", "score"),
        ("codeflow.filter.decide.run", "decide"),
        ("codeflow.compose.run.run", "compose"),
    ],
)
def test_units_that_all_failed_are_the_reason_and_no_setting(
    repositories: Repositories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    step: str,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(function, fails)
    said = rf"^all 2 units of `{step}` failed: .*no luck.*\n.*--failed"
    with pytest.raises(CodeflowError, match=said):
        run_build(tmp_path / "data", repositories[:2])


def test_a_failed_common_step_says_how_to_go_on(
    repositories: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr("codeflow.pack.vocabulary.run", fails)
        for _ in range(2):
            with pytest.raises(CodeflowError, match=r"(?s)tokenizer failed: .*no luck.*--failed"):
                run_build(tmp_path / "data", repositories[:1])
    options = RunOptions(executor="inline", retry_failed=True)
    result, _ = run_build(tmp_path / "data", repositories[:1], options=options)
    assert result.exit_code == 0
