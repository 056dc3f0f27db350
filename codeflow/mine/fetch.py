"""Unit `fetch`: bring a source onto this machine and pin its head.

Remote repositories are cloned bare, one branch, and updated in place when asked (`transfer.py` says
how git is kept in check). Local ones are read where they are and never written to.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from codeflow.dataset import clones_folder
from codeflow.errors import RepositoryError
from codeflow.mine.history import read_mainline
from codeflow.mine.objects import CorruptObject, Objects
from codeflow.mine.refs import GitDir, find_git_dir, pinned_head
from codeflow.mine.transfer import GitFailed, Limits, Transfer, holds_password
from codeflow.recipe import Recipe
from codeflow.work import Counts, Work

_INCOMING = "refs/codeflow/incoming"
_SYMREF = re.compile(r"^ref: (refs/heads/\S+)\tHEAD$", re.MULTILINE)


def run(work: Work, recipe: Recipe) -> Counts:
    """Leave in the unit's facts: `git_dir` (`clones/…` for clones), `head`, `root`,
    `mainline_commits`.
    """
    if work.facts["kind"] == "path":
        work.facts["git_dir"] = work.facts["location"]
    else:
        work.facts["git_dir"] = f"clones/{work.unit}.git"
    git = repository(work, recipe)
    work.facts["head"] = pinned_head(git)
    chain = read_mainline(Objects(git.objects, recipe.mine.max_blob_bytes), work.facts["head"])
    work.facts |= {"root": chain[0].id, "mainline_commits": len(chain)}
    return {}


def repository(work: Work, recipe: Recipe) -> GitDir:
    """The git directory of a unit's repository, cloned where this machine does not have it yet.

    A clone is brought up to date when the fact `update` is true, or when it lacks the commit in the
    fact `head`: nodes that share no disk each keep clones of their own.

    Raises:
        RepositoryError: As `new_clone` and `update_clone`; `not_a_repository`.
    """
    facts, run = work.facts, recipe.run
    if facts["kind"] == "path":
        return find_git_dir(Path(facts["git_dir"]))
    folder = clones_folder(work.root) / Path(facts["git_dir"]).name
    protocols = "https:ssh" if facts["kind"] == "url" else "file"
    limits = Limits(run.clone_seconds, run.clone_attempts, run.clone_max_mib)
    if not folder.exists():
        new_clone(facts["location"], folder, protocols, limits)
    elif facts.get("update") or ("head" in facts and not _has(folder, facts["head"])):
        update_clone(folder, facts["location"], protocols, limits)
    return find_git_dir(folder)


def clone(location: str, target: Path, *, protocols: str, seconds: float) -> None:
    """Clone with the default limits but for the time; see `new_clone`."""
    new_clone(location, target, protocols, Limits(seconds))


def new_clone(location: str, target: Path, protocols: str, limits: Limits) -> None:
    """Clone into `target` atomically: a killed clone leaves only a temporary folder.

    Files over 1 MiB stay behind where the server can filter: they are never part of a document.
    Where somebody else made `target` in the meantime, theirs is kept.

    Raises:
        RepositoryError: `clone_failed` with git's own words, `clone_timeout`, `too_large`.
    """
    if holds_password(location):
        raise RepositoryError(
            "clone_failed",
            "the URL holds credentials, which would be stored with the clone: leave them out and "
            "use ~/.netrc or an SSH key",
        )
    temporary = _temporary(target)
    try:
        _clone(location, temporary, protocols, limits)
        try:
            os.replace(temporary, target)
        except OSError:
            if not (target / "HEAD").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def update_clone(folder: Path, location: str, protocols: str, limits: Limits) -> None:
    """Bring a clone up to date with its source's HEAD, following a renamed default branch.

    A reader sees the old state or the new one: objects come first, then the branch, HEAD last. A
    clone that cannot take the update, because it is damaged or its refs are in the way, is replaced
    by a fresh one; then there is a moment without any.

    Raises:
        RepositoryError: As `new_clone`; the clone stays as it was.
    """
    folder = folder.absolute()
    transfer = Transfer(folder, protocols, limits)
    branch = _SYMREF.search(transfer.run("ls-remote", "--symref", "--", location, "HEAD"))
    git = f"--git-dir={folder}"
    try:
        transfer.run(git, "fetch", *_options(protocols), "--force", "origin", f"+HEAD:{_INCOMING}")
        # Reads every commit: what is damaged shows here and not in the middle of mining.
        transfer.run(git, "rev-list", "--count", _INCOMING)
        if branch is not None:
            transfer.run(git, "update-ref", branch[1], _INCOMING)
            transfer.run(git, "symbolic-ref", "HEAD", branch[1])
        else:  # HEAD is detached there, or the server does not say: bundles, old servers
            transfer.run(git, "update-ref", "HEAD", _INCOMING)
        transfer.run(git, "update-ref", "-d", _INCOMING)
    except GitFailed as e:
        if e.retry:
            raise
        _replace_clone(folder, location, protocols, limits)


def _clone(location: str, temporary: Path, protocols: str, limits: Limits) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    options = [*_options(protocols), "--bare", "--single-branch", "--template="]
    Transfer(temporary, protocols, limits).run("clone", *options, "--", location, str(temporary))


def _replace_clone(folder: Path, location: str, protocols: str, limits: Limits) -> None:
    temporary, old = _temporary(folder), _temporary(folder, "-old")
    try:
        _clone(location, temporary, protocols, limits)
        os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _options(protocols: str) -> list[str]:
    return ["--quiet"] if protocols == "file" else ["--quiet", "--filter=blob:limit=1m"]


def _temporary(target: Path, suffix: str = "") -> Path:
    """A name beside `target` that a sweep of the dataset knows to delete."""
    return target.absolute().with_name(f"{target.name}.tmp-{os.getpid()}{suffix}")


def _has(folder: Path, commit: str) -> bool:
    try:
        Objects(folder / "objects", 0).commit(commit)
    except (KeyError, CorruptObject):
        return False
    return True
