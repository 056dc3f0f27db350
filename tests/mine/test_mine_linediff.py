"""Diffs of what differs: as good as diffs of whole files, and the same where lines are unique."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pygit2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeflow.mine.linediff import FLAGS, LineDiff
from codeflow.mine.patch import apply_section

HEADER = b"diff --git a/x b/x\n--- a/x\n+++ b/x\n"


def of_whole(old: bytes, new: bytes) -> tuple[bytes, int, int]:
    """What libgit2 says of the whole texts."""
    patch = pygit2.Patch.create_from(old, new, flag=FLAGS)
    _, added, deleted = patch.line_stats
    _, at, hunks = patch.data.partition(b"\n@@ ")
    return at[1:] + hunks, added, deleted


def lines(*numbers: int, template: str = "line {} of the text") -> list[str]:
    return [template.format(n) for n in numbers]


def text(parts: list[str]) -> bytes:
    return "".join(p + "\n" for p in parts).encode()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.booleans(), st.booleans())
def test_where_every_line_is_unique_the_hunks_are_those_of_the_whole_files(
    seed: int, edits: int, indented: bool, open_end: bool
) -> None:
    rng = random.Random(seed)
    template = "    line {} of the text" if indented else "line {} of the text"
    old = lines(*range(rng.choice([1, 3, 50, 400, 4000])), template=template)
    new = list(old)
    for edit in range(edits):
        at, fresh = (
            rng.randrange(len(new) + 1),
            lines(*range(rng.randrange(4)), template=f"{edit}{{}}"),
        )
        new[at : at + rng.randrange(4)] = fresh
    before, after = text(old), text(new)
    if open_end:
        after = after[:-1]
    assert LineDiff().hunks(before, after) == of_whole(before, after)


@pytest.mark.parametrize("seed", range(40))
def test_periodic_texts_get_valid_hunks_with_all_their_context(seed: int) -> None:
    """Where hunks can slide for pages, also past the margins of the stretch that is shown."""
    rng = random.Random(seed)
    kinds = [b"a" * 120, b"b" * 120, b"", b"    " + b"c" * 100, b"}"]
    for _ in range(100):
        period = rng.choices(kinds, k=rng.randrange(1, 4))
        old = rng.choices(kinds, k=rng.randrange(3)) + period * rng.choice([1, 30, 40, 60])
        old += rng.choices(kinds, k=rng.randrange(3))
        new = list(old)
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(new) + 1)
            new[at : at + rng.randrange(3)] = period * rng.randrange(3) + kinds[: rng.randrange(2)]
        before, after = (b"".join(line + b"\n" for line in lines) for lines in (old, new))
        hunks, added, deleted = LineDiff().hunks(before, after)
        assert apply_section(before, HEADER + hunks) == after
        signs = [line[:1] for line in hunks.split(b"\n")]
        assert (signs.count(b"+"), signs.count(b"-")) == (added, deleted)
        assert context_lines(hunks) == full_context(hunks, len(old))


def context_lines(hunks: bytes) -> tuple[int, int]:
    """Equal lines before the first change and after the last."""
    signs = b"".join(line[:1] for line in hunks.split(b"\n")[1:])
    return len(signs) - len(signs.lstrip()), len(signs) - len(signs.rstrip())


def full_context(hunks: bytes, old_lines: int) -> tuple[int, int]:
    """How many there must be: three, or all there are."""
    if not hunks:
        return 0, 0
    before, after = context_lines(hunks)
    found = re.findall(rb"^@@ -(\d+)(?:,(\d+))?", hunks, re.M)
    start, last, count = int(found[0][0]), int(found[-1][0]), int(found[-1][1] or 1)
    left = old_lines - (last + count - 1)
    return min(3, max(start - 1, 0) + before), min(3, left + after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"", b""),
        (b"", b"a\n"),
        (b"a\n", b""),
        (b"a", b"a\n"),
        (b"a\n" * 3000, b"a\n" * 3001),  # a hunk that slides from one end to the other
        (b"a\n" * 3001, b"a\n" * 3000),
        (b"x\n" + b"\n" * 3000 + b"y\n", b"x\n" + b"\n" * 3400 + b"y\n"),
        (b"int f()\n" + b"  a;\n" * 900 + b"  b;\n", b"int f()\n" + b"  a;\n" * 900 + b"  c;\n"),
        (b"0\n" * 5000 + b"1\n" + b"0\n" * 5000, b"0\n" * 5000 + b"2\n" + b"0\n" * 5000),
        (b"z" * 70_000 + b"\nq", b"z" * 70_000 + b"\nr"),  # lines longer than any block
        (b"z" * 70_000 + b"a", b"z" * 70_000 + b"b"),
        (b"a" + b"z" * 70_000, b"b" + b"z" * 70_000),
    ],
)
def test_ends_that_look_alike(old: bytes, new: bytes) -> None:
    assert LineDiff().hunks(old, new) == of_whole(old, new)


@pytest.mark.parametrize("distance", [3, 60, 900, 1100])
def test_the_heading_is_found_however_far_above_it_is(distance: int) -> None:
    body = lines(*range(distance + 40), template="    statement {}")
    old = ["static int far_above(void)", *body]
    new = [*old[: distance + 5], "    another", *old[distance + 5 :]]
    hunks, *_ = LineDiff().hunks(text(old), text(new))
    assert b"@@ static int far_above(void)\n" in hunks
    assert hunks == of_whole(text(old), text(new))[0]


@pytest.mark.parametrize("width", [1, 80, 300, 340, 400, 500, 600, 1100, 5000])
def test_long_lines_keep_their_headings(width: int) -> None:
    rng = random.Random(width)
    old = lines(*range(40), template="Sentence {} " + "w" * width)
    for _ in range(20):
        new = list(old)
        new[rng.randrange(40)] = "another one"
        before, after = text(old), text(new)
        assert LineDiff().hunks(before, after) == of_whole(before, after)


def test_git_applies_the_hunks_of_a_cut_text(tmp_path: Path) -> None:
    old = text(lines(*range(5000)))
    new = old.replace(b"line 1000 ", b"LINE 1000 ").replace(b"line 4000 of the text\n", b"")
    (tmp_path / "x").write_bytes(old)
    (tmp_path / "patch").write_bytes(HEADER + LineDiff().hunks(old, new)[0])
    subprocess.run(["git", "apply", "patch"], cwd=tmp_path, check=True)
    assert (tmp_path / "x").read_bytes() == new
