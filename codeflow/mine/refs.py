"""Where a repository keeps its objects, and which commit its HEAD names, without trusting it.

Reads a handful of files by hand instead of opening the repository: no configuration, hook,
attribute or work tree of an untrusted repository is looked at, and nothing is searched upwards.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from codeflow.errors import RepositoryError

_SHA1 = re.compile(r"[0-9a-f]{40}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_TAGS = "refs/tags/"
_MAX_LINE = 4200  # characters: git's longest path, an id, and the space between
_BAD_IN_REF = re.compile(r"\.\.|//|@\{|[\x00-\x20\x7f~^:?*\[\\]")


@dataclass(frozen=True)
class GitDir:
    """`git_dir` holds HEAD, `common_dir` objects and refs; they differ in linked worktrees."""

    git_dir: Path
    common_dir: Path

    @property
    def objects(self) -> Path:
        return self.common_dir / "objects"


def find_git_dir(path: Path) -> GitDir:
    """The git directory of a bare repository or of a work tree's top folder.

    Raises:
        RepositoryError: `not_a_repository`.
    """
    candidate = path / ".git"
    if candidate.is_file():  # linked worktree or submodule: the file names the real folder
        text = _read(candidate)
        if not text.startswith("gitdir:"):
            raise _not_a_repository(path)
        candidate = (path / text.removeprefix("gitdir:").strip()).resolve()
    elif not candidate.is_dir():
        candidate = path
    common = candidate
    if (candidate / "commondir").is_file():
        common = (candidate / _read(candidate / "commondir").strip()).resolve()
    if not (candidate / "HEAD").is_file() or not (common / "objects").is_dir():
        raise _not_a_repository(path)
    return GitDir(candidate, common)


def pinned_head(git: GitDir) -> str:
    """The commit id HEAD names.

    Raises:
        RepositoryError: `empty` (HEAD's branch has no commit), `shallow` (history is cut off),
            `grafts` (history is rewritten locally), `unsupported` (SHA-256 or reftable).
    """
    shallow = git.common_dir / "shallow"
    if shallow.is_file() and shallow.stat().st_size:
        raise RepositoryError(
            "shallow",
            "shallow clone: its oldest commits look as if they created every file; run "
            "`git fetch --unshallow` in it first",
        )
    grafts = git.common_dir / "info" / "grafts"
    if grafts.is_file() and grafts.stat().st_size:
        raise RepositoryError("grafts", f"history is rewritten by {grafts}: remove that file")
    if (git.common_dir / "reftable").is_dir():
        raise RepositoryError(
            "unsupported", "refs are stored as a reftable, which is not supported"
        )
    value = _read(git.git_dir / "HEAD").strip()
    for _ in range(5):  # git's own limit on chains of symbolic refs
        if _SHA1.match(value):
            return value
        if _SHA256.match(value):
            raise RepositoryError("unsupported", "SHA-256 repositories are not supported")
        if not value.startswith("ref:"):
            break
        value = _resolve(git, value.removeprefix("ref:").strip())
    raise RepositoryError("empty", "HEAD names no commit: the repository or its branch is empty")


def _resolve(git: GitDir, name: str) -> str:
    if not name.startswith("refs/") or ".." in name.split("/"):
        return ""
    loose = git.common_dir / name
    if loose.is_file():
        return _read(loose).strip()
    packed = git.common_dir / "packed-refs"
    if packed.is_file():
        for line in _read(packed).splitlines():
            value, _, ref = line.partition(" ")
            if ref == name:
                return value
    return ""


def tags(git: GitDir) -> dict[str, str]:
    """Tag name to object id, from loose and packed refs; a loose ref hides a packed one.

    Packed annotated tags name what they lead to where git recorded it (the `^` line); loose ones
    name the tag object, which the caller peels. What is no regular file, no id or no valid name is
    left out: symbolic links are not followed, and no more is read than refs need.
    """
    return _packed_tags(git.common_dir / "packed-refs") | _loose_tags(git.common_dir / _TAGS)


def _packed_tags(packed: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    if not packed.is_file():
        return found
    name = ""
    with _opened(packed) as lines:
        while line := lines.readline(_MAX_LINE):
            value, _, ref = line.rstrip("\n").partition(" ")
            if value.startswith("^"):
                if name and _SHA1.match(value[1:]):
                    found[name] = value[1:]
                continue
            name = ref.removeprefix(_TAGS) if ref.startswith(_TAGS) else ""
            if not _is_ref_name(name) or not _SHA1.match(value):
                name = ""
            if name:
                found[name] = value
    return found


def _loose_tags(folder: Path) -> dict[str, str]:
    found = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in sorted(names)):
            name = path.relative_to(folder).as_posix()
            try:
                is_file = stat.S_ISREG(path.lstat().st_mode)
            except FileNotFoundError:  # packed or deleted since it was listed
                continue
            if is_file and _is_ref_name(name):
                with _opened(path) as file:
                    value = file.read(_MAX_LINE).strip()
                if _SHA1.match(value):
                    found[name] = value
    return found


def _is_ref_name(name: str) -> bool:
    """The rules of git-check-ref-format that keep a name harmless."""
    parts = name.split("/")
    return (
        not _BAD_IN_REF.search(name)
        and not name.endswith(".")
        and all(p and not p.startswith(".") and not p.endswith(".lock") for p in parts)
    )


def _opened(path: Path) -> IO[str]:
    try:
        return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")
    except OSError as e:
        raise RepositoryError("unreadable", f"cannot read {path}: {e.strerror}") from e


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as e:
        raise RepositoryError("unreadable", f"cannot read {path}: {e.strerror}") from e


def _not_a_repository(path: Path) -> RepositoryError:
    return RepositoryError("not_a_repository", f"{path} is not a git repository")
