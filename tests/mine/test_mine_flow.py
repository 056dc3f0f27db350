"""The band rule, against a slow reference that diffs whole states every time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repo_builder import EXECUTABLE, GITLINK, LINK, WIDE, Repo, git, mine, objects_of, text

from codeflow.mine.flow import Endpoint, Flow, State
from codeflow.paths import is_code, is_test
from codeflow.recipe import MineSettings

PATHS = [b"src/a.py", b"src/b.py", b"tests/test_a.py", b"README.md", b"data/x", b"x"]


def random_states(seed: int, n: int) -> list[dict[bytes, Any]]:
    """Each state edits a few files of the one before; sometimes all of it is undone."""
    random_ = random.Random(seed)
    states: list[dict[bytes, Any]] = [{b"src/a.py": text("a", 20)}]
    for _ in range(n - 1):
        files = dict(random_.choice(states[-4:]) if random_.random() < 0.2 else states[-1])
        for path in random_.sample(PATHS, random_.randint(0, 3)):
            lines, first = random_.randint(1, 25), random_.randint(0, 8)
            content = text(path.decode()[-1], lines, first)
            choices: list[Any] = [content] * 6
            choices += [None, (LINK, b"t"), (EXECUTABLE, content), b"\0", (GITLINK, "12" * 20)]
            choice = random_.choice(choices)
            files.pop(path, None)
            if choice is not None:
                files[path] = choice
        states.append(files)
    return states


def net(repo: Repo, old: str, new: str) -> tuple[int, int, list[bytes]]:
    """Changed lines and paths between two trees by git; files that are no text have no lines."""
    total, paths = 0, []
    options = ("diff-tree", "-r", "-z", "--no-renames", "--numstat", "--ignore-submodules=none")
    for row in git(repo.path, *options, old, new).split(b"\0")[:-1]:
        added, deleted, path = row.split(b"\t", 2)
        paths.append(path)
        modes = b"".join(git(repo.path, "ls-tree", t, "--", path.decode())[:6] for t in (old, new))
        if b"160000" not in modes and added != b"-":
            total += int(added) + int(deleted)
    return total, len(set(paths)), paths


def reference(repo: Repo, trees: list[str], start: int, s: MineSettings) -> Iterator[Endpoint]:
    """The rule as its description says it."""
    rest = []
    for end in range(start + 1, min(start + s.max_commits, len(trees) - 1) + 1):
        lines, files, _ = net(repo, trees[start], trees[end])
        if lines > s.max_lines or files > s.max_files:
            break
        if lines < s.min_lines:
            continue
        own = net(repo, trees[end - 1], trees[end])[2]
        tests = any(map(is_test, own)) and any(is_code(p) and not is_test(p) for p in own)
        if not s.prefer_tests:
            yield Endpoint(end, "first_in_band")
        elif tests:
            yield Endpoint(end, "code_and_tests")
        else:
            rest.append(Endpoint(end, "first_in_band"))
    yield from rest


@pytest.mark.parametrize("prefer_tests", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_endpoints_are_those_of_the_reference(
    tmp_path: Path, seed: int, prefer_tests: bool
) -> None:
    repo = Repo(tmp_path / "r.git")
    trees = [repo.tree(files) for files in random_states(seed, 12)]
    settings = MineSettings(
        min_lines=15, max_lines=60, max_files=4, max_commits=4, prefer_tests=prefer_tests
    )
    flow = Flow(objects_of(repo), [State(t) for t in trees], settings)
    for start in range(len(trees) - 1):
        assert list(flow.endpoints(start)) == list(reference(repo, trees, start, settings))


def test_a_type_change_is_seen_through_several_steps(tmp_path: Path) -> None:
    """A file becomes a link and a file again: nothing is left of it in the net change."""
    repo = Repo(tmp_path / "r.git")
    as_file, as_link = {b"x": text("x", 9)}, {b"x": (LINK, b"target")}
    trees = [repo.tree(s) for s in (as_file, as_link, as_file, as_file | {b"y": b"1\n"})]
    flow = Flow(objects_of(repo), [State(t) for t in trees], MineSettings(min_lines=1))
    assert [e.index for e in flow.endpoints(0)] == [1, 3]


@pytest.mark.parametrize("seed", [1, 2])
def test_stored_triples_keep_the_band_and_never_overlap(tmp_path: Path, seed: int) -> None:
    repo = Repo(tmp_path / "r.git")
    commits = repo.chain(*random_states(seed, 60))
    band = {"min_lines": 15, "max_lines": 80, "max_files": 4, "max_commits": 5}
    result = mine(repo.path, tmp_path / "data", **WIDE | band)
    triples = result.rows("triples")
    assert len(triples) >= 5
    assert [t["sequence"] for t in triples] == [t["old_position"] for t in triples]
    for t in triples:
        assert 15 <= t["lines_added"] + t["lines_deleted"] <= 80
        assert 1 <= t["n_files"] <= 4
        assert t["n_commits"] == t["new_position"] - t["old_position"]
        assert 1 <= t["n_commits"] <= 5
        assert commits[t["old_position"]] == t["old_commit"]
        assert commits[t["new_position"]] == t["new_commit"]
    for before, after in itertools.pairwise(triples):
        assert before["new_position"] <= after["old_position"]
        if before["new_position"] == after["old_position"]:
            assert before["new_tree"] == after["old_tree"]


def test_the_next_triple_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    """Contiguity: a steady history leaves no gap, and R_new is the next R_old."""
    repo = Repo(tmp_path / "r.git")
    repo.chain(*({b"a.py": text("a", 10, 4 * i)} for i in range(10)))
    triples = mine(repo.path, tmp_path / "data", **WIDE, max_lines=16).rows("triples")
    assert triples[0]["old_position"] == 0
    assert triples[-1]["new_position"] == 9
    assert all(a["new_commit"] == b["old_commit"] for a, b in itertools.pairwise(triples))


def test_the_window_bounds_every_triple(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*({b"a.py": text("a", 10, 4 * i)} for i in range(20)))
    settings = {"min_commits": 20, "min_lines": 1}
    result = mine(repo.path, tmp_path / "data", **settings)
    (row,) = result.rows("repos")
    assert (row["window_from"], row["window_to"], row["mainline_commits"]) == (8, 16, 20)
    assert {c["position"] for c in result.rows("commits")} == set(range(8, 16))
    positions = [p for t in result.rows("triples") for p in (t["old_position"], t["new_position"])]
    assert (min(positions), max(positions)) == (8, 15)


def test_a_short_history_is_skipped_with_a_reason(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"a": b"1\n"}, {b"a": b"2\n"})
    result = mine(repo.path, tmp_path / "data", min_commits=3)
    (row,) = result.rows("repos")
    assert row["status"] == "too_short"
    assert row["reason"] == "2 mainline commits, mine.min_commits is 3"
    assert result.counts == {"skipped_too_short": 1, "mainline_commits": 2}
