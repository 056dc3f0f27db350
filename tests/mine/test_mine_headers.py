"""Header lines of a patch are held against the change they stand for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repo_builder import EXECUTABLE, FILE, LINK, WIDE, Repo, git, mine, text

from codeflow.mine.headers import check_header, quoted
from codeflow.mine.patch import split_patch

OLD, NEW = "12" * 20, "34" * 20


def change(**values: Any) -> dict[str, Any]:
    row = {"path": b"a.py", "old_path": None, "old_mode": FILE, "new_mode": FILE}
    return row | {"old_blob": OLD, "new_blob": NEW} | values


SECTION = (
    b"diff --git a/a.py b/a.py\nindex 1212121..3434343 100644\n--- a/a.py\n+++ b/a.py\n"
    b"@@ -1 +1 @@\n-x\n+y\n"
)


def test_a_header_that_agrees() -> None:
    assert check_header(SECTION, change()) is None


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (b"a/a.py b/", b"a/b.py b/"),
        (b" b/a.py\nindex", b" b/b.py\nindex"),
        (b"--- a/a.py", b"--- a/b.py"),
        (b"--- a/a.py", b"--- /dev/null"),
        (b"+++ b/a.py", b"+++ b/../a.py"),
        (b"+++ b/a.py", b'+++ "b/a.py"'),
        (b"100644", b"100755"),
        (b"1212121..", b"3434343.."),
        (b"..3434343", b"..0000000"),
        (b"index 1212121..3434343 100644\n", b""),
        (b"index", b"old mode 100644\nnew mode 100755\nindex"),
        (b"index", b"new file mode 100644\nindex"),
        (b"index", b"rename from a.py\nrename to a.py\nindex"),
        (b"index", b"similarity index 90%\ncopy from x\nindex"),
        (b"index", b"index 1212121..3434343\nindex"),
        (b"index", b"\nindex"),
    ],
)
def test_any_other_header_is_found(found: bytes, instead: bytes) -> None:
    assert found in SECTION
    problem = check_header(SECTION.replace(found, instead, 1), change())
    assert problem is not None
    assert "patch header" in problem


@pytest.mark.parametrize(
    "values",
    [
        {"path": b"b.py"},
        {"old_path": b"b.py"},
        {"new_mode": EXECUTABLE},
        {"old_mode": LINK},
        {"old_blob": None, "old_mode": 0},
        {"new_blob": None, "new_mode": 0},
        {"old_blob": NEW},
        {"new_blob": OLD},
    ],
)
def test_any_other_change_is_found(values: dict[str, Any]) -> None:
    assert check_header(SECTION, change(**values)) is not None


def test_content_that_looks_like_a_header_is_content() -> None:
    hunk = b"@@ -1 +1,2 @@\n x\n+@@ diff --git a/x b/x\n"
    section = SECTION.partition(b"@@")[0] + hunk
    assert check_header(section, change()) is None


@pytest.mark.parametrize(
    ("path", "written"),
    [
        (b"a b/c.py", b"a b/c.py"),
        (b"caf\xc3\xa9", b'"caf\\303\\251"'),
        (b'say "x"', b'"say \\"x\\""'),
        (b"back\\slash", b'"back\\\\slash"'),
        (b"tab\tline\nbell\a", b'"tab\\tline\\nbell\\a"'),
        (b"\x01\x7f\x80", b'"\\001\\177\\200"'),
    ],
)
def test_quoting(path: bytes, written: bytes) -> None:
    assert quoted(path) == written


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=12), min_size=2, max_size=12, unique=True))
def test_what_libgit2_writes_is_what_is_expected(
    tmp_path_factory: pytest.TempPathFactory, names: list[bytes]
) -> None:
    """Any file names, added, changed, and deleted: sections of the miner agree with their rows."""
    bad = (b".", b"..", b".git", b"git~1")
    clean = sorted({n.translate(None, b"\0/") for n in names} - {b"", *bad})
    clean = [b"f" + n for n in clean]
    folder = tmp_path_factory.mktemp("names")
    repo = Repo(folder / "r.git")
    before = {n: text("a", 3, i * 7) for i, n in enumerate(clean[1:])}
    after = {n: text("a", 3, i * 7 + 1) for i, n in enumerate(clean[:-1])}
    base = {b"keep": b"kept\n"}
    repo.chain(base | before, base | after)
    result = mine(repo.path, folder / "data", **WIDE, max_commits=1)
    for triple in result.rows("triples"):
        changes = [c for c in result.changes(triple["triple_id"]) if c["in_patch"]]
        sections = split_patch(triple["patch"])
        assert [check_header(s, c) for s, c in zip(sections, changes, strict=True)] == [None] * len(
            changes
        )
        for c in changes:  # git's own patch quotes the same way
            own = git(repo.path, "diff-tree", "-p", triple["old_tree"], triple["new_tree"])
            assert quoted(b"b/" + c["path"]) in own
