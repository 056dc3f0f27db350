"""Endpoint search: where along the mainline does one triple end and the next begin?

A policy is a function that yields possible ends of a triple, best first. The default, `band`, walks
forward until the net change is in the size band: `min_lines`-`max_lines` changed lines in at most
`max_files` files and `max_commits` steps. An endpoint whose own commit touches code and tests is
taken at once; otherwise the first one in the band, when the band or the steps are used up. Measured
on seven repositories, this is the one rule whose patch sizes do not depend on the repository (88-93
% yield).

The search reads trees and counts lines; it builds no patches. Net changes are kept up
incrementally: per path the content at the start and now, so one more step costs its own deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from codeflow.mine.objects import Delta, Objects
from codeflow.paths import is_code, is_test
from codeflow.recipe import MineSettings

CODE_AND_TESTS = "code_and_tests"
FIRST_IN_BAND = "first_in_band"

Content = tuple[str | None, int]  # blob id and mode; (None, 0) = absent


@dataclass(frozen=True)
class Endpoint:
    """A place to end a triple: index of the end state, and why there."""

    index: int
    stop_reason: str


@dataclass(frozen=True)
class State:
    """One mainline state.

    Attributes:
        tree: Its root tree.
        is_merge: Its commit merges a branch.
        names_pull_request: Its message names a pull request.
        is_tagged: A tag points at its commit, or at one of a branch that it merges.
    """

    tree: str
    is_merge: bool = False
    names_pull_request: bool = False
    is_tagged: bool = False


class Flow:
    """The sequence of states of a slice of the window, oldest first."""

    def __init__(self, objects: Objects, states: list[State], settings: MineSettings) -> None:
        self.states = states
        self.settings = settings
        self._objects = objects
        self._deltas: dict[int, list[Delta]] = {}
        self._lines: dict[tuple[str | None, str | None], int] = {}

    def endpoints(self, start: int) -> Iterator[Endpoint]:
        """Possible ends of a triple that starts at state `start`, by the recipe's policy.

        The caller takes the first that proves usable; asking for more walks further.
        """
        return POLICIES[self.settings.policy](self, start)

    def within_reach(self, start: int) -> range:
        """The states a triple from `start` may end at."""
        return range(start + 1, min(start + self.settings.max_commits, len(self.states) - 1) + 1)

    def step(self, index: int) -> list[Delta]:
        """Deltas between state `index - 1` and `index`; the last few dozen are kept."""
        if index not in self._deltas:
            stale = [i for i in self._deltas if i < index - 2 * self.settings.max_commits]
            for i in stale:
                del self._deltas[i]
            old, new = self.states[index - 1].tree, self.states[index].tree
            self._deltas[index] = list(self._objects.deltas(old, new)) if old != new else []
        return self._deltas[index]

    def changed_lines(self, old: Content, new: Content) -> int:
        """Lines that differ; 0 where a side is no text, because such files have no lines."""
        key = (old[0], new[0])
        if key not in self._lines:
            infos = [self._objects.blob_info(b, m) for b, m in (old, new) if b is not None]
            text = all(i.kind in ("text", "symlink", "lfs") for i in infos)
            self._lines[key] = self._objects.changed_lines(*key) if text else 0
        return self._lines[key]


def band(flow: Flow, start: int) -> Iterator[Endpoint]:
    """Ends inside the size band; those that touch code and tests first."""
    s = flow.settings
    origin: dict[bytes, Content] = {}
    current: dict[bytes, Content] = {}
    lines: dict[bytes, int] = {}
    others: list[Endpoint] = []
    for index in flow.within_reach(start):
        step = flow.step(index)
        touched = set()
        for delta in step:
            path = delta.new_path or delta.old_path
            # A type change is two deltas of one path: a deletion, then an addition.
            origin.setdefault(path, (delta.old_blob, delta.old_mode))
            current[path] = (delta.new_blob, delta.new_mode)
            touched.add(path)
        for path in touched:
            if origin[path] == current[path]:
                lines.pop(path, None)
            else:
                lines[path] = flow.changed_lines(origin[path], current[path])
        total = sum(lines.values())
        if total > s.max_lines or len(lines) > s.max_files:
            break
        if total < s.min_lines:
            continue
        if s.prefer_tests and not _touches_code_and_tests(step):
            others.append(Endpoint(index, FIRST_IN_BAND))
        else:
            yield Endpoint(index, CODE_AND_TESTS if s.prefer_tests else FIRST_IN_BAND)
    yield from others


def commit(flow: Flow, start: int) -> Iterator[Endpoint]:
    """Every mainline step is a triple."""
    if start + 1 < len(flow.states):
        yield Endpoint(start + 1, "commit")


def count(flow: Flow, start: int) -> Iterator[Endpoint]:
    """Every `max_commits` steps."""
    if start + flow.settings.max_commits < len(flow.states):
        yield Endpoint(start + flow.settings.max_commits, "count")


def release(flow: Flow, start: int) -> Iterator[Endpoint]:
    """From tag to tag, however far apart; a triple starts at a tag only."""
    if flow.states[start].is_tagged:
        for index in range(start + 1, len(flow.states)):
            if flow.states[index].is_tagged:
                yield Endpoint(index, "release")
                return


def pull_request(flow: Flow, start: int) -> Iterator[Endpoint]:
    """The next step that is a merge or names a pull request."""
    for index in flow.within_reach(start):
        state = flow.states[index]
        if state.is_merge or state.names_pull_request:
            yield Endpoint(index, "merge" if state.is_merge else "pull_request")
            return


Policy = Callable[[Flow, int], Iterator[Endpoint]]
POLICIES: dict[str, Policy] = {
    "band": band,
    "commit": commit,
    "count": count,
    "release": release,
    "pull_request": pull_request,
}


def _touches_code_and_tests(step: list[Delta]) -> bool:
    paths = [d.new_path or d.old_path for d in step]
    return any(is_test(p) for p in paths) and any(is_code(p) and not is_test(p) for p in paths)
