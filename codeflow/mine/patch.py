"""Unified diffs of git, bytes in and bytes out: split into files, and apply exactly.

No fuzz, no offset search, no white-space tolerance: a hunk fits at its line or the patch is wrong.
Lines end at `\\n` only; carriage returns, form feeds and U+2028 are ordinary bytes.
"""

from __future__ import annotations

import itertools
import re

import numpy as np

# At most ten digits: no file has more lines, and `int` refuses numbers of thousands of digits.
_HUNK = re.compile(rb"@@ -(\d{1,10})(?:,(\d{1,10}))? \+\d{1,10}(?:,(\d{1,10}))? @@")


class PatchError(ValueError):
    """The patch does not fit the content it is applied to, or is malformed."""


def split_patch(patch: bytes) -> list[bytes]:
    """The sections of a patch, one a file, each starting at its `diff --git` line.

    Hunk line counts decide where a hunk ends, so content that looks like a header is no header.
    """
    lines = _lines(patch)
    starts, i = [], 0
    while i < len(lines):
        if not lines[i].startswith(b"diff --git "):
            raise PatchError(f"line {i + 1}: expected `diff --git`, found {lines[i][:40]!r}")
        starts.append(i)
        i += 1
        while i < len(lines) and not lines[i].startswith(b"diff --git "):
            i = _skip_hunk(lines, i) if lines[i].startswith(b"@@ ") else i + 1
    starts.append(len(lines))
    return [b"".join(lines[a:b]) for a, b in itertools.pairwise(starts)]


def apply_section(old: bytes, section: bytes) -> bytes:
    """The new content of one file: `old` with the section's hunks applied.

    Args:
        old: Old content; empty for an added file.
        section: One file's part of a patch. Without hunks (pure rename, mode change) the content
            stays as it is.

    Raises:
        PatchError: A context or deleted line differs from `old`, or the section is malformed.
    """
    lines = _lines(section)
    at = next((i for i, line in enumerate(lines) if line.startswith(b"@@ ")), len(lines))
    if at == len(lines):
        return old
    # Only the lines that hunks name are ever looked at: a file is its bytes and its line ends.
    ends = np.flatnonzero(np.frombuffer(old, dtype=np.uint8) == ord("\n")) + 1
    starts = np.concatenate(([0], ends, [len(old)] if not old.endswith(b"\n") and old else []))
    starts = starts.astype(np.int64).tolist()
    n_lines = len(starts) - 1
    result, position = [], 0
    while at < len(lines):
        old_start, old_count, new_count = _hunk_header(lines[at])
        start = old_start - 1 if old_count else old_start
        if not position <= start <= n_lines:
            raise PatchError(f"hunk at old line {old_start} is out of order or past the end")
        before, after, at = _hunk_body(lines, at + 1, old_count, new_count)
        if start + old_count > n_lines:
            raise PatchError(f"hunk at old line {old_start} goes past the end")
        expected = b"".join(before)
        if old[starts[start] : starts[start + old_count]] != expected:
            raise PatchError(f"old lines from {start + 1} on are not what the patch expects")
        result += [old[starts[position] : starts[start]], *after]
        position = start + old_count
    return b"".join([*result, old[starts[position] :]])


def _hunk_body(
    lines: list[bytes], at: int, old_count: int, new_count: int
) -> tuple[list[bytes], list[bytes], int]:
    """Old lines and new lines of the hunk whose first line is `at`, and where the next one starts.

    Counts, never the look of a line, decide where it ends.
    """
    before: list[bytes] = []
    after: list[bytes] = []
    while (
        len(before) < old_count
        or len(after) < new_count
        or (at < len(lines) and lines[at][:1] == b"\\")
    ):
        if at >= len(lines):
            raise PatchError("the last hunk is cut short")
        sign, body = lines[at][:1], lines[at][1:]
        at += 1
        if sign == b"\\":
            continue
        if at < len(lines) and lines[at][:1] == b"\\":
            body = body.removesuffix(b"\n")
        if sign in (b" ", b"-"):
            before.append(body)
        if sign in (b" ", b"+"):
            after.append(body)
        if sign not in (b" ", b"-", b"+"):
            raise PatchError(f"unexpected line in a hunk: {sign + body[:40]!r}")
    if len(before) > old_count or len(after) > new_count:
        raise PatchError("a hunk holds more lines than its header says")
    return before, after, at


def _lines(data: bytes) -> list[bytes]:
    """Split after each newline byte; the last line may lack one."""
    lines = data.split(b"\n")
    last = lines.pop()
    result = [line + b"\n" for line in lines]
    return [*result, last] if last else result


def _hunk_header(line: bytes) -> tuple[int, int, int]:
    match = _HUNK.match(line)
    if match is None:
        raise PatchError(f"malformed hunk header {line[:60]!r}")
    old_start, old_count, new_count = match.groups()
    return int(old_start), int(old_count or 1), int(new_count or 1)


def _skip_hunk(lines: list[bytes], at: int) -> int:
    _, old_count, new_count = _hunk_header(lines[at])
    at += 1
    while at < len(lines) and (old_count > 0 or new_count > 0 or lines[at][:1] == b"\\"):
        sign = lines[at][:1]
        old_count -= sign in (b" ", b"-")
        new_count -= sign in (b" ", b"+")
        at += 1
    return at
