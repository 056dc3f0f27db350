"""Mainline, maturity window, and the commits that belong to each mainline step.

The mainline is the first-parent chain of the pinned head: each of its steps is one finished piece
of work, a merge being the whole branch. Dates are never used for order: they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codeflow.mine.commits import Commit

ReadCommit = Callable[[str], Commit]


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


def maturity_window(length: int, start: float, stop: float) -> Window:
    """The part of a mainline of `length` commits between two fractions, by commit count."""
    return Window(int(length * start), max(int(length * stop), int(length * start)))


def steps(read: ReadCommit, chain: list[Commit], window: Window) -> list[list[Commit]]:
    """For each mainline position of the window, the commits it brought in, oldest first.

    The mainline commit is the last of its step; before it stand the commits of the branches it
    merged, parents before children. Commits reachable from the position before the window are in
    no step.
    """
    seen: set[str] = set()
    if window.start > 0:
        _reachable(read, chain[window.start - 1], seen)
    result = []
    for position in range(window.start, window.stop):
        commit = chain[position]
        seen.add(commit.id)
        brought = []
        for parent in commit.parents[1:]:
            brought += _branch(read, parent, seen)
        result.append([*brought, commit])
    return result


def _reachable(read: ReadCommit, start: Commit, seen: set[str]) -> None:
    stack = [start]
    seen.add(start.id)
    while stack:
        for parent in stack.pop().parents:
            if parent not in seen:
                seen.add(parent)
                try:
                    stack.append(read(parent))
                except (KeyError, ValueError):
                    continue  # cut-off or damaged ancestors are older than anything mined


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
