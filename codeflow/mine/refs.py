"""Where a repository keeps its objects, and which commit its HEAD names, without trusting it.

Reads a handful of files by hand instead of opening the repository: no configuration, hook,
attribute or work tree of an untrusted repository is looked at, and nothing is searched upwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from codeflow.errors import RepositoryError

_SHA1 = re.compile(r"[0-9a-f]{40}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as e:
        raise RepositoryError("unreadable", f"cannot read {path}: {e.strerror}") from e


def _not_a_repository(path: Path) -> RepositoryError:
    return RepositoryError("not_a_repository", f"{path} is not a git repository")


def tags(git: GitDir) -> dict[str, str]:
    """Tag name to object id, from loose and packed refs.

    Packed annotated tags are peeled where git recorded their commit; loose ones may still name the
    tag object, which the caller peels.
    """
    found: dict[str, str] = {}
    packed = git.common_dir / "packed-refs"
    name = ""
    for line in _read(packed).splitlines() if packed.is_file() else []:
        value, _, ref = line.partition(" ")
        if line.startswith("^") and name:
            found[name] = line[1:].strip()
        elif ref.startswith("refs/tags/") and _SHA1.match(value):
            name = ref.removeprefix("refs/tags/")
            found[name] = value
        else:
            name = ""
    folder = git.common_dir / "refs" / "tags"
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file() and _SHA1.match(value := _read(path).strip()):
            found[path.relative_to(folder).as_posix()] = value
    return found
