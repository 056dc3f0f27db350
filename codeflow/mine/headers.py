"""What stands above the hunks of a patch's section, compared with the change it stands for.

The in-process proof applies hunks and takes paths and modes from the `changes` table; git takes
them from these lines. Both must say the same, or the patch is another one than was proven. Only the
form that the miner writes is accepted: expected lines are built, not parsed, because an unquoted
`diff --git a/x b/x b/x b/x` has no unique reading.
"""

from __future__ import annotations

import re
from typing import Any

_INDEX = re.compile(rb"index ([0-9a-f]{4,40})\.\.([0-9a-f]{4,40})(?: (\d{6}))?\Z")
_SIMILARITY = re.compile(rb"similarity index \d{1,3}%\Z")
_NEEDS_QUOTES = re.compile(rb'[^ -~]|["\\]')
_ESCAPES = {7: b"a", 8: b"b", 9: b"t", 10: b"n", 11: b"v", 12: b"f", 13: b"r", 34: b'"', 92: b"\\"}


def check_header(section: bytes, change: dict[str, Any]) -> str | None:
    """Compare a section's header lines with a row of `changes`.

    Args:
        section: One file's part of a patch, as `split_patch` gives it.
        change: Its row of `changes`.

    Returns:
        What differs, or None.
    """
    header, hunks, _ = section.partition(b"\n@@ ")
    lines = header.removesuffix(b"\n").split(b"\n")
    rest = [line for line in lines if not _INDEX.match(line) and not _SIMILARITY.match(line)]
    expected = _expected(change)
    # libgit2 names the sides of an empty file, too; git only does where hunks follow.
    if hunks or rest == expected + _sides(change):
        expected += _sides(change)
    if rest != expected:
        return _first_difference(rest, expected)
    indexes = [match for line in lines if (match := _INDEX.match(line))]
    if len(indexes) > 1 or (hunks and not indexes):
        return f"the patch header has {len(indexes)} index lines"
    return _index_problem(indexes[0], change) if indexes else None


def edit_header(path: bytes, old_blob: str, new_blob: str, mode: int) -> bytes:
    """The header lines of a file of which nothing but the content changed, as libgit2 has them."""
    old, new = quoted(b"a/" + path), quoted(b"b/" + path)
    index = f"index {old_blob[:7]}..{new_blob[:7]} {mode:06o}".encode()
    return b"diff --git %b %b\n%b\n--- %b\n+++ %b\n" % (old, new, index, old, new)


def quoted(path: bytes) -> bytes:
    """A path as git writes it into patches: C-style quotes only where they are needed."""
    if not _NEEDS_QUOTES.search(path):
        return path
    body = b"".join(
        b"\\" + _ESCAPES[c] if c in _ESCAPES else bytes([c]) if 32 <= c < 127 else b"\\%03o" % c
        for c in path
    )
    return b'"' + body + b'"'


def _expected(change: dict[str, Any]) -> list[bytes]:
    old, new = change["old_path"] or change["path"], change["path"]
    lines = [b"diff --git " + quoted(b"a/" + old) + b" " + quoted(b"b/" + new)]
    if change["old_blob"] is None:
        lines.append(b"new file mode %06o" % change["new_mode"])
    elif change["new_blob"] is None:
        lines.append(b"deleted file mode %06o" % change["old_mode"])
    elif change["old_mode"] != change["new_mode"]:
        lines.append(b"old mode %06o" % change["old_mode"])
        lines.append(b"new mode %06o" % change["new_mode"])
    if change["old_path"] is not None:
        lines += [b"rename from " + quoted(old), b"rename to " + quoted(new)]
    return lines


def _sides(change: dict[str, Any]) -> list[bytes]:
    old, new = b"a/" + (change["old_path"] or change["path"]), b"b/" + change["path"]
    return [
        b"--- " + (b"/dev/null" if change["old_blob"] is None else quoted(old)),
        b"+++ " + (b"/dev/null" if change["new_blob"] is None else quoted(new)),
    ]


def _index_problem(index: re.Match[bytes], change: dict[str, Any]) -> str | None:
    for found, blob in ((index[1], change["old_blob"]), (index[2], change["new_blob"])):
        if not (blob or "0" * 40).startswith(found.decode()):
            return f"the patch header names blob {found.decode()}, the change {blob}"
    if index[3] is not None and int(index[3], 8) != change["new_mode"]:
        return f"the patch header says mode {index[3].decode()}, the change {change['new_mode']:o}"
    return None


def _first_difference(found: list[bytes], expected: list[bytes]) -> str:
    for a, b in zip(found, expected, strict=False):
        if a != b:
            return f"the patch header says {a[:80]!r}, the change {b[:80]!r}"
    longer = max(found, expected, key=len)
    what = "more" if longer is found else "less"
    line = longer[min(len(found), len(expected))]
    return f"the patch header says {what} than the change: {line[:80]!r}"
