"""Mining speed: codeflow against PyDriller and `git log -p`, same commits, one run.

Work per commit, for codeflow and PyDriller: metadata, changed files with renames, unified diff,
and the bytes of every changed text file before and after. `git log -p` yields patch text only: it
is the floor, not a peer. CPU time (user + system, children included), median of interleaved runs,
because wall time on a shared machine says little.

    python bench/mining.py path/to/flask.git [more repositories]

Commits: the non-merge first-parent commits of the 40-80 % window.
Claims: at least 8x PyDriller, at least 0.65x `git log -p`, on flask.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from codeflow.mine.commits import Commit, parse_commit
from codeflow.mine.fetch import clone
from codeflow.mine.history import mainline, maturity_window
from codeflow.mine.objects import EMPTY_TREE, Objects
from codeflow.mine.refs import find_git_dir, pinned_head
from codeflow.mine.triple import net_change
from codeflow.recipe import MineSettings

SETTINGS = MineSettings()
DEFAULT = ("https://github.com/pallets/flask", Path("build/bench/flask.git"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("repositories", nargs="*", type=Path, help="default: a clone of flask")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    options = parser.parse_args()
    repositories = options.repositories or [cloned_default()]
    ok = True
    print(
        f"{'repository':<16} {'commits':>7}  {'side':<14} {'CPU s':>8} {'commits/s':>10}   ours is"
    )
    for repository in repositories:
        ok &= compare(repository, options.runs)
    return 0 if ok else 1


def compare(repository: Path, runs: int) -> bool:
    commits = window_commits(repository)
    sides: dict[str, Callable[[], int]] = {
        "codeflow": lambda: with_codeflow(repository, commits),
        "pydriller": lambda: with_pydriller(repository, commits),
        "git log -p": lambda: with_git_log(repository, commits),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):  # the first is a warm-up: page cache, imports
        for name, side in sides.items():
            before = cpu_seconds()
            side()
            if run:
                seconds[name].append(cpu_seconds() - before)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    for name, value in median.items():
        ratio = value / median["codeflow"]
        print(
            f"{repository.name[:16]:<16} {len(commits):>7}  {name:<14} {value:>8.3f} "
            f"{len(commits) / value:>10.0f}   {ratio:.2f}x as fast"
        )
    over_pydriller = median["pydriller"] / median["codeflow"]
    over_git = median["git log -p"] / median["codeflow"]
    print(f"  claim >= 8x PyDriller: {over_pydriller:.1f}x; >= 0.65x git log -p: {over_git:.2f}x")
    return over_pydriller >= 8 and over_git >= 0.65


def window_commits(repository: Path) -> list[Commit]:
    git = find_git_dir(repository)
    objects = Objects(git.objects, SETTINGS.max_blob_bytes)
    chain = mainline(lambda c: parse_commit(c, objects.commit(c)), pinned_head(git))
    window = maturity_window(len(chain), SETTINGS.window_from, SETTINGS.window_to)
    return [c for c in chain[window.start : window.stop] if len(c.parents) < 2]


def with_codeflow(repository: Path, commits: list[Commit]) -> int:
    objects = Objects(find_git_dir(repository).objects, SETTINGS.max_blob_bytes)
    total = 0
    for known in commits:
        commit = parse_commit(known.id, objects.commit(known.id))
        old = EMPTY_TREE
        if commit.parents:
            old = parse_commit(commit.parents[0], objects.commit(commit.parents[0])).tree
        if old == commit.tree:
            continue
        for file in net_change(objects, old, commit.tree, SETTINGS).files:
            total += len(file.section)
            if file.kind == "text":
                for blob in (file.delta.old_blob, file.delta.new_blob):
                    total += len(objects.blob(blob)) if blob else 0
    return total


def with_pydriller(repository: Path, commits: list[Commit]) -> int:
    from pydriller import Repository

    total = 0
    for commit in Repository(
        str(repository), only_commits=[c.id for c in commits]
    ).traverse_commits():
        total += len(commit.msg) + len(commit.author.name or "")
        for file in commit.modified_files:
            total += len(file.old_path or "") + len(file.new_path or "") + len(file.diff)
            total += len(file.source_code or "") + len(file.source_code_before or "")
    return total


def with_git_log(repository: Path, commits: list[Commit]) -> int:
    command = ["git", "-C", str(repository), "log", "--no-walk=unsorted", "--stdin", "-p", "-M"]
    names = "\n".join(c.id for c in commits).encode()
    done = subprocess.run(
        [*command, "--no-color", "--no-ext-diff", "--no-textconv"],
        input=names,
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
    )
    return len(done.stdout)


def cpu_seconds() -> float:
    spent = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        spent += usage.ru_utime + usage.ru_stime
    return spent


def cloned_default() -> Path:
    url, path = DEFAULT
    if not path.exists():
        print(f"cloning {url} to {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        clone(url, path, protocols="https", seconds=1800)
    return path


if __name__ == "__main__":
    sys.exit(main())
