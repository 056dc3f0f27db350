"""Unit `survey`: what of a repository is worth mining, and in which slices.

Writes its row of `repos` and leaves, for the units `mine`, the slices of the maturity window and
what a slice cannot know by itself: where the window starts and the licence at its end.
"""

from __future__ import annotations

from typing import Any

from codeflow.mine.commits import Commit
from codeflow.mine.fetch import repository
from codeflow.mine.history import Window, maturity_window, read_mainline, slices
from codeflow.mine.license import license_of_tree
from codeflow.mine.objects import EMPTY_TREE, CorruptObject, Objects
from codeflow.recipe import MineSettings, Recipe
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Survey one repository.

    Facts in: those of the source and of `fetch`; `leader` from `families`.
    Facts out: `slices` (first position and the one after the last, each), `window_start`,
    `license` and whether it is `permissive`.

    Raises:
        RepositoryError: `corrupt`: the mainline cannot be read.
    """
    settings, facts = recipe.mine, work.facts
    leader = facts["leader"]
    length = facts["mainline_commits"]
    facts |= {"slices": [], "window_start": 0, "license": None, "permissive": False}
    if leader != work.unit:
        _write(work, Window(0, 0), "fork", f"shares its root commit with {leader}, which is mined")
        return {"skipped_fork": 1, "mainline_commits": length}
    if length < settings.min_commits:
        reason = f"{length} mainline commits, mine.min_commits is {settings.min_commits}"
        _write(work, Window(0, 0), "too_short", reason)
        return {"skipped_too_short": 1, "mainline_commits": length}
    git = repository(work, recipe)
    objects = Objects(git.objects, settings.max_blob_bytes)
    chain = read_mainline(objects, facts["head"])
    window = _window(objects, chain, settings)
    facts["window_start"] = window.start
    facts["slices"] = [[s.start, s.stop] for s in slices(window, settings.slice_commits)]
    if window.stop > window.start:
        found = license_of_tree(objects, chain[window.stop - 1].tree)
        facts |= {"license": found.spdx, "permissive": found.permissive}
    _write(work, window, "mined", "")
    return {"mined": 1, "mainline_commits": length}


def _window(objects: Objects, chain: list[Commit], settings: MineSettings) -> Window:
    if settings.lifecycle == "commits":
        progress = None
    elif settings.lifecycle == "time":
        progress = [time_progress(c.author_time, chain) for c in chain]
    else:
        progress = _churn_progress(objects, chain)
    return maturity_window(len(chain), settings.window_from, settings.window_to, progress)


def time_progress(time: int, chain: list[Commit]) -> float:
    """Place of a time between the mainline's first and last author date, 0-1; dates may lie."""
    first, last = chain[0].author_time, chain[-1].author_time
    return min(1.0, max(0.0, (time - first) / (last - first))) if last > first else 0.0


def _churn_progress(objects: Objects, chain: list[Commit]) -> list[float]:
    """Share of all changed lines up to each commit; steps that cannot be read count nothing."""
    total, sums = 0, []
    old = EMPTY_TREE
    for commit in chain:
        try:
            for delta in objects.deltas(old, commit.tree) if old != commit.tree else ():
                sides = ((delta.old_blob, delta.old_mode), (delta.new_blob, delta.new_mode))
                kinds = {objects.blob_info(b, m).kind for b, m in sides if b is not None}
                if kinds <= {"text"}:
                    total += objects.changed_lines(delta.old_blob, delta.new_blob)
        except (KeyError, CorruptObject):
            pass
        sums.append(total)
        old = commit.tree
    return [s / total if total else 0.0 for s in sums]


def _write(work: Work, window: Window, status: str, reason: str) -> None:
    facts: dict[str, Any] = work.facts
    work.write(
        "repos",
        {
            "repo_id": [work.unit],
            "name": [facts["name"]],
            "source": [facts["location"]],
            "head": [facts["head"]],
            "mainline_commits": [facts["mainline_commits"]],
            "window_from": [window.start],
            "window_to": [window.stop],
            "root": [facts["root"]],
            "leader": [facts["leader"]],
            "license": [facts["license"]],
            "permissive": [facts["permissive"]],
            "status": [status],
            "reason": [reason],
        },
    )
