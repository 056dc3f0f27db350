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
    lines = section.split(b"\n")
    if lines.pop():
        raise PatchError("the last line is cut short")
    # In a hunk every line begins with a space, a sign or a backslash, so these are headers.
    headers = [i for i, line in enumerate(lines) if line[:3] == b"@@ "]
    if not headers:
        return old
    # Only the lines that hunks name are ever looked at: a file is its bytes and its line ends.
    ends = np.flatnonzero(np.frombuffer(old, dtype=np.uint8) == ord("\n"))
    n_lines = len(ends) + (bool(old) and not old.endswith(b"\n"))

    def offset(line: int) -> int:
        return int(ends[line - 1]) + 1 if 0 < line <= len(ends) else len(old) if line else 0

    result, position = [], 0
    for at, end in itertools.pairwise([*headers, len(lines)]):
        old_start, old_count, new_count = _hunk_header(lines[at])
        start = old_start - 1 if old_count else old_start
        if not position <= start <= n_lines:
            raise PatchError(f"hunk at old line {old_start} is out of order or past the end")
        before, after = _hunk_sides(lines[at + 1 : end], old_count, new_count)
        if start + old_count > n_lines:
            raise PatchError(f"hunk at old line {old_start} goes past the end")
        if old[offset(start) : offset(start + old_count)] != before:
            raise PatchError(f"old lines from {start + 1} on are not what the patch expects")
        result += [old[offset(position) : offset(start)], after]
        position = start + old_count
    return b"".join([*result, old[offset(position) :]])


def _hunk_sides(lines: list[bytes], old_count: int, new_count: int) -> tuple[bytes, bytes]:
    """Old text and new text of a hunk, given its lines without their newlines."""
    before = [line[1:] for line in lines if line[:1] in (b" ", b"-")]
    after = [line[1:] for line in lines if line[:1] in (b" ", b"+")]
    if len(before) != old_count or len(after) != new_count:
        raise PatchError("a hunk does not hold the lines that its header says")
    both = sum(line[:1] == b" " for line in lines)
    if len(before) + len(after) - both == len(lines):
        return b"\n".join([*before, b""]), b"\n".join([*after, b""])
    return _with_open_ends(lines)


def _with_open_ends(lines: list[bytes]) -> tuple[bytes, bytes]:
    """`_hunk_sides` where a backslash line says that the line before it ends without a newline."""
    before, after = [], []
    for line, following in itertools.pairwise([*lines, b""]):
        sign, body = line[:1], line[1:] + b"\n" * (following[:1] != b"\\")
        if sign not in (b" ", b"-", b"+", b"\\"):
            raise PatchError(f"unexpected line in a hunk: {line[:40]!r}")
        if sign in (b" ", b"-"):
            before.append(body)
        if sign in (b" ", b"+"):
            after.append(body)
    return b"".join(before), b"".join(after)


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
