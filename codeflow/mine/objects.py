"""Read-only access to a repository's objects, and to nothing else of it.

libgit2 is given an object database without a repository around it, so neither configuration nor
attributes nor refs can change what comes out. Its own hash check is switched off (1.7x faster) and
replaced by OpenSSL's SHA-1, 3x as fast, for whatever is stored or proves something; files that are
only looked at are not hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pygit2
from pygit2.enums import ConfigLevel, DiffFind

from codeflow.mine.headers import edit_header
from codeflow.mine.linediff import FLAGS, LineDiff

pygit2.settings.enable_strict_hash_verification(False)
pygit2.settings.disable_pack_keep_file_checks(True)
for _level in (ConfigLevel.SYSTEM, ConfigLevel.XDG, ConfigLevel.GLOBAL):
    pygit2.settings.search_path[_level] = "/nonexistent"

GITLINK = 0o160000
SYMLINK = 0o120000
TREE = 0o040000
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"

_RECENT_BYTES = 32 << 20
UNREAD = ("gitlink", "too_large", "missing")  # kinds of blobs whose content is never looked at
_LFS = b"version https://git-lfs"


def git_hash(kind: bytes, data: bytes) -> str:
    """The id git gives an object: SHA-1 over header and content, as 40 hex digits."""
    digest = hashlib.sha1(b"%s %d\0" % (kind, len(data)), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Delta:
    """One changed path between two trees; ids are None and modes 0 on the absent side."""

    status: str
    old_path: bytes
    new_path: bytes
    old_mode: int
    new_mode: int
    old_blob: str | None
    new_blob: str | None


@dataclass(frozen=True)
class BlobInfo:
    kind: str
    size: int


class CorruptObject(ValueError):
    """Content does not hash to its id, or cannot be read as what it should be."""


class _Reading:
    """What libgit2 says of damaged objects, as `CorruptObject`; a missing one stays a KeyError.

    A class, because a generator's context manager costs as much as reading a small object.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pygit2.GitError) and not isinstance(error, KeyError):
            raise CorruptObject(f"damaged object: {error}") from error


_READING = _Reading()


class Objects:
    """The object database of one repository."""

    def __init__(self, folder: Path, max_blob_bytes: int) -> None:
        self._odb = pygit2.Odb(str(folder))
        self._repository = pygit2.Repository()
        self._repository.set_odb(self._odb)
        self._line_diff = LineDiff()
        self._max_blob_bytes = max_blob_bytes
        self._info: dict[str, BlobInfo] = {}
        self._recent: dict[str, bytes] = {}  # in order of use
        self._recent_bytes = 0
        self._verified: set[str] = set()  # blobs whose content was hashed

    def commit(self, commit: str) -> bytes:
        """Raw commit object. KeyError when missing, CorruptObject when it is not what it claims."""
        return self._checked(commit, b"commit")

    def tree(self, tree: str) -> bytes:
        """Raw tree object."""
        return b"" if tree == EMPTY_TREE else self._checked(tree, b"tree")

    def blob(self, blob: str) -> bytes:
        """File content, hashed the first time it is asked for: what is stored or proves something.

        Raises:
            KeyError: It is missing.
            CorruptObject: It is not what it claims to be.
        """
        data = self.content(blob)
        if blob not in self._verified:
            _check(blob, b"blob", data)
            self._verified.add(blob)
        return data

    def content(self, blob: str) -> bytes:
        """File content as the database has it; what was read lately is still there.

        A changed file is looked at several times within a few steps: to classify it, to diff it, to
        replay its patch, and again as the old side of the next change. Not inflating it each time
        takes a fifth off the whole.
        """
        data = self._recent.pop(blob, None)
        if data is None:
            with _READING:
                data = self._odb.read(blob)[1]
            self._recent_bytes += len(data)
            while self._recent_bytes > _RECENT_BYTES and self._recent:
                oldest = next(iter(self._recent))
                self._recent_bytes -= len(self._recent.pop(oldest))
        self._recent[blob] = data
        return data

    def peeled(self, name: str) -> str:
        """The commit a tag object leads to; the id itself where it is no tag."""
        with _READING:
            found = self._repository[name]
            return str(found.peel(pygit2.Commit).id if isinstance(found, pygit2.Tag) else found.id)

    def blob_info(self, blob: str, mode: int) -> BlobInfo:
        """Kind and size; reads the content once, and only when it is small enough to be text."""
        if mode == GITLINK:
            return BlobInfo("gitlink", 0)
        info = self._info.get(blob)
        if info is None:
            info = self._info[blob] = self._classify(blob)
        is_text = info.kind in ("text", "lfs")
        return BlobInfo("symlink", info.size) if mode == SYMLINK and is_text else info

    def deltas(self, old_tree: str, new_tree: str) -> Iterator[Delta]:
        """Changed paths without rename detection: cheap, reads trees only."""
        with _READING:
            for delta in self._diff(old_tree, new_tree).deltas:
                yield _delta(delta)

    def changes(
        self, old_tree: str, new_tree: str, rename_limit: int
    ) -> Iterator[tuple[Delta, bytes, int, int]]:
        """Changed paths with renames found: `(delta, patch section, lines added, deleted)`.

        A section is empty where a patch has nothing to say or must not be built: content that is
        no text or too large, on either side.
        """
        with _READING:
            diff = self._diff(old_tree, new_tree)
            letters = {d.status_char() for d in diff.deltas}
            if "A" in letters and "D" in letters:
                try:
                    diff.find_similar(rename_limit=rename_limit)
                except KeyError:  # a filtered clone lacks some content: only equal ids can pair
                    diff.find_similar(flags=DiffFind.FIND_EXACT_MATCH_ONLY)
            for index, raw in enumerate(diff.deltas):
                delta = _delta(raw)
                section, added, deleted = b"", 0, 0
                if not self._has_section(delta):
                    pass
                elif _is_plain_edit(delta):
                    section, added, deleted = self._edit(delta)
                elif (patch := diff[index]) is not None:
                    section = patch.data
                    if delta.old_blob == delta.new_blob:
                        # Of a moved binary, libgit2 says that it differs; the move is all.
                        section = section.partition(b"\nBinary files ")[0].rstrip(b"\n") + b"\n"
                    _, added, deleted = patch.line_stats
                yield delta, section, added, deleted

    def changed_lines(self, old: str | None, new: str | None) -> int:
        """Added plus deleted lines between two text blobs; None = absent."""
        if old is None or new is None:
            data = self.content(old or new or "")
            return data.count(b"\n") + (not data.endswith(b"\n") and data != b"")
        _, added, deleted = self._line_diff.hunks(self.content(old), self.content(new))
        return added + deleted

    def _diff(self, old_tree: str, new_tree: str) -> pygit2.Diff:
        diff: pygit2.Diff
        if old_tree == EMPTY_TREE:
            diff = self._read_tree(new_tree).diff_to_tree(flags=FLAGS, swap=True)
        elif new_tree == EMPTY_TREE:
            diff = self._read_tree(old_tree).diff_to_tree(flags=FLAGS)
        else:
            new = self._read_tree(new_tree)
            diff = self._read_tree(old_tree).diff_to_tree(new, flags=FLAGS)
        return diff

    def _read(self, name: str) -> Any:
        """A libgit2 object; Any, because its type stubs know only what all objects share."""
        return self._repository[name]

    def _read_tree(self, name: str) -> Any:
        tree = self._read(name)
        if not isinstance(tree, pygit2.Tree):  # a hostile commit may name anything
            raise CorruptObject(f"{name} is no tree")
        return tree

    def _edit(self, delta: Delta) -> tuple[bytes, int, int]:
        """The section of a file of which nothing but the content changed."""
        old, new = delta.old_blob or "", delta.new_blob or ""
        hunks, added, deleted = self._line_diff.hunks(self.content(old), self.content(new))
        return edit_header(delta.new_path, old, new, delta.new_mode) + hunks, added, deleted

    def _has_section(self, delta: Delta) -> bool:
        if delta.old_blob == delta.new_blob:
            return True  # rename or mode change: the header says it all
        sides = ((delta.old_blob, delta.old_mode), (delta.new_blob, delta.new_mode))
        kinds = {self.blob_info(blob, mode).kind for blob, mode in sides if blob is not None}
        return kinds <= {"text", "symlink", "lfs"}

    def _classify(self, blob: str) -> BlobInfo:
        try:
            with _READING:
                size = self._odb.read_header(blob)[1]
            if size > self._max_blob_bytes:
                return BlobInfo("too_large", size)
            data = self.content(blob)
        except KeyError:
            return BlobInfo("missing", -1)
        if b"\0" in data:
            return BlobInfo("binary", size)
        return BlobInfo("lfs" if data.startswith(_LFS) else "text", size)

    def _checked(self, name: str, kind: bytes) -> bytes:
        with _READING:
            data: bytes = self._odb.read(name)[1]
        _check(name, kind, data)
        return data


def _check(name: str, kind: bytes, data: bytes) -> None:
    if git_hash(kind, data) != name:
        raise CorruptObject(f"{kind.decode()} {name} is damaged: its content has another hash")


def _is_plain_edit(delta: Delta) -> bool:
    return (
        delta.status == "M"
        and delta.old_mode == delta.new_mode
        and delta.old_blob != delta.new_blob
    )


def _delta(raw: pygit2.DiffDelta) -> Delta:
    status = raw.status_char()
    old, new = raw.old_file, raw.new_file
    return Delta(
        status,
        old.raw_path,
        new.raw_path,
        0 if status == "A" else int(old.mode),
        0 if status == "D" else int(new.mode),
        None if status == "A" else str(old.id),
        None if status == "D" else str(new.id),
    )
