"""Clones brought up to date: in place, behind the readers' backs, or anew when damaged."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repo_builder import GIT_ENV, Repo, git, text

from codeflow.errors import RepositoryError
from codeflow.mine.fetch import new_clone, run, update_clone
from codeflow.mine.history import read_mainline
from codeflow.mine.objects import Objects
from codeflow.mine.refs import find_git_dir, pinned_head, tags
from codeflow.mine.transfer import Limits, Transfer
from codeflow.recipe import Recipe
from codeflow.work import Work

SOON = Limits(seconds=30, attempts=1)


def state(i: int) -> dict[bytes, bytes]:
    return {b"a.py": text("a", 9, i)}


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    repo = Repo(tmp_path / "origin/r.git")
    repo.chain(*map(state, range(3)))
    return repo


@pytest.fixture
def clone(repo: Repo, tmp_path: Path) -> Path:
    folder = tmp_path / "clones/x.git"
    new_clone(str(repo.path), folder, "file", SOON)
    return folder


def head(folder: Path) -> str:
    return pinned_head(find_git_dir(folder))


def update(clone: Path, repo: Repo) -> None:
    update_clone(clone, str(repo.path), "file", SOON)
    assert list(clone.parent.iterdir()) == [clone]
    assert not (clone / "refs/codeflow/incoming").exists()
    git(clone, "fsck", "--strict", "--connectivity-only")


def test_new_commits_and_tags_arrive(repo: Repo, clone: Path) -> None:
    inode = clone.stat().st_ino
    new = repo.commit(state(3), [head(clone)])
    git(repo.path, "tag", "v1", new)
    update(clone, repo)
    assert head(clone) == new
    assert tags(find_git_dir(clone)) == {"v1": new}
    assert clone.stat().st_ino == inode  # the same folder, not a new clone


def test_nothing_new_changes_nothing(repo: Repo, clone: Path) -> None:
    before = head(clone)
    update(clone, repo)
    assert head(clone) == before


def test_a_rewritten_history_is_followed(repo: Repo, clone: Path) -> None:
    new = repo.commit(state(7), [repo.commit(state(6), head=False)])
    update(clone, repo)
    assert head(clone) == new


@pytest.mark.parametrize("name", ["trunk", "main/v2"])
def test_a_renamed_default_branch_is_followed(repo: Repo, clone: Path, name: str) -> None:
    """`main/v2` cannot stand beside `main`: the refs are in the way, so the clone is replaced."""
    git(repo.path, "branch", "--move", "main", name)
    git(repo.path, "symbolic-ref", "HEAD", f"refs/heads/{name}")
    new = repo.commit(state(3), [head(clone)], head=False)
    git(repo.path, "update-ref", f"refs/heads/{name}", new)
    update(clone, repo)
    assert head(clone) == new
    assert (clone / "HEAD").read_text() == f"ref: refs/heads/{name}\n"


def test_a_detached_head_is_followed(repo: Repo, clone: Path) -> None:
    new = repo.commit(state(3), [head(clone)], head=False)
    (repo.path / "HEAD").write_text(new + "\n")
    update(clone, repo)
    assert head(clone) == new


def test_only_heads_history_is_fetched(repo: Repo, tmp_path: Path) -> None:
    """A mirror's pull requests and side branches neither come nor count."""
    main = head(repo.path)
    pull = repo.commit(state(50), [main], head=False)
    git(repo.path, "update-ref", "refs/pull/7/head", pull)
    git(repo.path, "update-ref", "refs/heads/topic", pull)
    clone = tmp_path / "clones/x.git"
    url = f"file://{repo.path}"  # a bare path would be copied object by object
    new_clone(url, clone, "file", SOON)
    later = repo.commit(state(51), [pull], head=False)
    git(repo.path, "update-ref", "refs/pull/8/head", later)
    new = repo.commit(state(3), [main])
    update_clone(clone, url, "file", SOON)
    assert git(clone, "for-each-ref", "--format=%(refname)").split() == [b"refs/heads/main"]
    assert head(clone) == new
    chain = read_mainline(Objects(clone / "objects", 1 << 20), new)
    assert len(chain) == 4
    known = subprocess.run(["git", "-C", str(clone), "cat-file", "-e", pull], env=GIT_ENV)
    assert known.returncode != 0


def test_a_mirror_with_pull_requests_has_heads_history_alone(repo: Repo, tmp_path: Path) -> None:
    main = head(repo.path)
    pull = repo.commit(state(50), [main], head=False)
    git(repo.path, "update-ref", "refs/pull/7/head", pull)
    facts: dict[str, Any] = {"kind": "path", "location": str(repo.path)}
    work = Work(tmp_path / "data", "unit", "f" * 64, {}, facts)
    run(work, Recipe())
    assert (work.facts["head"], work.facts["mainline_commits"]) == (main, 3)


DAMAGES = {
    "no objects": lambda f: shutil.rmtree(f / "objects"),
    "no HEAD": lambda f: (f / "HEAD").unlink(),
    "a HEAD of nonsense": lambda f: (f / "HEAD").write_bytes(b"\0\xff"),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a broken configuration": lambda f: (f / "config").write_text("[core\n"),
    "a lost pack": lambda f: [p.unlink() for p in (f / "objects").rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_clone_is_made_anew(repo: Repo, clone: Path, damage: str) -> None:
    new = repo.commit(state(3), [head(clone)])
    DAMAGES[damage](clone)
    update(clone, repo)
    assert head(clone) == new
    assert len(read_mainline(Objects(clone / "objects", 1 << 20), new)) == 4


def test_where_the_source_is_gone_the_clone_stays(repo: Repo, clone: Path) -> None:
    before = head(clone)
    shutil.rmtree(repo.path)
    with pytest.raises(RepositoryError, match="ls-remote failed: fatal: ") as error:
        update_clone(clone, str(repo.path), "file", SOON)
    assert error.value.status == "clone_failed"
    assert head(clone) == before
    assert list(clone.parent.iterdir()) == [clone]


def test_readers_see_the_old_state_or_the_new_one(
    repo: Repo, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each call of git, HEAD resolves and its whole history is there."""
    old = head(clone)
    new = repo.commit(state(3), [old])
    git(repo.path, "branch", "--move", "main", "trunk")
    git(repo.path, "symbolic-ref", "HEAD", "refs/heads/trunk")
    git(repo.path, "update-ref", "refs/heads/trunk", new)
    seen = []
    original = Transfer.run

    def watched(self: Transfer, *arguments: str) -> str:
        output = original(self, *arguments)
        seen.append(head(clone))
        read_mainline(Objects(clone / "objects", 1 << 20), seen[-1])
        return output

    monkeypatch.setattr(Transfer, "run", watched)
    update(clone, repo)
    assert seen == sorted(seen, key=[old, new].index)
    assert (seen[0], seen[-1]) == (old, new)


def test_a_clone_made_by_somebody_else_in_the_meantime_is_kept(repo: Repo, clone: Path) -> None:
    inode = clone.stat().st_ino
    new_clone(str(repo.path), clone, "file", SOON)
    assert clone.stat().st_ino == inode
    assert list(clone.parent.iterdir()) == [clone]


@pytest.fixture
def daemon(repo: Repo) -> Iterator[str]:
    """The repository behind git's own server, which filters; it ends when the test does."""
    git(repo.path, "config", "uploadpack.allowFilter", "true")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--listen=127.0.0.1", f"--port={port}", "--export-all", "--reuseaddr"]
    command = ["git", "daemon", *arguments, f"--base-path={repo.path.parent}"]
    with subprocess.Popen(command, env=GIT_ENV, start_new_session=True) as process:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"git://127.0.0.1:{port}/r.git"
        os.killpg(process.pid, signal.SIGKILL)


def test_large_files_stay_behind_in_clone_and_update(
    repo: Repo, daemon: str, tmp_path: Path
) -> None:
    def grow(i: int) -> tuple[str, str]:
        noise = b"%d" % i * (1 << 20) + b"x"
        tip = repo.commit(state(i) | {b"big": noise}, [head(repo.path)])
        return tip, repo.blob(noise)

    clone = tmp_path / "clones/x.git"
    old, first = grow(10)
    new_clone(daemon, clone, "git", SOON)
    assert head(clone) == old
    new, second = grow(11)
    update_clone(clone, daemon, "git", SOON)
    assert head(clone) == new
    objects = Objects(clone / "objects", 1 << 30)
    assert len(read_mainline(objects, new)) == 5
    assert objects.blob(repo.blob(state(11)[b"a.py"])) == state(11)[b"a.py"]
    for blob in (first, second):
        with pytest.raises(KeyError):
            objects.blob(blob)


def test_the_unit_updates_when_asked_and_when_its_head_is_missing(
    repo: Repo, tmp_path: Path
) -> None:
    bundle = tmp_path / "r.bundle"

    def fetch(**more: Any) -> str:
        facts: dict[str, Any] = {"kind": "bundle", "location": str(bundle), **more}
        work = Work(tmp_path / "data", "unit", "f" * 64, {}, facts)
        run(work, Recipe())
        return str(work.facts["head"])

    git(repo.path, "bundle", "create", "-q", str(bundle), "HEAD", "main")
    old = fetch()
    new = repo.commit(state(3), [old])
    git(repo.path, "bundle", "create", "-q", str(bundle), "HEAD", "main")
    assert fetch() == old
    assert fetch(update=True) == new
    newest = repo.commit(state(4), [new])
    git(repo.path, "bundle", "create", "-q", str(bundle), "HEAD", "main")
    assert fetch(head=new) == new
    assert fetch(head=newest) == newest
