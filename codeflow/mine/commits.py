"""Raw git commits to values. Parsed by hand, so that no malformed header can raise."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_IDENTITY = re.compile(
    rb"(?P<name>.*?)<(?P<email>[^<>]*)>(?:\s+(?P<time>-?\d+)(?:\s+(?P<zone>[+-]\d+))?)?", re.S
)
_INT64 = 1 << 63

_BOT = re.compile(
    r"\[bot\]|\bbot\b|-bot\b|^(?:dependabot|renovate|greenkeeper|pyup|snyk|mergify|bors|github-actions"
    r"|pre-commit-ci|allcontributors|codecov|imgbot|weblate|transifex|semantic-release|web-flow)\b",
    re.I,
)
_REVERT = re.compile(r"(?:\A\s*revert\b|^this reverts commit [0-9a-f]{7,40})", re.I | re.M)
_PULL_REQUEST = re.compile(
    r"^Merge pull request #(\d{1,9})\b|\(#(\d{1,9})\)\s*$|^Merge branch .* of .* \(#(\d{1,9})\)"
)
_TRAILER = re.compile(r"[A-Za-z][A-Za-z0-9-]*: \S")
_ADDRESS = re.compile(r"<[^<>@\s]*@[^<>\s]*>")
_RAW_ADDRESS = re.compile(rb"<[^<>@\s]*@[^<>\s]*>")
_CLOSES = re.compile(
    r"\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+"
    r"(?:[\w.-]+/[\w.-]+)?(?:#|https?://[^\s/]+/[\w.-]+/[\w.-]+/issues/)(\d{1,9})\b",
    re.I,
)


@dataclass(frozen=True)
class Commit:
    """A commit as git stores it.

    Attributes:
        message: Decoded with the declared encoding, UTF-8 without one; e-mail addresses in angle
            brackets are emptied (`Signed-off-by: Ana <>`), because they name people, not changes.
        message_raw: The bytes, so emptied, when decoding had to replace some, else None.
        author: Raw `name <e-mail>` bytes; never stored, only hashed.
        author_time: Seconds since 1970; 0 when the header has none.
        author_offset: Minutes from UTC; 0 when it has none or nonsense.
    """

    id: str
    tree: str
    parents: tuple[str, ...]
    author: bytes
    author_time: int
    author_offset: int
    message: str
    message_raw: bytes | None

    @property
    def is_bot(self) -> bool:
        name, _, email = self.author.decode("utf-8", "replace").partition("<")
        return bool(_BOT.search(name.strip()) or _BOT.search(email.partition("@")[0].strip()))

    @property
    def is_revert(self) -> bool:
        return _REVERT.search(self.message) is not None

    @property
    def pull_requests(self) -> list[int]:
        """Numbers in the subject: `… (#12)`, `Merge pull request #12 from …`."""
        match = _PULL_REQUEST.search(self.message.partition("\n")[0])
        return [int(next(g for g in match.groups() if g))] if match else []

    @property
    def trailers(self) -> list[str]:
        """`Key: value` lines at the end of the message (`Co-authored-by`, `Fixes`, …)."""
        last = self.message.strip().rpartition("\n\n")
        lines = last[2].split("\n") if last[1] else []
        found = [line.strip() for line in lines if _TRAILER.match(line)]
        return found if len(found) == len(lines) else []

    @property
    def closes_issues(self) -> list[int]:
        """Issues after a closing keyword: `fixes #3`, `Closes: owner/repo#4`, a full issue URL."""
        return sorted({int(m) for m in _CLOSES.findall(self.message)})

    def author_id(self, key: str) -> str:
        """Keyed hash of name and e-mail, 16 hex digits: the same author, no address."""
        digest = hashlib.blake2b(self.author, digest_size=8, key=key.encode()[:64])
        return digest.hexdigest()


def parse_commit(commit: str, raw: bytes, *, message: bool = True) -> Commit:
    """Parse a raw commit object; without its message, where a million are held at once.

    Raises:
        ValueError: It names no tree: not a commit git itself would read.
    """
    header, _, body = raw.partition(b"\n\n")
    tree, parents, author, encoding = "", [], b"", ""
    for line in header.split(b"\n"):
        key, _, value = line.partition(b" ")
        if key == b"tree":
            tree = value.decode("ascii", "replace")
        elif key == b"parent":
            parents.append(value.decode("ascii", "replace"))
        elif key == b"author" and not author:
            author = value
        elif key == b"encoding":
            encoding = value.decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9a-f]{40}", tree):
        raise ValueError(f"commit {commit} names no tree")
    identity, time, offset = _parse_identity(author)
    text, lossy = _decode(body, encoding) if message else ("", False)
    text = _ADDRESS.sub("<>", text) if "@" in text else text
    return Commit(
        commit,
        tree,
        tuple(parents),
        identity,
        time,
        offset,
        text,
        _RAW_ADDRESS.sub(b"<>", body) if lossy else None,
    )


def parse_parents(raw: bytes) -> list[str]:
    """Only the parents of a raw commit object, for walks that need nothing else."""
    header = raw[: raw.find(b"\nauthor ") + 1]
    return [line[7:].decode("ascii", "replace") for line in header.split(b"\n")[1:-1]]


def _parse_identity(value: bytes) -> tuple[bytes, int, int]:
    match = _IDENTITY.match(value)
    if match is None:
        return value, 0, 0
    identity = match["name"].rstrip() + b" <" + match["email"] + b">"
    time = int(match["time"] or 0) if len(match["time"] or b"") < 20 else _INT64
    if not -_INT64 <= time < _INT64:
        time = 0
    zone = match["zone"] or b"+0000"
    hours, minutes = divmod(int(zone[1:]), 100) if len(zone) <= 5 else (0, 0)
    minutes += 60 * hours
    offset = minutes if minutes <= 14 * 60 else 0
    return identity, time, -offset if zone[:1] == b"-" else offset


def _decode(body: bytes, encoding: str) -> tuple[str, bool]:
    """The text, and whether bytes were lost. Codecs that are no text encodings count as unknown."""
    try:
        text = body.decode(encoding or "utf-8")
        text.encode()  # some codecs give lone surrogates, which no table can store
        return text, False
    except (LookupError, UnicodeError, ValueError):
        return body.decode("utf-8", "replace"), True
