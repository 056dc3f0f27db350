"""Servers that fail, lie, ask for passwords or send too much; and what is tried again."""

from __future__ import annotations

import functools
import http.server
import io
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import Repo, git, text

from codeflow.errors import RepositoryError
from codeflow.mine.fetch import new_clone, repository
from codeflow.mine.transfer import Limits, holds_password, is_network_error, redacted
from codeflow.recipe import Recipe
from codeflow.work import Work

SOON = Limits(seconds=30, attempts=3, pauses=(0.0,))
#: What a request gets before the repository itself: a status, a way to break, or a place to go.
Answers = list[int | str]


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    repo = Repo(tmp_path / "origin/r.git")
    repo.chain(*({b"a.py": text("a", 9, i)} for i in range(3)))
    git(repo.path, "update-server-info")
    return repo


class Server:
    """The repository over plain HTTP, once the given answers are used up."""

    def __init__(self, folder: Path, answers: Answers) -> None:
        left, self.requests, self.authorizations = list(answers), 0, set[str | None]()
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def send_head(self) -> io.BytesIO | None:
                outer.requests += 1
                outer.authorizations.add(self.headers["Authorization"])
                answer = left.pop(0) if left else 200
                if answer == 200:
                    return super().send_head()  # type: ignore[return-value]
                if answer == "reset":  # linger 0: close() sends RST
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    os.close(self.connection.detach())
                elif answer == "close":
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif isinstance(answer, str):
                    self.send_response(302)
                    self.send_header("Location", answer)
                    self.end_headers()
                else:
                    self.send_response(answer)
                    self.send_header("WWW-Authenticate", 'Basic realm="x"')
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                return None

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/r.git"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def serve(repo: Repo) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda *answers: stack.enter_context(
            Server(repo.path.parent, list(answers)).running()
        )


def failure(url: str, target: Path, limits: Limits = SOON, protocols: str = "http") -> str:
    with pytest.raises(RepositoryError) as error:
        new_clone(url, target, protocols, limits)
    assert not target.exists()
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    return f"{error.value.status}: {error.value}"


@pytest.mark.parametrize(
    "answers", [[503], [500, 502], [429], ["close"], ["reset"], ["reset", 503]], ids=str
)
def test_a_network_that_recovers_is_tried_again(
    repo: Repo, serve: Callable[..., Server], tmp_path: Path, answers: Answers
) -> None:
    server = serve(*answers)
    target = tmp_path / "clones/x.git"
    new_clone(server.url, target, "http", SOON)
    assert git(target, "rev-parse", "HEAD") == git(repo.path, "rev-parse", "HEAD")
    assert server.requests > len(answers)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "not found"), (403, "403"), (401, "Authentication failed"), (410, "410")],
)
def test_a_refusal_is_final(
    serve: Callable[..., Server], tmp_path: Path, status: int, said: str
) -> None:
    server = serve(*[status] * 50)
    message = failure(server.url, tmp_path / "clones/x.git")
    assert message.startswith("clone_failed: clone failed: fatal: ")
    assert said in message
    assert "attempt" not in message
    assert server.requests <= 3  # git's own: smart, with a password, dumb


def test_the_last_of_all_attempts_is_told(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(*[503] * 50)
    message = failure(server.url, tmp_path / "clones/x.git")
    assert "503" in message
    assert "(attempt 3)" in message


def test_one_attempt_is_one(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(503)
    failure(server.url, tmp_path / "clones/x.git", Limits(30, attempts=1))
    assert server.requests == 1


def test_a_pause_beyond_the_time_limit_is_not_begun(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(*[503] * 50)
    started = time.monotonic()
    message = failure(server.url, tmp_path / "clones/x.git", Limits(20, pauses=(60.0,)))
    assert "503" in message
    assert time.monotonic() - started < 15


def test_pauses_are_kept(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    server = serve(*[503] * 50)
    monkeypatch.setattr("codeflow.mine.transfer.sleep", slept.append)
    failure(server.url, tmp_path / "clones/x.git", Limits(900, attempts=5, pauses=(1, 4)))
    assert slept == [1, 4, 4, 4]


def test_the_time_limit_covers_all_attempts(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.git"
        started = time.monotonic()
        message = failure(url, tmp_path / "clones/x.git", Limits(0.8, pauses=(0.0,)))
    assert message.startswith("clone_timeout: clone took longer than 0.8 s")
    assert time.monotonic() - started < 8


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    message = failure(f"http://127.0.0.1:{port}/x.git", tmp_path / "clones/x.git")
    assert "(attempt 3)" in message


@pytest.mark.parametrize("protocol", ["http", "file"])
def test_a_repository_that_is_too_large_is_given_up(
    serve: Callable[..., Server], repo: Repo, tmp_path: Path, protocol: str
) -> None:
    repo.chain({b"noise": os.urandom(2_200_000)})
    git(repo.path, "update-server-info")
    url = serve().url if protocol == "http" else str(repo.path)
    limits = Limits(30, max_mib=2)
    message = failure(url, tmp_path / "clones/x.git", limits, protocol)
    assert message.startswith("too_large: ")
    assert "2 MiB (run.clone_max_mib)" in message
    new_clone(url, tmp_path / "clones/x.git", protocol, Limits(30, max_mib=4))


# -- credentials ----------------------------------------------------------------------------------


def test_a_url_with_a_password_is_not_cloned_and_not_repeated(tmp_path: Path) -> None:
    for url in (
        "https://me:s3cret@127.0.0.1/x",
        "https://s3cret@127.0.0.1/x",
        "ssh://a:s3cret@h/x",
    ):
        message = failure(url, tmp_path / "clones/x.git")
        assert "s3cret" not in message
        assert "~/.netrc" in message


def test_a_redirect_with_a_password_is_not_repeated(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    port = serve().port
    server = serve(f"http://me:s3cret@127.0.0.1:{port}/none.git/info/refs?service=git-upload-pack")
    assert "s3cret" not in failure(server.url, tmp_path / "clones/x.git")


def test_a_password_of_the_environment_is_used_and_left_there(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(401)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GIT_ASKPASS", raising=False)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    target = tmp_path / "clones/x.git"
    new_clone(server.url, target, "http", SOON)
    assert server.authorizations == {None, "Basic bWU6czNjcmV0"}
    assert not any(b"s3cret" in p.read_bytes() for p in target.rglob("*") if p.is_file())


def test_an_askpass_program_of_the_user_is_asked(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "askpass"
    program.write_text("#!/bin/sh\necho s3cret\n")
    program.chmod(0o755)
    monkeypatch.setenv("GIT_ASKPASS", str(program))
    server = serve(401)
    new_clone(server.url, tmp_path / "clones/x.git", "http", SOON)
    assert "Basic czNjcmV0OnMzY3JldA==" in server.authorizations


def test_the_units_facts_and_error_hold_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"kind": "url", "location": "https://127.0.0.1:9/none", "git_dir": "clones/u.git"}
    work = Work(tmp_path / "data", "u", "f" * 64, {}, dict(facts))
    monkeypatch.setattr("codeflow.mine.transfer.sleep", lambda _: None)
    monkeypatch.setenv("https_proxy", "http://me:s3cret@127.0.0.1:9")
    with pytest.raises(RepositoryError) as error:
        repository(work, Recipe())
    assert "s3cret" not in f"{error.value} {error.value.args} {work.facts}"


@given(
    st.from_regex(r"[a-z]{2,6}", fullmatch=True),
    st.text(st.characters(codec="ascii", exclude_characters="/@'\" \n\r\t", categories=["L", "N"])),
)
def test_redaction_leaves_nothing_of_a_password(user: str, password: str) -> None:
    secret = f"{password}Q7"
    said = f"fatal: unable to access 'https://{user}:{secret}@example.org/x/': error"
    assert redacted(said) == "fatal: unable to access 'https://example.org/x/': error"
    assert holds_password(f"https://{user}:{secret}@example.org/x")
    assert holds_password(f"ssh://{user}:{secret}@example.org/x")
    assert not holds_password(f"ssh://{user}@example.org/x")


# -- what is worth another attempt ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("fatal: unable to access 'https://x/': Could not resolve host: x", True),
        ("ssh: Could not resolve hostname x: Temporary failure in name resolution", True),
        ("fatal: unable to access 'https://x/': Failed to connect to x port 443 after 9 ms", True),
        ("ssh: connect to host x port 22: Connection timed out\nfatal: Could not read from remote"
         " repository.", True),
        ("error: RPC failed; curl 56 GnuTLS recv error (-110): The TLS connection was non-properly"
         " terminated.\nfatal: early EOF", True),
        ("error: RPC failed; HTTP 502 curl 22 The requested URL returned error: 502", True),
        ("fatal: the remote end hung up unexpectedly", True),
        ("error: RPC failed; curl 28 Operation too slow. Less than 1000 bytes/sec", True),
        ("fatal: unable to access 'https://x/': The requested URL returned error: 429", True),
        ("fatal: unable to access 'https://x/': The requested URL returned error: 403", False),
        ("remote: Repository not found.\nfatal: repository 'https://x/' not found", False),
        ("fatal: Authentication failed for 'https://x/'", False),
        ("fatal: could not read Username for 'https://x': terminal prompts disabled", False),
        ("git@x: Permission denied (publickey).\nfatal: Could not read from remote repository.",
         False),
        ("ERROR: Repository not found.\nConnection to x closed by remote host.\nfatal: Could not"
         " read from remote repository.", False),
        ("Host key verification failed.\nfatal: Could not read from remote repository.", False),
        ("fatal: transport 'ext' not allowed", False),
        ("fatal: server certificate verification failed. CAfile: none", False),
        ("fatal: '/x' does not appear to be a git repository", False),
        ("fatal: unable to access 'https://not found/denied': Could not resolve host", True),
        ("fatal: repository 'https://timed-out/early eof/' is odd", False),
        ("fatal: something nobody thought of", False),
        ("", False),
    ],
)  # fmt: skip
def test_which_messages_are_the_networks(said: str, again: bool) -> None:
    assert is_network_error(said) is again
