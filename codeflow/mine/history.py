"""Mainline, maturity window, and the commits that belong to each mainline step.

The mainline is the first-parent chain of the pinned head: each of its steps is one finished piece
of work, a merge being the whole branch. Dates are never used for order: they lie.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codeflow.errors import RepositoryError
from codeflow.mine.commits import Commit, parse_commit
from codeflow.mine.objects import Objects

ReadCommit = Callable[[str], Commit]
ReadParents = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Window:
    """Mainline positions [start, stop) of the maturity window; 0 is the root commit."""

    start: int
    stop: int


def mainline(read: ReadCommit, head: str) -> list[Commit]:
    """First-parent chain of `head`, oldest first.

    A chain that ends at a missing object (a clone cut off by hand) starts at its oldest commit.
    """
    chain = [read(head)]
    while chain[-1].parents:
        try:
            chain.append(read(chain[-1].parents[0]))
        except KeyError:
            break
    chain.reverse()
    return chain


def read_mainline(objects: Objects, head: str) -> list[Commit]:
    """The mainline without its messages, oldest first: a million commits fit into memory.

    Raises:
        RepositoryError: `corrupt`.
    """
    try:
        return mainline(lambda c: parse_commit(c, objects.commit(c), message=False), head)
    except KeyError as e:
        raise RepositoryError(
            "corrupt",
            f"cannot read the history of HEAD: commit {e.args[0]} is missing, or may not be read: "
            "`git fsck` in the repository says which",
        ) from e
    except (ValueError, OSError) as e:
        raise RepositoryError("corrupt", f"cannot read the history of HEAD: {e}") from e


def maturity_window(
    length: int, start: float, stop: float, progress: Sequence[float] | None = None
) -> Window:
    """The part of a mainline of `length` commits between two fractions of its life.

    Args:
        length: Commits of the mainline.
        start: First fraction, 0-1.
        stop: Last fraction, 0-1.
        progress: Share of its life each commit stands at, where life is not counted in commits.
            It need not be monotone: a commit is past a fraction when any before it was.
    """
    if progress is None:
        return Window(int(length * start), max(int(length * stop), int(length * start)))
    passed = list(itertools.accumulate(progress, max))
    first, last = bisect.bisect_left(passed, start), bisect.bisect_right(passed, stop)
    return Window(first, max(first, last))


def slices(window: Window, size: int) -> list[Window]:
    """Cut a window into pieces of at most `size` steps that share their end states.

    A slice holds the positions of both its ends, and no triple reaches past them, so slices can be
    mined in any order and place. None when the window has fewer than two states.
    """
    last = window.stop - 1
    starts = range(window.start, last, size)
    return [Window(a, min(a + size, last) + 1) for a in starts]


def steps(
    read: ReadCommit,
    chain: list[Commit],
    window: Window,
    parents: ReadParents | None = None,
) -> list[list[Commit]]:
    """For each mainline position of the window, the commits it brought in, oldest first.

    `parents`, where given, is a cheaper way to walk the older history than `read`.

    The mainline commit is the last of its step; before it stand the commits of the branches it
    merged, parents before children. Commits reachable from the position before the window are in
    no step.
    """
    seen: set[str] = set()
    if window.start > 0:
        _reachable(parents or (lambda c: read(c).parents), chain[window.start - 1].id, seen)
    result = []
    for position in range(window.start, window.stop):
        commit = read(chain[position].id)  # the chain may be without messages
        seen.add(commit.id)
        brought = []
        for parent in commit.parents[1:]:
            brought += _branch(read, parent, seen)
        result.append([*brought, commit])
    return result


def _reachable(parents: ReadParents, start: str, seen: set[str]) -> None:
    stack = [start]
    seen.add(start)
    while stack:
        try:
            found = parents(stack.pop())
        except (KeyError, ValueError):
            continue  # cut-off or damaged ancestors are older than anything mined
        fresh = [p for p in found if p not in seen]
        seen.update(fresh)
        stack += fresh


def _branch(read: ReadCommit, tip: str, seen: set[str]) -> list[Commit]:
    """Unseen ancestors of `tip` and itself, parents before children, without recursion."""
    order: list[Commit] = []
    stack: list[tuple[str, Commit | None]] = [(tip, None)]
    while stack:
        name, done = stack.pop()
        if done is not None:
            order.append(done)
            continue
        if name in seen:
            continue
        seen.add(name)
        try:
            commit = read(name)
        except (KeyError, ValueError):
            continue
        stack.append((name, commit))
        stack += [(p, None) for p in reversed(commit.parents) if p not in seen]
    return order
