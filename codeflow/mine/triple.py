"""One triple as a value: the net change between two states, proven before it counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from codeflow.mine.merkle import TreeSplicer
from codeflow.mine.objects import UNREAD, CorruptObject, Delta, Objects
from codeflow.mine.patch import PatchError, apply_section
from codeflow.paths import is_code, is_safe, is_test
from codeflow.recipe import MineSettings


@dataclass(frozen=True)
class FileChange:
    """One changed file.

    Attributes:
        kind: text, binary, too_large, symlink, gitlink, lfs or missing; of the worse side.
        section: The file's part of the patch, empty when the patch cannot hold it.
    """

    delta: Delta
    kind: str
    section: bytes
    lines_added: int
    lines_deleted: int

    @property
    def path(self) -> bytes:
        return self.delta.new_path if self.delta.status != "D" else self.delta.old_path


@dataclass(frozen=True)
class NetChange:
    """The net change between two root trees."""

    files: list[FileChange]

    @property
    def patch(self) -> bytes:
        return b"".join(f.section for f in self.files)

    @property
    def complete(self) -> bool:
        """Does the patch alone lead from the old state to the new one?"""
        return all(f.section for f in self.files)

    @property
    def n_files(self) -> int:
        """Changed paths: a file that changes its type has two sections, but is one file."""
        return len({f.path for f in self.files})

    @property
    def lines(self) -> int:
        return sum(f.lines_added + f.lines_deleted for f in self.files)

    @property
    def has_tests(self) -> bool:
        """Does it touch code and tests?"""
        paths = [f.path for f in self.files]
        return any(map(is_test, paths)) and any(is_code(p) and not is_test(p) for p in paths)


class Unprovable(ValueError):
    """The change cannot be stored so that R_old + P = R_new holds."""


_WORST = ("missing", "too_large", "binary", "gitlink", "symlink", "lfs", "text")


def net_change(objects: Objects, old_tree: str, new_tree: str, settings: MineSettings) -> NetChange:
    """Diff two root trees: renames found, patch text built where both sides are text."""
    files = []
    for delta, section, added, deleted in objects.changes(
        old_tree, new_tree, settings.rename_limit
    ):
        sides = ((delta.old_blob, delta.old_mode), (delta.new_blob, delta.new_mode))
        kinds = {objects.blob_info(b, m).kind for b, m in sides if b is not None}
        kind = next(k for k in _WORST if k in kinds)
        if delta.old_blob != delta.new_blob and section and b"\n@@ " not in section:
            # libgit2 holds it for binary, or one side is empty: only the latter can be replayed.
            empty = {objects.blob_info(b, m).size for b, m in sides if b is not None} <= {0}
            section = section if empty else b""
        files.append(FileChange(delta, kind, section, added, deleted))
    return NetChange(files)


class Prover:
    """Proves changes of one repository; quickest when they follow one another."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._trees = objects, TreeSplicer(objects.tree)

    def prove(self, old_tree: str, new_tree: str, change: NetChange) -> None:
        """Replay the patch on the old contents, compare every new one, then the whole new tree.

        Raises:
            Unprovable: A hostile path, a hunk that does not fit, or a hash that differs.
        """
        edits: dict[bytes, tuple[int, str] | None] = {}
        for file in change.files:
            delta = file.delta
            for path in (delta.old_path, delta.new_path):
                if not is_safe(path):
                    raise Unprovable(f"hostile path {path!r}")
            if delta.old_blob is not None:
                edits.setdefault(delta.old_path, None)
            if delta.new_blob is not None:
                edits[delta.new_path] = (delta.new_mode, delta.new_blob)
            self._prove_file(file)
        try:
            proven = self._trees.leads_to(old_tree, new_tree, edits)
        except (KeyError, ValueError) as e:
            raise Unprovable(f"tree of R_old: {e}") from e
        if not proven:
            raise Unprovable(f"the changed files do not lead to tree {new_tree}")

    def _prove_file(self, file: FileChange) -> None:
        """Hash both sides, which also vouches for their kinds, and replay what has hunks."""
        delta = file.delta
        try:
            old = self._verified(delta.old_blob, delta.old_mode)
            new = self._verified(delta.new_blob, delta.new_mode)
            replayed = file.section and delta.old_blob != delta.new_blob
            same = not replayed or new == apply_section(old, file.section)
        except (PatchError, CorruptObject, KeyError) as e:
            raise Unprovable(f"{file.path!r}: {e}") from e
        if not same:
            raise Unprovable(f"{file.path!r}: the patch leads to other content")

    def _verified(self, blob: str | None, mode: int) -> bytes:
        if blob is None or self._objects.blob_info(blob, mode).kind in UNREAD:
            return b""
        return self._objects.blob(blob)


def triple_id(repo_id: str, old_commit: str, new_commit: str) -> str:
    """A pure function of what the triple is: the same in every run."""
    name = f"{repo_id} {old_commit} {new_commit}".encode()
    return hashlib.blake2b(name, digest_size=8).hexdigest()
