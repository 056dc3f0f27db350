"""Patches: what git writes is applied to exactly the new bytes; nothing else is accepted."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pygit2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from repo_builder import Repo, objects_of

from codeflow.mine.patch import PatchError, apply_section, split_patch

LINES = st.sampled_from(
    [
        b"a",
        b"b",
        b"",
        b"  c",
        b"windows\r",
        b"old mac\rline",
        "line\u2028separator\x85\x0c".encode(),
        b"@@ -1 +1 @@",
        b"diff --git a/x b/x",
        b"--- a/x",
        b"+++ b/x",
        b"- minus",
        b"\\ No newline at end of file",
        b"\xff\xfe not utf-8",
    ]
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(LINES, max_size=12))
    return b"\n".join(lines) + (b"\n" if lines and draw(st.booleans()) else b"")


def diff_text(old: bytes, new: bytes) -> bytes:
    return bytes(pygit2.Patch.create_from(old, new, old_as_path="x", new_as_path="x").data)


@settings(max_examples=300, deadline=None)
@given(contents(), contents())
@example(b"a\nb", b"a\nb\n")
@example(b"", b"\\ No newline at end of file")
@example(b"@@ -1 +1 @@\n", b"")
def test_a_diff_applied_gives_exactly_the_new_bytes(old: bytes, new: bytes) -> None:
    patch = diff_text(old, new)
    assert apply_section(old, patch) == new
    if old != new:
        assert split_patch(patch) == [patch]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contents(), contents()), min_size=2, max_size=5))
def test_concatenated_patches_are_split_where_they_were_joined(
    pairs: list[tuple[bytes, bytes]],
) -> None:
    patches = [diff_text(old, new) for old, new in pairs if old != new]
    assert split_patch(b"".join(patches)) == patches


@settings(max_examples=300, deadline=None)
@given(contents(), contents(), st.data())
def test_a_mutated_patch_raises_nothing_but_patch_error(
    old: bytes, new: bytes, data: st.DataObject
) -> None:
    patch = bytearray(diff_text(old, new))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(patch)))
        noise = data.draw(st.sampled_from([b"", b"\n", b"@@ ", b"-", b"+", b"9" * 5000, b"\\"]))
        patch[at : at + data.draw(st.integers(0, 3))] = noise
    for function in (split_patch, lambda p: apply_section(old, p)):
        with contextlib.suppress(PatchError):
            function(bytes(patch))


SECTION = b"diff --git a/x b/x\n--- a/x\n+++ b/x\n"


@pytest.mark.parametrize(
    ("hunks", "message"),
    [
        (b"@@ -1,2 +1,2 @@\n a\n", "does not hold the lines"),
        (b"@@ -1 +1 @@\n-a\n+c", "cut short"),
        (b"@@ -1 +1 @@\n-b\n+c\n", "old lines from 1 on are not what"),
        (b"@@ -1 +1 @@\n-a\r\n+c\n", "old lines from 1 on are not what"),
        (b"@@ -9 +9 @@\n-a\n+c\n", "past the end"),
        (b"@@ -0 +1 @@\n-a\n+c\n", "out of order"),
        (b"@@ -2 +2 @@\n-b\n+c\n@@ -1 +1 @@\n-a\n+c\n", "out of order"),
        (b"@@ -1,1 +1,0 @@\n-a\n b\n", "does not hold the lines"),
        (b"@@ -1,2 +1,1 @@\n a\n b\n", "does not hold the lines"),
        (b"@@ -1 +1 @@\n*a\n-a\n+c\n", "unexpected line"),
        (b"@@ one @@\n", "malformed hunk header"),
        (b"@@ -%s +1 @@\n-a\n+c\n" % (b"1" * 5000), "malformed hunk header"),
    ],
)
def test_malformed_hunks_are_named(hunks: bytes, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        apply_section(b"a\nb\n", SECTION + hunks)


def test_a_section_without_hunks_leaves_the_content() -> None:
    rename = b"diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n"
    assert apply_section(b"any\n", rename) == b"any\n"
    assert split_patch(rename + rename) == [rename, rename]
    assert split_patch(b"") == []


def test_text_before_the_first_section_is_an_error() -> None:
    with pytest.raises(PatchError, match="line 1: expected `diff --git`"):
        split_patch(b"From: somebody\n" + SECTION)


def test_patches_of_a_repository_split_into_one_section_a_file(tmp_path: Path) -> None:
    """Renames, modes and content that looks like headers, as libgit2 writes them for two trees."""
    repo = Repo(tmp_path / "r.git")
    body = b"".join(b"line %d\n" % i for i in range(30))
    old = {b"a": b"diff --git a/a b/a\n@@ -1 +1 @@\n", b"moved": body, b"mode": b"x\n", b"z": b"1"}
    new = {
        b"a": b"@@ -1 +1 @@\n",
        b"went": body + b"more\n",
        b"mode": (0o100755, b"x\n"),
        b"z": b"2",
    }
    found = list(objects_of(repo).changes(repo.tree(old), repo.tree(new), 400))
    sections = [section for _, section, _, _ in found]
    assert [delta.status for delta, _, _, _ in found] == ["M", "M", "R", "M"]
    assert split_patch(b"".join(sections)) == sections
    for delta, section, added, deleted in found:
        before = objects_of(repo).blob(delta.old_blob)
        assert apply_section(before, section) == objects_of(repo).blob(delta.new_blob)
        body_lines = section.partition(b"\n@@ ")[2].split(b"\n")[1:]
        assert added == sum(line.startswith(b"+") for line in body_lines)
        assert deleted == sum(line.startswith(b"-") for line in body_lines)
