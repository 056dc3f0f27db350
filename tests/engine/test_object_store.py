"""A dataset under s3://: the same bytes as in a folder, and nothing of its neighbours."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_builds import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, USER, Relay, S3Server, Watcher

from codeflow import storage
from codeflow.dataset import Dataset, Marker
from codeflow.errors import DatasetError
from codeflow.storage import (
    ObjectPath,
    files_below,
    parse_root,
    relative_name,
    sha256_of,
    write_atomically,
    writing,
)
from codeflow.work import Work

pytestmark = pytest.mark.s3
RECIPE = ROOT / "pipelines" / "quickstart.toml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with a bucket, and the environment that reaches it, also for child processes."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    with pytest.MonkeyPatch.context() as patch:
        try:
            server.client().create_bucket(Bucket=BUCKET)
            for name, value in (USER | {"AWS_ENDPOINT_URL": server.endpoint}).items():
                patch.setenv(name, value)
            storage._filesystem.cache_clear()
            yield server
        finally:
            server.close()
            storage._filesystem.cache_clear()


@pytest.fixture
def relay_to(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put a relay with a watcher between this process and the server."""
    with contextlib.ExitStack() as stack:

        def put(watcher: Watcher) -> None:
            relay = stack.enter_context(Relay(store, watcher))
            monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
            storage._filesystem.cache_clear()

        yield put
    storage._filesystem.cache_clear()


def codeflow(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line, in the environment as the test has set it."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def in_folder(folder: Path) -> dict[str, str]:
    """sha256 of every file of a dataset folder that an object store has, too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "journal.jsonl")
    }


def in_store(store: S3Server, prefix: str) -> dict[str, str]:
    found = store.objects(prefix)
    return {name: sha for name, sha in found.items() if not name.startswith("journal/")}


@pytest.fixture
def arguments(sample_repository: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "list").write_text(f"{sample_repository}\n")
    return ["build", "--repos", tmp_path / "list", "--recipe", RECIPE, "--workers", "2", "--out"]


# -- whole builds ---------------------------------------------------------------------------------


def test_a_build_has_the_bytes_of_one_into_a_folder_and_is_then_done(
    store: S3Server, arguments: list[object], tmp_path: Path
) -> None:
    codeflow(*arguments, tmp_path / "data")
    codeflow(*arguments, f"s3://{BUCKET}/whole/data")
    expected = in_folder(tmp_path / "data")
    assert in_store(store, "whole/data") == expected
    assert {"tables", "shards", "markers"} <= {name.partition("/")[0] for name in expected}
    before = store.objects("whole/data")
    assert "nothing to do" in codeflow(*arguments, f"s3://{BUCKET}/whole/data/").stderr
    assert store.objects("whole/data") == before


def test_a_changed_setting_sweeps_what_the_old_one_made(
    store: S3Server, arguments: list[object], tmp_path: Path
) -> None:
    for out in (tmp_path / "data", f"s3://{BUCKET}/changed"):
        codeflow(*arguments, out)
        codeflow(*arguments, out, "--set", "pack.length=8192")
    assert in_store(store, "changed") == in_folder(tmp_path / "data")


def test_verify_and_show_read_the_store(store: S3Server, arguments: list[object]) -> None:
    out = f"s3://{BUCKET}/shown"
    codeflow(*arguments, out)
    assert "(100.00 %)" in codeflow("verify", out).stdout
    assert "mined of 1" in codeflow("show", out).stdout
    assert codeflow("show", out, "row:0").stdout
    assert 'name = "quickstart"' in codeflow("show", out, "recipe").stdout
    shard = next(name for name in store.objects("shown") if name.startswith("shards/shard-"))
    s3 = store.client()
    data = bytearray(s3.get_object(Bucket=BUCKET, Key=f"shown/{shard}")["Body"].read())
    data[40] ^= 1
    s3.put_object(Bucket=BUCKET, Key=f"shown/{shard}", Body=bytes(data))
    assert f"{shard} has changed" in codeflow("verify", out, expect=1).stderr
    s3.delete_object(Bucket=BUCKET, Key=f"shown/{shard}")
    assert f"{shard} is missing" in codeflow("verify", out, expect=1).stderr


def test_datasets_whose_names_begin_alike_do_not_see_each_other(store: S3Server) -> None:
    short, longer = (
        Dataset.create(parse_root(f"s3://{BUCKET}/{name}")) for name in ("alike", "alike-b")
    )
    for dataset, unit in ((short, "a"), (longer, "b")):
        work = Work(dataset.root, unit, "f" * 24, {})
        work.write("rejects", {"triple_id": [unit], "reason": ["x"], "detail": [""]})
        dataset.commit(Marker("compose", unit, "f" * 24, files=tuple(work.written)))
    write_atomically(short.root / "tables/rejects/stale.parquet", b"")
    before = store.objects("alike-b")
    short.sweep()
    assert store.objects("alike-b") == before
    assert "tables/rejects/stale.parquet" not in store.objects("alike")
    assert short.read("rejects")["triple_id"].to_pylist() == ["a"]
    assert longer.read("rejects")["triple_id"].to_pylist() == ["b"]


def test_a_prefix_of_something_else_is_refused_and_left_alone(
    store: S3Server, arguments: list[object]
) -> None:
    store.client().put_object(Bucket=BUCKET, Key="thesis/chapter/1.tex", Body=b"x")
    before = store.objects("thesis")
    refused = codeflow(*arguments, f"s3://{BUCKET}/thesis", expect=1)
    assert "not empty (it holds `chapter/1.tex`)" in refused.stderr
    assert store.objects("thesis") == before


# -- the path type --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket/x", "not gs://"),
        ("S3://bucket/x", "not S3://"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket//x", "empty part"),
        ("s3://bucket/x//y/", "empty part"),
    ],
)
def test_places_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse_root(text)


PARTS = st.text("abcXYZ09-_.é %+~", min_size=1, max_size=9).filter(lambda p: p.strip(". ") == p)


@settings(max_examples=25, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.binary(max_size=100))
def test_what_is_written_is_read_listed_and_removed(
    store: S3Server, parts: list[str], data: bytes
) -> None:
    prefix = secrets.token_hex(8)  # a failed example leaves its object behind
    root = parse_root(f"s3://{BUCKET}/{prefix}")
    path = root
    for part in parts:
        path = path / part
    write_atomically(path, data)
    assert path.exists()
    assert path.read_bytes() == data
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert files_below(root) == [path]
    assert relative_name(path, root) == "/".join(parts)
    assert store.objects(prefix) == {"/".join(parts): hashlib.sha256(data).hexdigest()}
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()
    assert sha256_of(path) is None
    with pytest.raises(FileNotFoundError):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_a_large_object_goes_up_in_parts_and_comes_back(store: S3Server) -> None:
    path = parse_root(f"s3://{BUCKET}/large/object")
    data = hashlib.shake_256(b"seed").digest(25_000_001)
    write_atomically(path, data)
    assert store.client().head_object(Bucket=BUCKET, Key="large/object")["ContentLength"] == len(
        data
    )
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert isinstance(path, ObjectPath)
    with path.open_input() as source:
        source.seek(20_000_000)
        assert source.read(9) == data[20_000_000:20_000_009]


@pytest.mark.usefixtures("store")
def test_a_write_that_fails_leaves_the_object_as_it_was() -> None:
    path = parse_root(f"s3://{BUCKET}/failed/object")
    write_atomically(path, b"old")

    def interrupted() -> None:
        with writing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"


def test_an_upload_cut_off_in_the_middle_is_no_object(
    store: S3Server, relay_to: Callable[..., None]
) -> None:
    relay_to(lambda _, path: 403 if "partNumber=2" in path else None)
    with pytest.raises(DatasetError, match=r"cut/object: .*AWS_ACCESS_KEY_ID"):
        write_atomically(parse_root(f"s3://{BUCKET}/cut/object"), bytes(25_000_000))
    assert store.objects("cut") == {}


def test_ctrl_c_during_an_upload_waits_for_the_whole_object(
    store: S3Server, relay_to: Callable[..., None]
) -> None:
    """A stream of Arrow's is completed when an exception closes it, whole or not."""
    data = hashlib.shake_256(b"whole").digest(25_000_001)

    def interrupt(_: str, path: str) -> None:
        if "uploads" in path:  # before the first byte is sent
            signal.raise_signal(signal.SIGINT)

    relay_to(interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(parse_root(f"s3://{BUCKET}/interrupted/object"), data)
    assert store.objects("interrupted") == {"object": hashlib.sha256(data).hexdigest()}


def test_a_slow_store_gets_the_upload_all_the_same(
    store: S3Server, relay_to: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds of silence before each answer, and no second try."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    relay_to(lambda method, _: time.sleep(5) if method == "PUT" else None)
    write_atomically(parse_root(f"s3://{BUCKET}/slow/object"), b"x")
    assert set(store.objects("slow")) == {"object"}


def test_a_busy_store_is_asked_again(
    store: S3Server, relay_to: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    refusals = iter([503, 500, 503])
    relay_to(lambda method, _: next(refusals, None) if method == "PUT" else None)
    write_atomically(parse_root(f"s3://{BUCKET}/busy/object"), b"x")
    assert set(store.objects("busy")) == {"object"}
    assert next(refusals, None) is None


def test_a_store_that_fails_while_it_is_read_is_not_a_missing_file(
    store: S3Server, relay_to: Callable[..., None]
) -> None:
    path = parse_root(f"s3://{BUCKET}/read/object")
    write_atomically(path, bytes(1000))
    relay_to(lambda method, _: 403 if method == "GET" else None)
    with pytest.raises(DatasetError, match=r"read/object: .*ACCESS_DENIED"):
        sha256_of(path)
    assert set(store.objects("read")) == {"object"}


@pytest.mark.parametrize("attempts", ["0", "many", "-1", ""])
@pytest.mark.usefixtures("store")
def test_a_bad_number_of_attempts_is_named(attempts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    storage._filesystem.cache_clear()
    with pytest.raises(DatasetError, match=f"AWS_MAX_ATTEMPTS .*`{attempts}`"):
        parse_root(f"s3://{BUCKET}/x").exists()
    storage._filesystem.cache_clear()
