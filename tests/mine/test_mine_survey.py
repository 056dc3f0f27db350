"""Fork families, lifecycles, slices and policies: what is mined, before how."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import WIDE, Repo, mine, text

from codeflow.dataset import Dataset
from codeflow.mine.families import run as families
from codeflow.mine.history import Window, maturity_window, slices
from codeflow.mine.sources import parse_sources
from codeflow.pipeline import RunOptions, build
from codeflow.recipe import Recipe, load_recipe
from codeflow.report.progress import QuietProgress
from codeflow.verify import verify
from codeflow.work import Work


def growing(path: Path, commits: int, name: str = "a", **options: Any) -> list[str]:
    """One file that changes four lines a commit."""
    states = ({b"%s.py" % name.encode(): text(name, 30, 4 * i)} for i in range(commits))
    return Repo(path).chain(*states, **options)


def built(tmp_path: Path, sources: list[Path], *overrides: str) -> Dataset:
    recipe = load_recipe(None, ["mine.min_commits=1", "mine.min_lines=1", *overrides])
    listed = parse_sources(map(str, sources), "list")
    build(tmp_path, recipe, listed, QuietProgress(), RunOptions("inline"), "mine")
    return Dataset.open(tmp_path)


def test_the_longest_mainline_leads_a_family(tmp_path: Path) -> None:
    repos = {
        "young": {"root": "r", "mainline_commits": 5, "head": "1"},
        "old": {"root": "r", "mainline_commits": 9, "head": "2"},
        "twin": {"root": "r", "mainline_commits": 9, "head": "2"},
        "alone": {"root": "s", "mainline_commits": 1, "head": "3"},
    }
    work = Work(tmp_path, "all", "f", {}, {"repos": repos})
    assert families(work, Recipe()) == {"forks": 2}
    leaders = {name: facts["leader"] for name, facts in work.facts["by_repo"].items()}
    assert leaders == {"young": "old", "old": "old", "twin": "old", "alone": "alone"}


def test_a_fork_is_listed_and_not_mined(tmp_path: Path) -> None:
    growing(tmp_path / "a.git", 20)
    subprocess.run(
        ["git", "clone", "-q", "--bare", tmp_path / "a.git", tmp_path / "b.git"], check=True
    )
    growing(tmp_path / "c.git", 20, "c")
    sources = [tmp_path / f"{name}.git" for name in "abc"]
    dataset = built(tmp_path / "data", sources)
    rows = {r["name"]: r for r in dataset.read("repos").to_pylist()}
    assert sorted(r["status"] for r in rows.values()) == ["fork", "mined", "mined"]
    (fork,) = (r for r in rows.values() if r["status"] == "fork")
    assert fork["leader"] in {r["repo_id"] for r in rows.values()} - {fork["repo_id"]}
    assert fork["leader"] in fork["reason"]
    assert fork["repo_id"] not in dataset.read("triples")["repo_id"].to_pylist()
    both = built(tmp_path / "both", sources, "mine.collapse_forks=false")
    assert len(set(both.read("triples")["repo_id"].to_pylist())) == 3


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 20))
def test_slices_cover_the_window_and_share_only_their_ends(start: int, size: int, cut: int) -> None:
    window = Window(start, start + size)
    found = slices(window, cut)
    assert all(s.stop - s.start - 1 <= cut and s.stop - s.start >= 2 for s in found)
    assert all(a.stop - 1 == b.start for a, b in itertools.pairwise(found))
    if size >= 2:
        assert (found[0].start, found[-1].stop) == (window.start, window.stop)
    else:
        assert found == []


def test_a_sliced_giant_loses_no_commit_and_no_state(tmp_path: Path) -> None:
    growing(tmp_path / "r.git", 60)
    whole = built(tmp_path / "whole", [tmp_path / "r.git"], "mine.max_lines=20")
    cut = built(tmp_path / "cut", [tmp_path / "r.git"], "mine.max_lines=20", "mine.slice_commits=7")
    assert len(cut.markers("mine")) == 4
    positions = [sorted(d.read("commits")["position"].to_pylist()) for d in (whole, cut)]
    assert positions[0] == positions[1] == list(range(24, 48))
    triples = sorted(cut.read("triples").to_pylist(), key=lambda t: t["sequence"])
    for before, after in itertools.pairwise(triples):
        assert before["new_position"] <= after["old_position"]
    found = verify(cut, workers=1, executor="inline")
    assert (found.problems, found.proven) == ((), len(triples))


def test_a_flow_is_a_chain_without_gaps(tmp_path: Path) -> None:
    growing(tmp_path / "r.git", 40)
    dataset = built(tmp_path / "data", [tmp_path / "r.git"], "mine.max_lines=20")
    triples = dataset.read("triples").to_pylist()
    assert len(triples) > 2
    for before, after in itertools.pairwise(triples):
        same = before["new_commit"] == after["old_commit"]
        assert (before["flow"] == after["flow"]) == same
    assert triples[0]["flow"] == triples[0]["triple_id"]


def test_both_percentiles_are_recorded(tmp_path: Path) -> None:
    growing(tmp_path / "r.git", 41)
    triples = built(tmp_path / "data", [tmp_path / "r.git"]).read("triples").to_pylist()
    for t in triples:
        assert t["commit_percentile"] == pytest.approx(t["new_position"] / 40)
        assert 0 <= t["time_percentile"] <= 1


def test_windows_by_another_measure() -> None:
    fast_start = [0.0, 0.5, 0.6, 0.7, 0.79, 0.8, 0.85, 0.9, 0.95, 1.0]
    assert maturity_window(10, 0.4, 0.8, fast_start) == Window(1, 6)
    lying = [0.0, 0.9, 0.1, 0.2, 1.0]  # a date from the future: past 0.4 from there on
    assert maturity_window(5, 0.4, 0.95, lying) == Window(1, 4)
    assert maturity_window(3, 0.4, 0.5, [0.0, 0.0, 1.0]) == Window(2, 2)


def test_churn_moves_the_window_to_where_the_lines_changed(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    quiet = [{b"a.py": text("a", 40), b"n": b"%d\n" % i} for i in range(20)]
    busy = [{b"a.py": text(f"b{i}", 40), b"n": b"20\n"} for i in range(20)]
    repo.chain(*quiet, *busy)
    by_churn = mine(repo.path, tmp_path / "churn", **STEPWISE, lifecycle="churn").rows("repos")[0]
    by_count = mine(repo.path, tmp_path / "count", **STEPWISE).rows("repos")[0]
    assert (by_count["window_from"], by_count["window_to"]) == (16, 32)
    assert by_churn["window_from"] > 25


STEPWISE: dict[str, Any] = {"min_commits": 1, "min_lines": 1}


@pytest.mark.parametrize(
    ("policy", "ends"),
    [
        ("commit", list(range(1, 13))),
        ("count", [5, 10]),
        ("release", [9]),
        ("pull_request", [6, 8]),
    ],
)
def test_policies_end_triples_where_they_say(tmp_path: Path, policy: str, ends: list[int]) -> None:
    repo = Repo(tmp_path / "r.git")
    names: list[str] = []
    for i in range(13):
        message = b"add a counter (#7)\n" if i in (6, 8) else b"step %d\n" % i
        names.append(repo.commit({b"a.py": text("a", 30, 4 * i)}, names[-1:], message))
    for position in (4, 9):
        # One lightweight, one annotated.
        tag = ["tag", *(["-am", "out"] if position == 9 else []), f"v{position}", names[position]]
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", repo.path, *who, *tag], check=True)
    settings = WIDE | {"policy": policy, "max_commits": 5}
    triples = mine(repo.path, tmp_path / "data", **settings).rows("triples")
    assert [t["new_position"] for t in triples] == ends
    if policy == "release":
        assert [t["old_position"] for t in triples] == [4]
    assert {t["stop_reason"] for t in triples} == {policy}
