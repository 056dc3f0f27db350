"""Mining speed: codeflow against PyDriller and against git itself, same commits, one run.

    codeflow           per commit: metadata, changed files with renames, unified diff, and the bytes
                       of every changed text file before and after
    + replay, Parquet  `codeflow`, every patch replayed and every root tree hashed again, and all of
                       it written: commits, triples, changes and the contents of changed files
    mine               the unit `mine` of a build, one triple a commit: that, and the whole state
                       before and after every commit, side branches, and a walk of the mainline
    PyDriller          what `codeflow` gives, the way its users get it
    diff-tree          `git diff-tree -p` for the patches and `git cat-file --batch` for the bytes,
                       parsed in Python: what `codeflow` gives, from two git processes
    git log -p         patch text alone: the floor, not a peer

CPU time (user + system, children included), median of interleaved runs, because wall time on a
shared machine says little. All sides are told which commits: the non-merge first-parent commits of
the 40-80 % window.

    python bench/mining.py [--limit COMMITS] path/to/flask.git [more repositories]
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from codeflow.mine import fetch, flow, survey
from codeflow.mine import run as mine
from codeflow.mine.commits import Commit, parse_commit
from codeflow.mine.history import mainline, maturity_window
from codeflow.mine.objects import EMPTY_TREE, Objects
from codeflow.mine.refs import find_git_dir, pinned_head
from codeflow.mine.snapshot import FirstSeen, Snapshot
from codeflow.mine.triple import Prover, net_change
from codeflow.recipe import MineSettings, Recipe
from codeflow.tables import BLOBS
from codeflow.work import Work

SETTINGS = MineSettings(policy="commit")
RECIPE = Recipe(mine=SETTINGS)
DEFAULT = ("https://github.com/pallets/flask", Path("build/bench/flask.git"))
#: How many times as fast as the peer, least.
CLAIMS = (
    ("codeflow", "PyDriller", 8.0),
    ("codeflow", "diff-tree", 1.2),
    ("codeflow", "git log -p", 0.65),
    ("+ replay, Parquet", "PyDriller", 4.0),
)
GIT_ENV = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


@dataclass(frozen=True)
class Job:
    """One repository and the commits that every side is asked for.

    Attributes:
        facts: What the unit `mine` is told by a build.
    """

    repository: Path
    commits: list[Commit]
    facts: dict[str, Any]

    @property
    def names(self) -> bytes:
        return "".join(f"{c.id}\n" for c in self.commits).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("repositories", nargs="*", type=Path, help="default: a clone of flask")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--limit", type=int, help="only the first commits of the window")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    print(f"{'repository':<14} {'commits':>7}  {'side':<17} {'CPU s':>8} {'commits/s':>9}")
    met = [
        compare(window_commits(repository, options.limit), options.runs)
        for repository in options.repositories or [cloned_default()]
    ]
    return 0 if all(met) else 1


def compare(job: Job, runs: int) -> bool:
    """Run all sides in turn, print their speeds and what becomes of the claims."""
    sides: dict[str, Callable[[Job], int]] = {
        "codeflow": with_codeflow,
        "+ replay, Parquet": with_replay,
        "mine": with_unit,
        "PyDriller": with_pydriller,
        "diff-tree": with_diff_tree,
        "git log -p": with_git_log,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):  # the first is a warm-up: page cache, imports
        for name, side in sides.items():
            before = cpu_seconds()
            side(job)
            if run:
                seconds[name].append(cpu_seconds() - before)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    count = len(job.commits)
    for name, value in median.items():
        print(
            f"{job.repository.name[:14]:<14} {count:>7}  {name:<17} {value:>8.3f} "
            f"{count / value:>9.0f}"
        )
    met = True
    for ours, peer, least in CLAIMS:
        ratio = median[peer] / median[ours]
        met &= ratio >= least
        verdict = "met" if ratio >= least else "NOT MET"
        print(f"    {ours} / {peer}: {ratio:.2f}x, claim {least}x: {verdict}")
    return met


def window_commits(repository: Path, limit: int | None) -> Job:
    git = find_git_dir(repository)
    objects = Objects(git.objects, SETTINGS.max_blob_bytes)
    chain = mainline(lambda c: parse_commit(c, objects.commit(c)), pinned_head(git))
    window = maturity_window(len(chain), SETTINGS.window_from, SETTINGS.window_to)
    found = [p for p in range(window.start, window.stop) if len(chain[p].parents) < 2][:limit]
    # From the state before the first commit to the one after the last.
    ends = [max(found[0] - 1, 0), found[-1] + 1]
    return Job(repository, [chain[p] for p in found], planned(repository) | {"slice": ends})


def planned(repository: Path) -> dict[str, Any]:
    """What a build knows of a repository before it mines it."""
    location = str(repository.resolve())
    facts = {"repo_id": "bench", "name": "bench", "kind": "path", "location": location}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), "bench", "0" * 12, {}, facts | {"leader": "bench"})
        fetch.run(work, RECIPE)
        survey.run(work, RECIPE)
        return work.facts


# -- the sides; each returns the bytes it was given, so that none can be lazy ---------------------


def with_codeflow(job: Job) -> int:
    objects = Objects(find_git_dir(job.repository).objects, SETTINGS.max_blob_bytes)
    total = 0
    for parent, commit in with_parents(objects, job.commits):
        old = parent.tree if parent else EMPTY_TREE
        if old == commit.tree:
            continue
        for file in net_change(objects, old, commit.tree, SETTINGS).files:
            total += len(file.section)
            if file.kind == "text":
                for blob in (file.delta.old_blob, file.delta.new_blob):
                    total += len(objects.content(blob)) if blob else 0
    return total


def with_parents(objects: Objects, commits: list[Commit]) -> Iterator[tuple[Commit | None, Commit]]:
    """Each commit with its first parent, which on a mainline is mostly the one before it."""
    last: Commit | None = None
    for known in commits:
        commit = parse_commit(known.id, objects.commit(known.id))
        parent = commit.parents[0] if commit.parents else None
        if parent is not None and (last is None or last.id != parent):
            last = parse_commit(parent, objects.commit(parent))
        yield last if parent else None, commit
        last = commit


def with_replay(job: Job) -> int:
    objects = Objects(find_git_dir(job.repository).objects, SETTINGS.max_blob_bytes)
    ends: list[Commit] = []  # the commit before and the commit, in pairs
    triples: list[mine.Triple] = []
    snapshot, prover = Snapshot(), Prover(objects)
    for parent, commit in with_parents(objects, job.commits):
        if parent is None:
            continue
        change = net_change(objects, parent.tree, commit.tree, SETTINGS)
        prover.prove(parent.tree, commit.tree, change)
        triples.append(mine.Triple(len(ends), len(ends) + 1, "commit", change))
        ends += [parent, commit]
        for file in change.files:
            delta = file.delta
            for blob, mode in ((delta.old_blob, delta.old_mode), (delta.new_blob, delta.new_mode)):
                if blob is not None and file.kind == "text":
                    snapshot.blobs.setdefault(blob, FirstSeen(file.path, len(ends), mode))
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), "bench", "0" * 12, {}, dict(job.facts))
        mine._write_commits(work, SETTINGS, 0, [[c] for c in ends[1::2]])
        mine._write_triples(work, ends, triples)
        mine._write_changes(work, ends, triples)
        work.write_batches(BLOBS, "tables/blobs/bench", mine._blobs(work, objects, snapshot))
        return sum(file.bytes for file in work.written)


def with_unit(job: Job) -> int:
    """The unit `mine` over the job's stretch of the mainline, merges passed over."""
    flow.POLICIES["commit"] = non_merge
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), "bench", "0" * 12, {}, dict(job.facts))
        mine.run(work, RECIPE)
        return sum(file.bytes for file in work.written)


def non_merge(states: flow.Flow, start: int) -> Iterator[flow.Endpoint]:
    if start + 1 < len(states.states) and not states.states[start + 1].is_merge:
        yield flow.Endpoint(start + 1, "commit")


def with_pydriller(job: Job) -> int:
    from pydriller import Repository

    names = [c.id for c in job.commits]
    total = 0
    for commit in Repository(str(job.repository), only_commits=names).traverse_commits():
        total += len(commit.msg) + len(commit.author.name or "")
        for file in commit.modified_files:
            total += len(file.old_path or "") + len(file.new_path or "") + len(file.diff)
            total += len(file.source_code or "") + len(file.source_code_before or "")
    return total


_RECORD = re.compile(rb"^(?=[0-9a-f]{40}\n)", re.M)  # no line of a patch begins like this
_RAW = re.compile(rb"^:(\d{6}) (\d{6}) ([0-9a-f]{40}) ([0-9a-f]{40}) ", re.M)
_NO_BLOB = (b"000000", b"160000")  # absent; a submodule


def with_diff_tree(job: Job) -> int:
    options = ["--stdin", "--root", "-r", "-M", "--raw", "-p", "--full-index", "--no-abbrev"]
    total = 0
    with tempfile.TemporaryFile() as names:
        names.write(job.names)
        names.seek(0)
        diff = git(job, "diff-tree", *options, stdin=names)
        cat = git(job, "cat-file", "--batch", stdin=subprocess.PIPE)
        for record in records(piped(diff.stdout)):
            total += len(record)
            head = record[: record.find(b"\n\n")]
            wanted = [
                blob
                for old_mode, new_mode, old, new in _RAW.findall(head)
                for mode, blob in ((old_mode, old), (new_mode, new))
                if mode not in _NO_BLOB
            ]
            total += sum(map(len, contents(cat, wanted)))
        piped(cat.stdin).close()
        for process in (diff, cat):
            piped(process.stdout).close()
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
    return total


def records(stream: IO[bytes]) -> Iterator[bytes]:
    """The output of `diff-tree --stdin`, commit by commit."""
    rest = b""
    while chunk := stream.read(1 << 20):
        *whole, rest = _RECORD.split(rest + chunk)
        yield from filter(None, whole)
    yield rest


def contents(cat: subprocess.Popen[bytes], blobs: list[bytes]) -> Iterator[bytes]:
    """Blobs from `cat-file --batch`, asked for in groups that fit a pipe's buffer."""
    ask, answer = piped(cat.stdin), piped(cat.stdout)
    for at in range(0, len(blobs), 500):
        group = blobs[at : at + 500]
        ask.write(b"\n".join(group) + b"\n")
        ask.flush()
        for _ in group:
            size = int(answer.readline().rsplit(b" ", 1)[1])
            yield answer.read(size + 1)[:-1]


def with_git_log(job: Job) -> int:
    options = ["--no-walk=unsorted", "--stdin", "-p", "-M", "--no-ext-diff", "--no-textconv"]
    process = git(job, "log", *options, "--no-color", stdin=subprocess.PIPE)
    output, _ = process.communicate(job.names)
    return len(output)


def git(job: Job, *arguments: str, stdin: int | IO[bytes]) -> subprocess.Popen[bytes]:
    command = ["git", "-C", str(job.repository), *arguments]
    return subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, env=os.environ | GIT_ENV, bufsize=1 << 16
    )


def piped(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def cpu_seconds() -> float:
    """Spent by this process and by the children that have ended."""
    spent = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        spent += usage.ru_utime + usage.ru_stime
    return spent


def cloned_default() -> Path:
    url, path = DEFAULT
    if not path.exists():
        print(f"cloning {url} to {path}", file=sys.stderr)
        command = ["git", "clone", "--quiet", "--bare", "--single-branch", url, str(path)]
        subprocess.run(command, check=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
