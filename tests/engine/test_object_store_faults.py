"""Builds under s3://: killed at the worst moment, refused, or with nobody at the other end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_builds import ROOT, command
from processes import all_gone, descendants, running
from s3_server import BUCKET, USER, Relay, S3Server

from codeflow.dataset import Dataset
from codeflow.storage import files_below, parse_root, relative_name

pytestmark = [pytest.mark.s3, pytest.mark.slow]
RECIPE = ROOT / "pipelines" / "quickstart.toml"
UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    started = S3Server(tmp_path_factory.mktemp("s3") / "log")
    try:
        started.client().create_bucket(Bucket=BUCKET)
        yield started
    finally:
        started.close()


@pytest.fixture
def arguments(sample_repository: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "list").write_text(f"{sample_repository}\n")
    return ["build", "--repos", tmp_path / "list", "--recipe", RECIPE, "--workers", "1", "--out"]


@pytest.fixture(scope="module")
def whole(
    server: S3Server, sample_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The objects of an undisturbed build."""
    listed = tmp_path_factory.mktemp("list") / "list"
    listed.write_text(f"{sample_repository}\n")
    arguments = ["build", "--repos", listed, "--recipe", RECIPE, "--out", f"s3://{BUCKET}/whole"]
    code, said = ended(start(arguments, server.endpoint))
    assert code == 0, said
    return data(server, "whole")


def environment(endpoint: str, **extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in UNSET}
    return clean | USER | {"AWS_ENDPOINT_URL": endpoint} | extra


def start(arguments: list[object], endpoint: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), env=environment(endpoint, **extra), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything it said; never a traceback."""
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode, output + errors


def data(server: S3Server, prefix: str) -> dict[str, str]:
    return {k: v for k, v in server.objects(prefix).items() if not k.startswith("journal/")}


class KillAtCommit:
    """Watches a store; when a step's first marker is about to be written, kills its writer.

    At that moment all the unit's data has been uploaded, and nothing says that it counts.
    """

    def __init__(self, step: str, *, driver: bool) -> None:
        self.step = step
        self.driver = driver
        self.build: subprocess.Popen[str] | None = None
        self.killed: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> int | None:
        if f"/markers/{self.step}/" not in path or method not in ("PUT", "POST"):
            return None
        with self._lock:
            if not self.killed:
                assert self.build is not None
                self.killed = descendants(self.build.pid)
                if self.driver:
                    self.killed.add(self.build.pid)
                for pid in self.killed:
                    os.kill(pid, signal.SIGKILL)
                return 500  # the request reached the store's door, and no further
        return None


@pytest.mark.parametrize(("step", "driver"), [("pack", False), ("mine", True)])
def test_kill_9_between_upload_and_marker(
    server: S3Server, whole: dict[str, str], arguments: list[object], step: str, driver: bool
) -> None:
    prefix = f"killed-{step}"
    out = f"s3://{BUCKET}/{prefix}"
    watcher = KillAtCommit(step, driver=driver)
    with Relay(server, watcher) as relay:
        watcher.build = start([*arguments, out], relay.endpoint)
        code, said = ended(watcher.build)
    assert watcher.killed
    assert all_gone(watcher.killed)
    if driver:
        assert code == -signal.SIGKILL
        left = data(server, prefix)
        assert any(name.startswith("tables/") for name in left)
        assert not any(name.startswith(f"markers/{step}/") for name in left)
        assert "manifest.json" not in left
        code, said = ended(start([*arguments, out], server.endpoint))
    assert code == 0, said
    assert data(server, prefix) == whole


def test_what_a_killed_run_left_does_not_count(
    server: S3Server, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "orphans"
    watcher = KillAtCommit("mine", driver=True)
    with Relay(server, watcher) as relay:
        watcher.build = start([*arguments, f"s3://{BUCKET}/{prefix}"], relay.endpoint)
        ended(watcher.build)
    for name, value in environment(server.endpoint).items():
        monkeypatch.setenv(name, value)
    root = parse_root(f"s3://{BUCKET}/{prefix}")
    script = (
        "import sys; from codeflow.dataset import Dataset; from codeflow.storage import *\n"
        "d = Dataset.open(parse_root(sys.argv[1])); print(d.has('triples'))"
    )
    shown = subprocess.run(
        [*command()[:1], "-c", script, str(root)], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "False\n"
    assert any(name.startswith("tables/triples/") for name in server.objects(prefix))
    # Another recipe gives the unit another name, so what was left is never taken up again.
    again = [*arguments, str(root), "--set", "mine.min_commits=12"]
    assert ended(start(again, server.endpoint))[0] == 0
    named = {f.path for m in Dataset(root).all_markers() for f in m.files}
    tables = {relative_name(p, root) for p in files_below(root / "tables")}
    assert tables
    assert tables <= named


# -- nothing to talk to ---------------------------------------------------------------------------


def one_error(process: subprocess.Popen[str], *words: str) -> None:
    code, said = ended(process)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1, said
    assert len(errors) == 1, said
    for word in words:
        assert word in errors[0]


def test_a_missing_bucket_is_one_error(server: S3Server, arguments: list[object]) -> None:
    process = start([*arguments, "s3://no-such-bucket/data"], server.endpoint)
    one_error(process, "s3://no-such-bucket/data", "NO_SUCH_BUCKET")


def test_wrong_credentials_are_one_error(tmp_path: Path, arguments: list[object]) -> None:
    server = S3Server(tmp_path / "log", checked=True)
    try:
        process = start([*arguments, f"s3://{BUCKET}/data"], server.endpoint)
        one_error(process, f"s3://{BUCKET}/data", "ACCESS", "AWS_SECRET_ACCESS_KEY")
    finally:
        server.close()


def test_no_server_is_one_error(tmp_path: Path, arguments: list[object]) -> None:
    server = S3Server(tmp_path / "log")
    server.close()
    process = start([*arguments, f"s3://{BUCKET}/data"], server.endpoint)
    one_error(process, f"s3://{BUCKET}/data", "Could not connect", "AWS_ENDPOINT_URL")


def test_a_server_that_goes_away_is_one_error_and_the_build_goes_on_when_it_is_back(
    server: S3Server, whole: dict[str, str], arguments: list[object]
) -> None:
    gone = threading.Event()

    def leave(_: str, path: str) -> int | None:
        if "/markers/score/" in path:
            gone.set()
        return 503 if gone.is_set() else None

    out = f"s3://{BUCKET}/away"
    with Relay(server, leave) as relay:
        process = start([*arguments, out], relay.endpoint)
        one_error(process, out, "AWS_ENDPOINT_URL")
    assert gone.is_set()
    assert not running(process.pid)
    assert ended(start([*arguments, out], server.endpoint))[0] == 0
    assert data(server, "away") == whole
