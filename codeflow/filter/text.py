"""What the bytes of a change look like: line lengths, letters, encoded data, conflict markers.

Everything works on whole byte strings with `bytes` methods and numpy, never a character at a time.
That costs one joined copy of the added lines and gains a factor of ten over a loop.
"""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass

import numpy as np

#: Languages in which moving a line to the right changes what it means.
INDENTED = frozenset({"F#", "Haskell", "Makefile", "Python", "YAML"})

_SPACE = b" \t\n\r\v\f"
_DIGITS_AND_LETTERS = (string.ascii_letters + string.digits).encode()
# UTF-8 beyond ASCII is mostly letters; counting it as such spares text in other scripts.
_ALNUM = _DIGITS_AND_LETTERS + bytes(range(0x80, 0x100))
_IS_BASE64 = np.isin(np.arange(256), np.frombuffer(_DIGITS_AND_LETTERS + b"+/", np.uint8))
#: Encoders wrap at 60 columns or more; a run this long at a line's end goes on in the next line.
_WRAPPED_RUN = 60
# A lone `=======` underlines a title in several markups, so only the other markers count.
_CONFLICT = re.compile(rb"^(?:<<<<<<<|>>>>>>>|\|\|\|\|\|\|\|) ", re.MULTILINE)


@dataclass(frozen=True)
class TextScores:
    """Columns of `scores` about added lines; lengths in bytes, line ends not counted."""

    max_line: int
    mean_line: float
    alnum_fraction: float
    longest_base64: int
    conflict_markers: int


def added_lines(patch: bytes) -> list[bytes]:
    """The lines a git unified diff adds, in its order, without `+` and line feed.

    Lines end at line feeds only. Inside a hunk every line starts with one of ` +-\\`, so a file's
    section can be cut at `diff --git` and its headers end at the first `@@` without counting lines.
    """
    added: list[bytes] = []
    for section in (b"\n" + patch).split(b"\ndiff --git "):
        hunks = section[section.find(b"\n@@ ") :] if b"\n@@ " in section else b""
        added += [line[1:] for line in hunks.split(b"\n") if line[:1] == b"+"]
    return added


def text_scores(lines: list[bytes]) -> TextScores:
    """Measure added lines. Without any: zeros, and an alphanumeric fraction of 1.

    Line and alphanumeric statistics are those of StarCoder's filters (Li et al., 2023).
    """
    text = b"\n".join(lines)
    size = sum(map(len, lines))
    alnum = len(text) - len(text.translate(None, _ALNUM))
    return TextScores(
        max_line=max(map(len, lines), default=0),
        mean_line=size / len(lines) if lines else 0.0,
        alnum_fraction=alnum / size if size else 1.0,
        longest_base64=longest_base64(text),
        conflict_markers=len(_CONFLICT.findall(text)),
    )


def longest_base64(text: bytes) -> int:
    """Length of the longest run of base64 digits (hex included), continued over wrapped lines.

    The idea is OpenCoder's encoded-data filter (Huang et al., 2024). A line feed belongs to a run
    only after `_WRAPPED_RUN` digits, so that a list of words is not taken for data.
    """
    data = np.frombuffer(text, np.uint8)
    breaks = np.concatenate(([-1], np.flatnonzero(~_IS_BASE64[data]), [len(data)]))
    runs = np.diff(breaks) - 1
    if runs.max() < _WRAPPED_RUN:
        return int(runs.max())
    ends = breaks[1:-1]
    goes_on = (data[ends] == ord("\n")) & (runs[:-1] >= _WRAPPED_RUN)
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    return int(np.add.reduceat(runs, starts).max())


def substance(data: bytes, language: str) -> bytes:
    """A digest (16 bytes) of a file that ignores white space, except where that carries meaning.

    In indented languages it covers the indentation and the content of each line that is not
    blank; reflowed code there differs, which errs towards keeping a change.
    """
    if language in INDENTED:
        lines = [line for line in data.split(b"\n") if line.strip(_SPACE)]
        data = b"\n".join(
            line[: len(line) - len(line.lstrip(b" \t"))] + line.translate(None, _SPACE)
            for line in lines
        )
    else:
        data = data.translate(None, _SPACE)
    return hashlib.blake2b(data, digest_size=16).digest()


def is_utf8(data: bytes) -> bool:
    """Is the whole file valid UTF-8?"""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
