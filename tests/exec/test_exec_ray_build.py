"""Whole builds on Ray: the same bytes as `local`, also after the driver was killed half-way."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from exec_ray import HANGS, ROOT, driver, kill_9, needs_ray, private_environment
from processes import all_gone, wait_for

pytestmark = [*needs_ray, pytest.mark.slow]

RECIPE = ROOT / "pipelines" / "quickstart.toml"


@pytest.fixture(autouse=True)
def private_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_environment(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def listed(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text(f"{sample_repository}\n")
    return path


def build(listed: Path, out: Path, *arguments: str) -> list[str]:
    command = ["build", "--repos", str(listed), "--out", str(out), "--recipe", str(RECIPE)]
    return [sys.executable, "-m", "codeflow", *command, "--workers", "2", *arguments]


def data(out: Path) -> dict[str, str]:
    """sha256 of every table and shard."""
    files = [p for d in ("tables", "shards") for p in (out / d).rglob("*") if p.is_file()]
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(files)
    }


def test_ray_writes_the_bytes_that_local_writes(listed: Path, tmp_path: Path) -> None:
    subprocess.run(build(listed, tmp_path / "local", "--quiet"), cwd=ROOT, check=True)
    expected = data(tmp_path / "local")
    assert any(path.startswith("shards/") for path in expected)

    under_ray = build(listed, tmp_path / "ray", "--executor", "ray")
    with driver(under_ray) as process:  # killed as soon as one unit is done
        assert wait_for(lambda: any((tmp_path / "ray").rglob("tables/triples/*")), seconds=60)
        children = kill_9(process)
        assert children
        assert all_gone(children)
    assert data(tmp_path / "ray") != expected

    again = subprocess.run(under_ray, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "ray" in again.stderr.splitlines()[0]
    assert data(tmp_path / "ray") == expected


def test_kill_9_of_the_driver_ends_what_its_units_started(tmp_path: Path) -> None:
    flags = [tmp_path / "a", tmp_path / "b"]
    with driver([sys.executable, "-c", HANGS, "local", *map(str, flags)]) as process:
        assert wait_for(lambda: all(f.exists() and f.read_text() for f in flags), seconds=60)
        processes = kill_9(process)
        assert processes > {int(flag.read_text()) for flag in flags}
        assert len(processes) == 4
        assert all_gone(processes)


def test_a_cluster_that_is_not_there_is_one_sentence_soon(listed: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    command = build(listed, tmp_path / "out", "--executor", "ray", "--address", "127.0.0.1:1")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: cannot join the Ray cluster at `127.0.0.1:1`" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 20
