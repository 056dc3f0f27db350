"""Clones: atomic, without prompts or hooks, and gone when their time is over."""

from __future__ import annotations

import functools
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repo_builder import Repo, git, text

from codeflow.errors import RepositoryError
from codeflow.mine.fetch import clone, run
from codeflow.recipe import Recipe
from codeflow.work import Work


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    repo = Repo(tmp_path / "origin/r.git")
    repo.chain(*({b"a.py": text("a", 9, i)} for i in range(3)))
    return repo


def head_of(path: Path) -> str:
    return git(path, "rev-parse", "HEAD").decode().strip()


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


@pytest.fixture
def static_server(repo: Repo) -> Iterator[int]:
    """The files of the repository over HTTP, as any web server has them."""
    git(repo.path, "update-server-info")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(repo.path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()


def commands_with(needle: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if needle in command:
            found.append(command)
    return found


def test_a_bundle_is_cloned_and_its_head_pinned(repo: Repo, tmp_path: Path) -> None:
    bundle = tmp_path / "r.bundle"
    git(repo.path, "bundle", "create", "-q", str(bundle), "HEAD", "main")
    facts = {"kind": "bundle", "location": str(bundle)}
    work = Work(tmp_path / "data", "unit", "f" * 64, {}, facts)
    assert run(work, Recipe()) == {}
    assert work.facts["git_dir"] == "clones/unit.git"
    assert work.facts["head"] == head_of(repo.path) == head_of(tmp_path / "data/clones/unit.git")
    run(work, Recipe())  # what is cloned already is used again


def test_a_path_is_read_where_it_is(repo: Repo, tmp_path: Path) -> None:
    facts = {"kind": "path", "location": str(repo.path)}
    work = Work(tmp_path / "data", "unit", "f" * 64, {}, facts)
    run(work, Recipe())
    assert work.facts["git_dir"] == str(repo.path)
    assert work.facts["head"] == head_of(repo.path)
    assert not (tmp_path / "data").exists()


def test_a_clone_over_plain_http(repo: Repo, static_server: int, tmp_path: Path) -> None:
    target = tmp_path / "clones/x.git"
    url = f"http://127.0.0.1:{static_server}/r.git"
    clone(url, target, protocols="http", seconds=30)
    assert head_of(target) == head_of(repo.path)
    assert (target / "HEAD").is_file()
    assert list(target.parent.iterdir()) == [target]


def test_protocols_that_are_not_asked_for_are_refused(repo: Repo, tmp_path: Path) -> None:
    for location, protocols in ((str(repo.path), "https:ssh"), ("http://127.0.0.1:9/x", "https")):
        with pytest.raises(RepositoryError, match="not allowed") as error:
            clone(location, tmp_path / "x.git", protocols=protocols, seconds=30)
        assert error.value.status == "clone_failed"


def test_a_failure_is_told_in_gits_own_words_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "clones"
    for location in (str(tmp_path / "missing"), f"--upload-pack=touch {tmp_path}/owned"):
        with pytest.raises(RepositoryError, match="clone failed: fatal: ") as error:
            clone(location, folder / "x.git", protocols="file", seconds=30)
        assert error.value.status == "clone_failed"
        assert list(folder.iterdir()) == []
    assert not (tmp_path / "owned").exists()


def test_without_git_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RepositoryError, match="no `git` command on PATH"):
        clone("x", tmp_path / "x.git", protocols="file", seconds=5)


@pytest.mark.parametrize("protocol", ["http", "git"])
def test_a_silent_server_is_given_up_and_git_and_its_helpers_end(
    silent_server: int, tmp_path: Path, protocol: str
) -> None:
    url = f"{protocol}://127.0.0.1:{silent_server}/x.git"
    started = time.monotonic()
    with pytest.raises(RepositoryError, match=r"longer than 1 s \(run.clone_seconds\)") as error:
        clone(url, tmp_path / "clones/x.git", protocols=protocol, seconds=1)
    assert error.value.status == "clone_timeout"
    assert time.monotonic() - started < 10
    assert list((tmp_path / "clones").iterdir()) == []
    if os.path.isdir("/proc/self/task"):
        assert commands_with(url) == []


def test_nothing_of_the_user_runs_or_is_copied(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template/hooks"
    template.mkdir(parents=True)
    (template / "post-checkout").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (template / "post-checkout").chmod(0o755)
    (tmp_path / ".gitconfig").write_text(
        f"[init]\n\ttemplateDir = {template.parent}\n[core]\n\thooksPath = {template}\n"
        '[url "file:///nowhere/"]\n\tinsteadOf = /\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    target = tmp_path / "clones/x.git"
    clone(str(repo.path), target, protocols="file", seconds=30)
    assert head_of(target) == head_of(repo.path)
    assert not (target / "hooks").exists()
    assert not (tmp_path / "ran").exists()
