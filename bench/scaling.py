"""Scaling on one machine: two workers against one, and how busy a skewed list keeps both.

    python bench/scaling.py flask.git click.git requests.git --giant redis.git

1. `codeflow build` of the repositories with one worker and with two, in turn, median wall time of
   three. Beside it what the machine itself gives in the same minutes: two processes that only
   count, against one. A machine whose control is 1.6x cannot show more than 1.6x. The cores each
   build got (CPU over wall time) tell its own waiting from a busy machine.
2. `codeflow mine` of a list of one giant and 500 tiny repositories with two workers. Busy share:
   seconds spent inside units, from `journal.jsonl`, over workers x wall time from first to last.

Claim: with a skewed list, both workers are busy more than 90 % of the time. The first figure has
no claim: the steps with one unit for the whole dataset (`cluster`, `tokenizer`, `pack`) run alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pygit2

from codeflow.mine.history import read_mainline
from codeflow.mine.objects import Objects
from codeflow.mine.refs import find_git_dir, pinned_head
from examples.make_sample_repository import build as build_sample

_CLAIM = 0.9
_TINY = 500
_TINY_COMMITS = 40  # mainline steps of a tiny repository
_BURN = "x = 0\nwhile x < 30_000_000:\n    x += 1\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("repositories", nargs="+", type=Path)
    parser.add_argument("--giant", type=Path, help="default: no skewed list")
    parser.add_argument("--stage", default="build", choices=("build", "mine"), help="what to run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    options = parser.parse_args()
    two_against_one(options.stage, [r.resolve() for r in options.repositories], options.runs)
    if options.giant is None:
        return 0
    return 0 if skewed(options.giant.resolve()) else 1


def two_against_one(stage: str, repositories: list[Path], runs: int) -> None:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    cores: dict[int, list[float]] = {1: [], 2: []}
    controls = []
    for _ in range(runs):
        controls.append(control())
        for workers in seconds:
            with tempfile.TemporaryDirectory() as folder:
                before = children_cpu()
                wall = codeflow(stage, Path(folder), repositories, workers)
            seconds[workers].append(wall)
            cores[workers].append((children_cpu() - before) / wall)
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    got_one, got_two = (statistics.median(cores[workers]) for workers in (1, 2))
    limit = statistics.median(controls)
    print(
        f"{stage}, {len(repositories)} repositories: 1 worker {one:.1f} s on {got_one:.2f} cores, "
        f"2 workers {two:.1f} s on {got_two:.2f} cores: {one / two:.2f}x; "
        f"the machine's own control: {limit:.2f}x",
        flush=True,
    )


def skewed(giant: Path) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = tiny_repositories(folder / "tiny")
        wall = codeflow("mine", folder, [giant, *tiny], 2, "mine.min_commits=20")
        events = journal(folder / "data")
    steps = dict.fromkeys(e["step"] for e in events)
    for step in steps:
        of_step = [e for e in events if e["step"] == step]
        print(f"    {step:<9} {len(of_step):>4} units, {busy(of_step, 2):>4.0%} busy")
    share = busy(events, 2)
    print(
        f"1 giant ({giant.name}) and {len(tiny)} tiny: {wall:.1f} s, both workers busy "
        f"{share:.1%} of it (claim > {_CLAIM:.0%})"
    )
    return share > _CLAIM


def busy(events: list[dict[str, Any]], workers: int) -> float:
    """Share of the workers' time that was spent in units, from the first start to the last end."""
    start = min(e["time"] - e["seconds"] for e in events)
    end = max(e["time"] for e in events)
    return float(sum(e["seconds"] for e in events) / (workers * (end - start)))


def codeflow(
    command: str, folder: Path, repositories: list[Path], workers: int, *settings: str
) -> float:
    """Run one command into `folder/data`; wall seconds."""
    listing = folder / "list.txt"
    listing.write_text("".join(f"{r}\n" for r in repositories))
    arguments = [command, "--quiet", "--repos", listing, "--out", folder / "data"]
    arguments += ["--workers", workers, *(a for s in settings for a in ("--set", s))]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "codeflow", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - started


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def journal(dataset: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dataset / "journal.jsonl").read_text().splitlines()]


def control() -> float:
    """How much faster two processes burn two loads than one process both."""
    one = burn(1)
    return 2 * one / burn(2)


def burn(processes: int) -> float:
    started = time.monotonic()
    running = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(processes)]
    for process in running:
        process.wait()
    return time.monotonic() - started


def tiny_repositories(folder: Path) -> list[Path]:
    """Copies of the sample's first commits, each with a root of its own and so no fork.

    They borrow files and folders from the sample, as `git clone --shared` does; only the commits
    are written anew.
    """
    sample = folder / "sample.git"
    build_sample(sample)
    git = find_git_dir(sample)
    trees = [c.tree for c in read_mainline(Objects(git.objects, 1 << 20), pinned_head(git))]
    who = pygit2.Signature("Ana", "ana@example.org", 1_600_000_000, 60)
    result = []
    for number in range(_TINY):
        path = folder / f"tiny-{number:03d}.git"
        repository = pygit2.init_repository(str(path), bare=True, initial_head="main")
        repository.odb.add_disk_alternate(str(git.objects))
        (path / "objects" / "info" / "alternates").write_text(f"{git.objects}\n")
        head: list[pygit2.Oid] = []
        for step, tree in enumerate(trees[:_TINY_COMMITS]):
            message = f"Step {step} of stockroom {number}\n"
            head = [repository.create_commit(None, who, who, message, pygit2.Oid(hex=tree), head)]
        repository.references.create("refs/heads/main", head[0])
        result.append(path)
    return result


if __name__ == "__main__":
    sys.exit(main())
