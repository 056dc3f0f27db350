"""Damaged and hostile repositories: a bad part costs that part, and is never mined silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pygit2
import pytest
from repo_builder import (
    EXECUTABLE,
    FILE,
    FOLDER,
    LINK,
    WIDE,
    Mined,
    Repo,
    mine,
    objects_of,
    text,
)

from codeflow.errors import RepositoryError
from codeflow.mine.objects import EMPTY_TREE, CorruptObject
from codeflow.mine.snapshot import Snapshot
from codeflow.paths import is_safe
from codeflow.verify import verify

STEP = WIDE | {"max_commits": 1}


def state(i: int, **more: Any) -> dict[bytes, Any]:
    return {b"src/a.py": text("a", 10, 2 * i)} | {k.encode(): v for k, v in more.items()}


def verified(result: Mined) -> int:
    """The number of triples, all of them proven from the stored tables."""
    found = verify(result.dataset, workers=1, executor="inline")
    assert found.problems == ()
    assert found.proven == found.triples == len(result.rows("triples"))
    return found.triples


def spoil(repo: Repo, name: str, how: str) -> None:
    """Damage one loose object."""
    file = repo.loose(name)
    file.chmod(0o644)
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 0xFF]) + data[-2:])
    elif how == "garbage":
        file.write_bytes(b"garbage")
    elif how == "empty":
        file.write_bytes(b"")
    else:
        kind, content = objects_of(repo)._odb.read(name)
        repo.replace(name, {1: "commit", 2: "tree", 3: "blob"}[kind], content + b"\0x")


# Not "truncated": libgit2 never returns from such a loose object; the unit's time limit ends it.
WAYS = ["missing", "flipped", "garbage", "empty", "replaced"]


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_changed_file_costs_its_triples(tmp_path: Path, how: str) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*(state(i) for i in range(8)))
    spoil(repo, repo.blob(text("a", 10, 6)), how)
    result = mine(repo.path, tmp_path / "data", **STEP)
    # Steps 2-3 and 3-4 touch it; a missing one is a change by id, a damaged one is none at all.
    complete = [t["old_position"] for t in result.rows("triples") if t["patch_complete"]]
    assert complete == [0, 1, 4, 5, 6]
    verified(result)


OTHER = text("other", 30)
FORGED = {
    "moved, now other text": ({b"old": OTHER}, {b"new": OTHER}, b"forged\n"),
    "moved, now binary": ({b"old": OTHER}, {b"new": OTHER}, b"\0forged"),
    "made executable, now other text": (
        {b"x": OTHER}, {b"x": (EXECUTABLE, OTHER)}, b"forged\n"
    ),
    "edited, now binary": ({b"x": b"honest\n"}, {b"x": OTHER}, b"\0forged"),
    "edited, now as before": ({b"x": b"honest\n"}, {b"x": OTHER}, b"honest\n"),
    "edited, now empty": ({b"x": b"honest\n"}, {b"x": OTHER}, b""),
    "edited, now an LFS pointer": (
        {b"x": b"honest\n"}, {b"x": OTHER}, b"version https://git-lfs.github.com/spec/v1\n"
    ),
    "deleted, now binary": ({b"x": OTHER}, {}, b"\0forged"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_change_of_a_forged_file_is_no_triple(tmp_path: Path, case: str) -> None:
    """Whatever its content pretends to be: kinds are only believed of content that was hashed."""
    before, after, content = FORGED[case]
    repo = Repo(tmp_path / "r.git")
    repo.chain(*(state(i) | (before if i < 3 else after) for i in range(6)))
    repo.replace(repo.blob(OTHER), "blob", content)
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 1, 3, 4]
    assert result.counts["rejected_unprovable"] == 1
    assert {r["data"] for r in result.rows("blobs")}.isdisjoint({content} - {b"honest\n"})
    verified(result)


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_unchanged_file_is_left_out_by_name(tmp_path: Path, how: str) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*(state(i, keep=b"keep me\n", link=(LINK, b"a target")) for i in range(3)))
    spoil(repo, repo.blob(b"keep me\n"), how)
    spoil(repo, repo.blob(b"a target"), how)
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert verified(result) == 2
    rows = {r["path"]: r for r in result.rows("blobs")}
    for path in (b"keep", b"link"):
        assert (rows[path]["kind"], rows[path]["size"], rows[path]["data"]) == ("missing", -1, None)


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_unchanged_folder_costs_the_states_that_hold_it(tmp_path: Path, how: str) -> None:
    """Not only the first such state: the next triple starts at the very tree that failed."""
    repo = Repo(tmp_path / "r.git")
    deep = {b"k/bad/x": b"1\n", b"k/good/y": b"2\n"}
    states = [state(i) | (deep if 2 <= i < 5 else {}) for i in range(8)]
    repo.chain(*states)
    spoil(repo, repo.tree({b"x": b"1\n"}), how)
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 5, 6]
    assert verified(result) == 3
    assert result.counts["rejected_unreadable"] > 0


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_root_tree_costs_its_triples(tmp_path: Path, how: str) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*(state(i) for i in range(8)))
    spoil(repo, repo.tree(state(3)), how)
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 1, 4, 5, 6]
    assert verified(result) == 5


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_mainline(tmp_path: Path, how: str) -> None:
    """A missing commit cuts the history short; a damaged one says so."""
    repo = Repo(tmp_path / "r.git")
    commits = repo.chain(*(state(i) for i in range(6)))
    spoil(repo, commits[2], how)
    if how == "missing":
        result = mine(repo.path, tmp_path / "data", **STEP)
        assert result.counts["mainline_commits"] == 3
        return
    with pytest.raises(RepositoryError, match="cannot read the history") as error:
        mine(repo.path, tmp_path / "data", **STEP)
    assert error.value.status == "corrupt"


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_side_branch_costs_only_its_commits(tmp_path: Path, how: str) -> None:
    repo = Repo(tmp_path / "r.git")
    main = repo.chain(state(0), state(1))
    side = repo.commit(state(2), main[:1], b"side\n", head=False)
    tip = repo.commit(state(3), [side], b"side tip\n", head=False)
    repo.commit(state(3), [main[1], tip], b"merge\n")
    spoil(repo, side, how)
    result = mine(repo.path, tmp_path / "data", **STEP)
    messages = [c["message"] for c in result.rows("commits")]
    assert messages == ["step 0\n", "step 1\n", "side tip\n", "merge\n"]
    assert verified(result) == 2


def test_content_of_another_hash_is_noticed(tmp_path: Path) -> None:
    """Valid zlib data of another content, which libgit2 would hand out without a word."""
    repo = Repo(tmp_path / "r.git")
    name = repo.blob(b"honest\n")
    repo.replace(name, "blob", b"forged\n")
    assert objects_of(repo)._odb.read(name)[1] == b"forged\n"
    with pytest.raises(CorruptObject, match=f"blob {name} is damaged"):
        objects_of(repo).blob(name)


HOSTILE = [b"..", b".", b".git", b".GiT", b"git~1", b"/abs", b"a/b", b"../../x", b".git/hooks/x"]


@pytest.mark.parametrize("name", [*HOSTILE, b"", b"n" * 5000])
def test_hostile_names_in_a_change_are_never_mined(tmp_path: Path, name: bytes) -> None:
    repo = Repo(tmp_path / "r.git")
    good = [repo.tree(state(i)) for i in range(6)]
    src = repo.tree({b"a.py": text("a", 10)})
    evil = repo.raw_tree((FILE, name, repo.blob(text("e", 9))), (FOLDER, b"src", src))
    repo.chain(*good[:2], evil, *good[3:])
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 3, 4]
    reasons = ("rejected_unprovable", "rejected_unreadable")
    assert sum(result.counts.get(reason, 0) for reason in reasons) == 2
    verified(result)


def test_a_path_deeper_than_recursion_is_not_mined(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    deep = repo.tree({b"f": b"x\n"})
    for _ in range(2000):
        deep = repo.raw_tree((FOLDER, b"d", deep))
    repo.chain({b"a": b"1\n"}, deep, {b"a": b"2\n"}, {b"a": b"3\n"})
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [2]


def test_a_commit_whose_tree_is_no_tree(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    blob = repo.blob(b"no tree\n")
    nonsense = repo.raw(pygit2.enums.ObjectType.TREE, b"nonsense")
    repo.chain(state(0), state(1), blob, nonsense, "12" * 20, state(2), state(3))
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 5]
    verified(result)


def test_unsorted_and_duplicate_entries_are_unprovable(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    one, two = repo.blob(b"1\n"), repo.blob(b"2\n")
    twice = repo.raw_tree((FILE, b"a", one), (FILE, b"a", two))
    unsorted = repo.raw_tree((FILE, b"z", one), (FILE, b"b", two))
    repo.chain(state(0), twice, state(1), unsorted, state(2), state(3))
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [4]


def test_emptying_and_refilling_a_repository(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    assert repo.raw_tree() == EMPTY_TREE
    repo.chain({b"a": b"1\n"}, EMPTY_TREE, {b"b": b"2\n"}, {b"b": (EXECUTABLE, b"2\n3\n")})
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [0, 1, 2]
    assert verified(result) == 3


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        *(
            (name, False)
            for name in [
                *HOSTILE[:6],
                b"../../x",
                b".git/hooks/x",
                b"",
                b"a//b",
                b"a/",
                b"x/.git/y",
                b"nul\0",
            ]
        ),
        *((b"d/" * n + b"f", n <= 250) for n in (250, 251)),
        *((b"n" * n, n <= 4096) for n in (4096, 4097)),
        *((name, True) for name in [b"...", b".gitignore", b"git", b"a b\n", b"\xff", b"-x"]),
    ],
)
def test_what_a_safe_path_is(path: bytes, safe: bool) -> None:
    assert is_safe(path) is safe


def test_a_state_that_failed_fails_again_and_leaves_no_trace(tmp_path: Path) -> None:
    """A half-read state would make the next triple, which starts at it, look readable."""
    repo = Repo(tmp_path / "r.git")
    root = repo.tree({b"k/bad/x": b"1\n", b"k/good/y": b"2\n"})
    spoil(repo, repo.tree({b"x": b"1\n"}), "missing")
    snapshot = Snapshot()
    for _ in range(2):
        with pytest.raises(KeyError):
            snapshot.add(objects_of(repo), root)
    assert (snapshot.trees, snapshot.blobs, snapshot.states) == ({}, {}, 0)
