"""A long list as the world has it: the same histories under many names, and broken ones between."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_builds import Recorder, recipe

from codeflow.dataset import Dataset
from codeflow.mine.history import read_mainline
from codeflow.mine.objects import Objects
from codeflow.mine.refs import find_git_dir, pinned_head
from codeflow.mine.sources import Source, parse_sources
from codeflow.pipeline import BuildResult, RunOptions, build
from codeflow.report.summary import render, summarize

sys.path.insert(0, str(Path(__file__).parents[1] / "exec"))  # for `exec_ray`
from exec_ray import needs_ray, private_environment

Repositories = tuple[Path, Path, Path]
BROKEN_SHARE = 0.06


def mainline_ids(repository: Path) -> list[str]:
    git = find_git_dir(repository)
    return [c.id for c in read_mainline(Objects(git.objects, 1 << 20), pinned_head(git))]


def borrow(origin: Path, path: Path, head: str) -> None:
    """A clone of five small files: it reads its objects in `origin`."""
    (path / "objects" / "info").mkdir(parents=True)
    (path / "refs").mkdir()
    (path / "objects" / "info" / "alternates").write_text(f"{origin / 'objects'}\n")
    (path / "HEAD").write_text(f"{head}\n")


# -- ways to be broken ----------------------------------------------------------------------------
# Each is applied to a sound clone after the list was read: reading it already refuses what it sees.


def empty(path: Path) -> None:
    (path / "HEAD").write_text("ref: refs/heads/main\n")


def shallow(path: Path) -> None:
    (path / "shallow").write_text((path / "HEAD").read_text())


def corrupt_pack(path: Path) -> None:
    for pack in (path / "objects" / "pack").glob("*.pack"):
        data = pack.read_bytes()
        pack.chmod(0o644)
        pack.write_bytes(data[:12] + b"\xff" * (len(data) - 32) + data[-20:])


def no_repository(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "README").write_text("moved away\n")


def missing_objects(path: Path) -> None:
    (path / "objects" / "info" / "alternates").unlink()


def unreadable_head(path: Path) -> None:
    (path / "HEAD").write_bytes(b"\xff\xfe\x00 no ref \x1b[2J\n")


WAYS: dict[Callable[[Path], None], str] = {
    empty: r"HEAD names no commit",
    shallow: r"shallow clone: .*`git fetch --unshallow`",
    corrupt_pack: r"cannot read the history of HEAD",
    no_repository: r"is not a git repository",
    missing_objects: r"cannot read the history of HEAD",
    unreadable_head: r"HEAD names no commit",
}


class LongList:
    """`size` entries below a folder, some of them to be broken once the list was read."""

    def __init__(self, folder: Path, repositories: Repositories, size: int) -> None:
        packed = folder / "packed.git"
        clone = ["git", "clone", "--quiet", "--bare", "--no-local"]
        subprocess.run([*clone, str(repositories[1]), str(packed)], check=True)
        chains = [mainline_ids(r) for r in repositories]
        per_way = round(size * BROKEN_SHARE / len(WAYS))
        self.broken: dict[Path, Callable[[Path], None]] = {}
        for way in WAYS:
            for number in range(per_way):
                path = folder / f"{way.__name__}-{number:03d}.git"
                if way is corrupt_pack:
                    shutil.copytree(packed, path)
                else:
                    borrow(repositories[1], path, chains[1][-1])
                self.broken[path] = way
        #: Clones by family, and how long their mainlines are: every fifth is up to date.
        self.families: list[dict[Path, int]] = [{} for _ in repositories]
        for number in range(size - len(self.broken)):
            family = number % len(repositories)
            behind = number // len(repositories) % 5
            chain = chains[family][: len(chains[family]) - behind]
            path = folder / f"clone-{number:04d}.git"
            borrow(repositories[family], path, chain[-1])
            self.families[family][path] = len(chain)
        clones = [path for family in self.families for path in family]
        self.sources = parse_sources(map(str, [*self.broken, *clones]), "list")

    def spoil(self) -> None:
        for path, way in self.broken.items():
            way(path)

    def source(self, path: Path) -> Source:
        return next(s for s in self.sources if s.location == str(path.resolve()))


@pytest.fixture(autouse=True)
def private_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_environment(tmp_path_factory.getbasetemp()):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "size"), [("local", 1000), pytest.param("ray", 1000, marks=needs_ray)]
)
def test_everything_on_a_long_list_is_mined_a_fork_or_named_as_broken(
    repositories: Repositories, tmp_path: Path, executor: str, size: int
) -> None:
    listed = LongList(tmp_path / "list", repositories, size)
    listed.spoil()
    first = run(listed, tmp_path / "data", executor)
    dataset = Dataset.open(tmp_path / "data")
    assert first.exit_code == 3
    broken_are_named(listed, first, dataset)
    families_are_collapsed(listed, dataset)
    events = [json.loads(line) for line in (tmp_path / "data/journal.jsonl").open()]
    assert {e["attempts"] for e in events} == {1}
    assert Counter(e["status"] for e in events)["failed"] == len(listed.broken)
    # What is broken is no reason to do anything again.
    again = run(listed, tmp_path / "data", executor)
    assert (again.ran, again.exit_code) == (0, 3)


def run(listed: LongList, out: Path, executor: str) -> BuildResult:
    options = RunOptions(executor=executor, workers=2)
    return build(out, recipe(), listed.sources, Recorder(), options)


def broken_are_named(listed: LongList, result: BuildResult, dataset: Dataset) -> None:
    told = {marker.unit: marker.reason for marker in result.quarantined}
    expected = {listed.source(path).repo_id: way for path, way in listed.broken.items()}
    assert told.keys() == expected.keys()
    for unit, way in expected.items():
        assert re.search(WAYS[way], told[unit]), (unit, told[unit])
    lines = render(summarize(dataset, recipe()), recipe()).splitlines()
    for unit, reason in told.items():
        assert f"  failed: fetch {unit}: {reason}" in lines
    assert not any("\x1b" in line for line in lines)


def families_are_collapsed(listed: LongList, dataset: Dataset) -> None:
    rows = {row["source"]: row for row in dataset.read("repos").to_pylist()}
    assert len(rows) == len(listed.sources) - len(listed.broken)
    leaders = set()
    for family in listed.families:
        ids = {path: listed.source(path).repo_id for path in family}
        longest = max(family.values())
        leader = min(ids[path] for path, length in family.items() if length == longest)
        leaders.add(leader)
        for path, length in family.items():
            row = rows[str(path.resolve())]
            assert (row["leader"], row["mainline_commits"]) == (leader, length)
            assert row["status"] == ("mined" if row["repo_id"] == leader else "fork")
            assert row["repo_id"] == leader or leader in row["reason"]
    assert set(dataset.read("triples")["repo_id"].to_pylist()) == leaders
    summary = summarize(dataset, recipe())
    assert (summary.mined, summary.skipped) == (len(leaders), {"fork": len(rows) - len(leaders)})
