"""Mainline, window, and the commits each step brought in, against git's own answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import Repo, git, objects_of

from codeflow.mine.commits import Commit, parse_commit
from codeflow.mine.history import ReadCommit, Window, mainline, maturity_window, steps


def reader(repo: Repo) -> ReadCommit:
    objects = objects_of(repo)
    return lambda name: parse_commit(name, objects.commit(name))


def random_history(repo: Repo, seed: int, n: int) -> str:
    """Commits with random parents among the last dozen: nested, criss-cross and octopus merges."""
    random_ = random.Random(seed)
    tree = repo.tree({b"f": b"x\n"})
    commits: list[str] = []
    for i in range(n):
        recent = commits[-12:]
        n_parents = min(len(recent), random_.choice([1, 1, 1, 1, 2, 2, 3]))
        parents = random_.sample(recent, n_parents)
        commits.append(repo.commit(tree, parents, b"commit %d\n" % i))
    return commits[-1]


@pytest.mark.parametrize("seed", range(6))
def test_steps_are_what_git_says_each_mainline_commit_brought(tmp_path: Path, seed: int) -> None:
    repo = Repo(tmp_path / "r.git")
    head = random_history(repo, seed, 60)
    read = reader(repo)
    chain = mainline(read, head)
    by_git = git(repo.path, "rev-list", "--first-parent", "--reverse", head).decode().split()
    assert [c.id for c in chain] == by_git
    for start in {0, 1, len(chain) // 3}:
        window = Window(start, len(chain))
        found = steps(read, chain, window)
        assert len(found) == len(chain) - start
        seen: set[str] = set()
        for position, step in zip(range(start, window.stop), found, strict=True):
            before = [f"^{chain[position - 1].id}"] if position else []
            expected = git(repo.path, "rev-list", chain[position].id, *before).decode().split()
            assert {c.id for c in step} == set(expected)
            assert len(step) == len(expected)
            assert step[-1].id == chain[position].id
            order = {c.id: i for i, c in enumerate(step)}
            for commit in step:
                assert all(order[p] < order[commit.id] for p in commit.parents if p in order)
            assert not seen & order.keys()
            seen |= order.keys()


def test_a_long_side_branch_needs_no_recursion() -> None:
    """5,000 commits on a branch, merged in one step."""
    commits = {"root": _commit("root"), "main": _commit("main", "root")}
    tip = "root"
    for i in range(5000):
        commits[f"side{i}"] = _commit(f"side{i}", tip)
        tip = f"side{i}"
    commits["merge"] = _commit("merge", "main", tip)
    chain = mainline(commits.__getitem__, "merge")
    assert [c.id for c in chain] == ["root", "main", "merge"]
    found = steps(commits.__getitem__, chain, Window(1, 3))
    assert [len(step) for step in found] == [1, 5001]
    assert [c.id for c in found[1]] == [f"side{i}" for i in range(5000)] + ["merge"]


def test_missing_ancestors_cut_the_history_short() -> None:
    commits = {c.id: c for c in (_commit("b", "gone"), _commit("c", "b"), _commit("s", "lost"))}
    commits["d"] = _commit("d", "c", "s")
    chain = mainline(commits.__getitem__, "d")
    assert [c.id for c in chain] == ["b", "c", "d"]
    assert [[c.id for c in s] for s in steps(commits.__getitem__, chain, Window(1, 3))] == [
        ["c"],
        ["s", "d"],
    ]
    with pytest.raises(KeyError):
        mainline(commits.__getitem__, "gone")


@given(st.integers(0, 5000), st.floats(0, 1), st.floats(0, 1))
def test_a_window_lies_inside_its_mainline(length: int, start: float, stop: float) -> None:
    window = maturity_window(length, start, stop)
    assert 0 <= window.start <= window.stop <= length


def test_the_default_window_of_ten_commits() -> None:
    assert maturity_window(10, 0.4, 0.8) == Window(4, 8)
    assert maturity_window(10, 0.8, 0.4) == Window(8, 8)


def _commit(name: str, *parents: str) -> Commit:
    return Commit(name, "0" * 40, parents, b"", 0, 0, "", None)
