"""What counts as the same change: changed lines, exact keys, licence ranks."""

from __future__ import annotations

import random
import shutil
import subprocess

import dedup_triples as make
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.dedup import cfmh1, keys
from codeflow.dedup.keys import BlobChange

HEX_A, HEX_B, HEX_C = "a" * 40, "b" * 40, "c" * 40
NONE = bytes(16)


def shingles(patch: bytes) -> set[int]:
    text = keys.shingle_text(keys.changed_lines(patch))
    return set(cfmh1.shingle_sets([text]).values.tolist())


def test_only_changed_lines_count() -> None:
    patch = make.patch(["old line"], ["new line", "", "\tmore\r"]) + make.patch(["x"], path="g.py")
    assert keys.changed_lines(patch) == [[b"-old line", b"+new line", b"+", b"+\tmore\r"], [b"-x"]]


def test_lines_that_look_like_headers_are_lines() -> None:
    patch = make.patch(["-- a/f.py", "@@ -1 +1 @@"], ["++ b/f.py", "diff --git a/x b/x"])
    assert keys.changed_lines(patch) == [
        [b"--- a/f.py", b"-@@ -1 +1 @@", b"+++ b/f.py", b"+diff --git a/x b/x"]
    ]


@pytest.mark.parametrize(
    "section",
    [
        b"",
        b"From 1234\n\n- a list in a message\n---\n+1\n",
        b"diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n",
        b"diff --git a/x b/x\nold mode 100644\nnew mode 100755\n",
        b"diff --git a/x b/x\nindex 1..2 100644\nBinary files a/x and b/x differ\n",
        b"diff --git a/x b/x\nindex 1..2\nGIT binary patch\nliteral 3\nKc$@+-zz\n\n",
    ],
)
def test_sections_without_hunks_have_no_changed_lines(section: bytes) -> None:
    assert keys.changed_lines(section) == []
    after = make.patch(["a"], ["b"])
    trailer = section if section.startswith(b"diff") else b""
    assert keys.changed_lines(section + after + trailer) == [[b"-a", b"+b"]]


def test_no_newline_markers_are_not_lines() -> None:
    patch = make.patch(["a"]) + b"\\ No newline at end of file\n+b\n\\ No newline at end of file\n"
    assert keys.changed_lines(patch) == [[b"-a", b"+b"]]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@given(
    st.lists(st.sampled_from(["x", "y", "", "-- z", "++ z", "@@ -1 +1 @@", "diff --git a b"])),
    st.lists(st.sampled_from(["x", "y", "", "-- z", "++ z", "@@ -1 +1 @@", "diff --git a b"])),
)
def test_as_many_lines_as_git_counts(old: list[str], new: list[str]) -> None:
    with make.temporary_folder() as folder:
        for name, lines in (("old", old), ("new", new)):
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
        diff = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff"]
        patch = subprocess.run([*diff, "old", "new"], cwd=folder, capture_output=True).stdout
        stat = subprocess.run(
            [*diff, "--numstat", "old", "new"], cwd=folder, capture_output=True, text=True
        ).stdout
    added, deleted = map(int, stat.split()[:2]) if stat else (0, 0)
    signs = [line[:1] for lines in keys.changed_lines(patch) for line in lines]
    assert (signs.count(b"+"), signs.count(b"-")) == (added, deleted)


def test_another_base_changes_no_shingle() -> None:
    rng = random.Random(1)
    old, new = make.lines_of(make.words(rng, 80)), make.lines_of(make.words(rng, 80))
    here = make.patch(old, new, at=10, context="here")
    there = make.patch(old, new, at=900, context="there and elsewhere")
    assert here != there
    assert shingles(here) == shingles(there)


def test_adding_and_deleting_the_same_lines_differ() -> None:
    lines = make.lines_of(make.words(random.Random(2), 160))
    added, deleted = shingles(make.patch(added=lines)), shingles(make.patch(deleted=lines))
    assert len(added) > 100
    assert len(added & deleted) / len(added | deleted) < 0.5
    key = [
        keys.change_key(keys.changed_lines(p), NONE)
        for p in (make.patch(added=lines), make.patch(deleted=lines))
    ]
    assert key[0] != key[1]


def test_change_key_ignores_base_paths_file_order_and_white_space() -> None:
    first, second = make.patch(["a b"], ["a  c"], path="f"), make.patch([], ["d"], path="g")
    moved = make.patch([], ["\td", "   "], path="src/g", at=50)
    spaced = make.patch(["  a b"], ["a\tc \r"], path="src/f", at=9)
    one = keys.change_key(keys.changed_lines(first + second), NONE)
    assert keys.change_key(keys.changed_lines(moved + spaced), NONE) == one
    joined = make.patch(["ab"], ["a  c"], path="f")
    assert keys.change_key(keys.changed_lines(joined + second), NONE) != one
    assert keys.change_key(keys.changed_lines(first), NONE) != one


def test_changes_without_lines_are_told_apart_by_their_delta() -> None:
    blank = keys.changed_lines(make.patch(["", "  "], ["\t"]))
    assert keys.change_key([], b"1" * 16) != keys.change_key([], b"2" * 16)
    assert keys.change_key(blank, b"1" * 16) == keys.change_key([], b"1" * 16)
    assert keys.change_key([], b"1" * 16) != b"1" * 16


blob = st.sampled_from([None, HEX_A, HEX_B, HEX_C])
change = st.builds(BlobChange, st.sampled_from([b"p", b"q", b"p\n", b"\xff/q"]), blob, blob)


@given(st.lists(change, max_size=5), st.lists(change, max_size=5), st.randoms())
def test_delta_and_blob_keys_are_of_multisets(
    one: list[BlobChange], two: list[BlobChange], rng: random.Random
) -> None:
    shuffled = rng.sample(one, len(one))
    assert keys.delta_key(shuffled) == keys.delta_key(one)
    assert keys.blob_key(shuffled) == keys.blob_key(one)
    order = [sorted(c, key=repr) for c in (one, two)]
    assert (keys.delta_key(one) == keys.delta_key(two)) == (order[0] == order[1])
    blobs = [sorted((c[1:] for c in cs), key=repr) for cs in (one, two)]
    assert (keys.blob_key(one) == keys.blob_key(two)) == (blobs[0] == blobs[1])


def test_keys_are_those_of_earlier_versions() -> None:
    """Keys are stored; these values were written down when the format was fixed."""
    changes = [BlobChange(b"f.py", HEX_A, HEX_B), BlobChange(b"g", None, HEX_C)]
    lines = keys.changed_lines(make.patch(["old"], ["new", "  x"]))
    assert [k.hex() for k in (keys.delta_key(changes), keys.blob_key(changes))] == [
        "e90d2d74685a8d88115026f6602a5330",
        "f2d9a1a292853b6d387a8573cbdca826",
    ]
    assert keys.change_key(lines, NONE).hex() == "f83e60be5c99c04206b8d0bf365d19ed"


@pytest.mark.parametrize(
    ("spdx", "rank"),
    [
        ("MIT", 0),
        ("Apache-2.0", 0),
        ("BSD-3-Clause", 0),
        ("0BSD", 0),
        (None, 1),
        ("", 1),
        ("NOASSERTION", 1),
        ("MITNFA", 1),
        ("GPL-3.0-only", 2),
        ("LGPL-2.1-or-later", 2),
        ("AGPL-3.0-only", 2),
        ("MPL-2.0", 2),
        ("CC-BY-SA-4.0", 2),
        ("CC-BY-NC-SA-4.0", 2),
    ],
)
def test_license_ranks(spdx: str | None, rank: int) -> None:
    assert keys.license_rank(spdx) == rank
