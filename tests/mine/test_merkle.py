"""Trees: rebuilt ids are those git computes for the same files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repo_builder import EXECUTABLE, FILE, GITLINK, LINK, Repo, git, objects_of

from codeflow.mine.merkle import TreeSplicer, changed_tree, format_tree, parse_tree
from codeflow.mine.objects import EMPTY_TREE, git_hash

# Few names, so that files and folders often want the same one; `.` and `-` sort before `/`.
PARTS = st.sampled_from([b"a", b"b", b"a.b", b"a-", b"a0", b"\xff"])
PATHS = st.lists(PARTS, min_size=1, max_size=3).map(b"/".join)
ENTRIES = st.tuples(st.sampled_from([FILE, EXECUTABLE, LINK, GITLINK]), st.integers(0, 5))


def consistent(files: dict[bytes, tuple[int, str]]) -> dict[bytes, tuple[int, str]]:
    """Without the files that stand where another path needs a folder."""
    folders = {p.rsplit(b"/", n)[0] for p in files for n in range(1, p.count(b"/") + 1)}
    return {p: e for p, e in files.items() if p not in folders}


states = st.dictionaries(PATHS, ENTRIES, max_size=8).map(
    lambda d: consistent({p: (m, f"{i + 1:040x}") for p, (m, i) in d.items()})
)


def git_tree(repo: Repo, files: dict[bytes, tuple[int, str]]) -> str:
    """The root id by git's own index."""
    lines = b"".join(b"%o %s\t%s\0" % (m, i.encode(), p) for p, (m, i) in files.items())
    index = {"GIT_INDEX_FILE": str(repo.path / "test-index")}
    (repo.path / "test-index").unlink(missing_ok=True)
    git(repo.path, "update-index", "-z", "--index-info", stdin=lines, **index)
    return git(repo.path, "write-tree", "--missing-ok", **index).decode().strip()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    return Repo(tmp_path_factory.mktemp("merkle") / "r.git")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states, states)
def test_an_edited_tree_has_the_id_git_gives_it(
    repo: Repo, old: dict[bytes, tuple[int, str]], new: dict[bytes, tuple[int, str]]
) -> None:
    removed = dict.fromkeys(p for p in old if p not in new)
    changed = {p: e for p, e in new.items() if old.get(p) != e}
    root, expected = git_tree(repo, old), git_tree(repo, new)
    objects = objects_of(repo)
    assert changed_tree(objects.tree, root, removed | changed) == expected
    assert changed_tree(objects.tree, root, changed | removed) == expected  # order is no matter
    assert changed_tree(objects.tree, root, {}) == root
    for keep in (0, 1 << 20):  # trees are forgotten, or none is
        splicer = TreeSplicer(objects.tree, keep)
        assert splicer.leads_to(root, expected, removed | changed)
        assert splicer.leads_to(root, root, {})
        assert splicer.leads_to(root, root, changed | removed) == (root == expected)


@settings(max_examples=80, deadline=None)
@given(st.lists(states, min_size=2, max_size=5))
def test_a_splicer_keeps_what_a_step_made_for_the_next(
    repo: Repo, walk: list[dict[bytes, tuple[int, str]]]
) -> None:
    objects, roots = objects_of(repo), [git_tree(repo, state) for state in walk]
    splicer = TreeSplicer(objects.tree)
    for (old, old_root), (new, new_root) in itertools.pairwise(zip(walk, roots, strict=True)):
        edits = {p: new.get(p) for p in old | new if old.get(p) != new.get(p)}
        assert splicer.leads_to(old_root, new_root, edits)


@pytest.mark.parametrize("bait", [b"x 100644 name", b"100644 name", b"n 40000 name", b"40000 name"])
@pytest.mark.parametrize("present", [True, False])
def test_a_name_that_looks_like_an_entry_misleads_no_proof(
    tmp_path: Path, bait: bytes, present: bool
) -> None:
    repo = Repo(tmp_path / "r.git")
    name = {b"name": b"1"} if present else {}
    # Ids of many contents, so that some end in the zero byte that would make the bait look true.
    for i in range(40):
        files = {bait: b"%d" % i, b"a": b"%d" % i}
        old, new = repo.tree(files | name), repo.tree(files | {b"name": b"2"})
        edit = {b"name": (FILE, git_hash(b"blob", b"2"))}
        splicer = TreeSplicer(objects_of(repo).tree)
        assert splicer.leads_to(old, new, edit)
        assert not splicer.leads_to(old, old, edit)


@settings(max_examples=25, deadline=None)
@given(states)
def test_trees_survive_parsing_and_formatting(
    repo: Repo, files: dict[bytes, tuple[int, str]]
) -> None:
    objects = objects_of(repo)
    todo = [git_tree(repo, files)]
    while todo:
        name = todo.pop()
        raw = objects.tree(name)
        entries = {n: (m, i) for n, m, i in parse_tree(raw)}
        assert format_tree(entries) == raw
        assert git_hash(b"tree", raw) == name
        todo += [i for m, i in entries.values() if m == 0o040000]


def test_removing_everything_leaves_the_empty_tree(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    root = repo.tree({b"a/b/c": b"1", b"a/d": b"2"})
    objects = objects_of(repo)
    assert changed_tree(objects.tree, root, {b"a/b/c": None, b"a/d": None}) == EMPTY_TREE
    assert changed_tree(objects.tree, EMPTY_TREE, {}) == EMPTY_TREE


@pytest.mark.parametrize("raw", [b"100644 a", b"100644 a\0short", b"x a\0" + bytes(20), b" \0"])
def test_bytes_that_are_no_tree_are_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(parse_tree(raw))
