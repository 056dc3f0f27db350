"""Unit `mine`: one repository to its triples and everything needed to rebuild their states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from codeflow.errors import RepositoryError
from codeflow.mine.commits import Commit, parse_commit
from codeflow.mine.fetch import repository
from codeflow.mine.flow import Flow
from codeflow.mine.history import Window, mainline, maturity_window, steps
from codeflow.mine.license import is_license_file, license_of
from codeflow.mine.merkle import parse_tree
from codeflow.mine.objects import TREE, CorruptObject, Objects
from codeflow.mine.snapshot import Snapshot
from codeflow.mine.triple import NetChange, Unprovable, net_change, prove, triple_id
from codeflow.paths import is_test, language_of
from codeflow.recipe import MineSettings, Recipe
from codeflow.tables import BLOBS
from codeflow.work import Counts, Work

_BATCH_BYTES = 32 << 20
_STORED = ("text", "symlink", "lfs")


@dataclass(frozen=True)
class Triple:
    """A proven triple: mainline positions of its ends, why it ends there, and its change."""

    old: int
    new: int
    stop_reason: str
    change: NetChange


def run(work: Work, recipe: Recipe) -> Counts:
    """Mine one repository into repos, commits, triples, changes, blobs and trees.

    Facts in: `kind`, `location`, `name`, and `git_dir`, `head` as the unit `fetch` left them.

    Raises:
        RepositoryError: The history cannot be read at all. Damage in a part of it costs that part.
    """
    settings = recipe.mine
    git = repository(work, recipe)
    objects = Objects(git.objects, settings.max_blob_bytes)

    def read(commit: str) -> Commit:
        return parse_commit(commit, objects.commit(commit))

    try:
        chain = mainline(read, work.facts["head"])
    except (KeyError, ValueError, OSError) as e:
        raise RepositoryError("corrupt", f"cannot read the history of HEAD: {e}") from e
    window = maturity_window(len(chain), settings.window_from, settings.window_to)
    if len(chain) < settings.min_commits:
        reason = f"{len(chain)} mainline commits, mine.min_commits is {settings.min_commits}"
        _write_empty(work, len(chain), window, "too_short", reason)
        return {"skipped_too_short": 1, "mainline_commits": len(chain)}

    brought = steps(read, chain, window)
    triples, dropped = find_triples(objects, chain, window, settings)
    triples, snapshot, damaged = _snapshot(objects, chain, triples)
    dropped["unreadable"] += damaged
    spdx = _license(objects, chain[window.stop - 1].tree) if window.stop > window.start else None

    _write_commits(work, settings, window, brought)
    _write_triples(work, chain, triples, spdx)
    _write_changes(work, chain, triples)
    work.write(
        "trees",
        {
            "repo_id": [work.unit] * len(snapshot.trees),
            "tree": list(snapshot.trees),
            "data": list(snapshot.trees.values()),
        },
    )
    work.write_batches(BLOBS, f"tables/blobs/{work.unit}", _blobs(work, objects, snapshot))
    n_commits = sum(map(len, brought))
    _write_repo(work, len(chain), window, n_commits, len(triples), spdx, "mined", "")
    return {
        "mainline_commits": len(chain),
        "window_commits": n_commits,
        "triples": len(triples),
        **{f"rejected_{reason}": n for reason, n in sorted(dropped.items()) if n},
    }


def find_triples(
    objects: Objects, chain: list[Commit], window: Window, settings: MineSettings
) -> tuple[list[Triple], Counter[str]]:
    """Non-overlapping triples along the window, oldest first, and why candidates were rejected.

    R_old of the next triple is R_new of the one before; where no endpoint is found, the search
    moves on by one commit.
    """
    flow = Flow(objects, [c.tree for c in chain[window.start : window.stop]], settings)
    triples: list[Triple] = []
    rejected: Counter[str] = Counter()
    start = 0
    while start < len(flow.trees) - 1:
        found = _first_proven(objects, flow, start, settings, rejected)
        if found is None:
            start += 1
            continue
        end, stop_reason, change = found
        triples.append(Triple(window.start + start, window.start + end, stop_reason, change))
        start = end
    return triples, rejected


def _first_proven(
    objects: Objects, flow: Flow, start: int, settings: MineSettings, rejected: Counter[str]
) -> tuple[int, str, NetChange] | None:
    try:
        for endpoint in flow.endpoints(start):
            old, new = flow.trees[start], flow.trees[endpoint.index]
            change = net_change(objects, old, new, settings)
            # With renames found, the change can be smaller than the search counted.
            if not settings.min_lines <= change.lines <= settings.max_lines:
                continue
            try:
                prove(objects, old, new, change)
            except Unprovable:
                rejected["unprovable"] += 1
                continue
            return endpoint.index, endpoint.stop_reason, change
    except (KeyError, CorruptObject):  # a missing or damaged object ends this search, not the run
        rejected["unreadable"] += 1
    return None


def _snapshot(
    objects: Objects, chain: list[Commit], triples: list[Triple]
) -> tuple[list[Triple], Snapshot, int]:
    """The states of all triple ends; triples with an unreadable state are left out and counted."""
    snapshot = Snapshot()
    readable = []
    for triple in triples:
        try:
            for position in (triple.old, triple.new):
                snapshot.add(objects, chain[position].tree)
            readable.append(triple)
        except (KeyError, ValueError):
            continue
    return readable, snapshot, len(triples) - len(readable)


def _license(objects: Objects, root: str) -> str | None:
    try:
        for name, mode, entry in parse_tree(objects.tree(root)):
            if mode != TREE and is_license_file(name):
                spdx = license_of(objects.blob(entry))
                if spdx is not None:
                    return spdx
    except (KeyError, ValueError):
        return None
    return None


def _blobs(work: Work, objects: Objects, snapshot: Snapshot) -> Iterator[pa.RecordBatch]:
    """Blob rows in batches bounded by rows and bytes; contents are read as they are written."""
    rows: list[dict[str, Any]] = []
    pending = 0
    for blob, first in snapshot.blobs_in_order():
        try:
            info = objects.blob_info(blob, first.mode)
            stored = info.kind in _STORED and info.size >= 0
            data = objects.blob(blob) if stored and info.kind != "missing" else None
            kind, size = info.kind, info.size
        except (KeyError, CorruptObject):
            kind, size, data = "missing", -1, None
        path = first.path
        rows.append(
            {
                "repo_id": work.unit,
                "blob": blob,
                "path": path,
                "kind": kind,
                "size": size,
                "data": data,
            }
        )
        pending += len(data or b"")
        if len(rows) == BLOBS.row_group_rows or pending >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=BLOBS.schema)
            rows, pending = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=BLOBS.schema)


def _write_commits(
    work: Work, settings: MineSettings, window: Window, brought: list[list[Commit]]
) -> None:
    rows = [
        (window.start + i, commit is step[-1], commit)
        for i, step in enumerate(brought)
        for commit in step
    ]
    work.write(
        "commits",
        {
            "repo_id": [work.unit] * len(rows),
            "commit": [c.id for _, _, c in rows],
            "parents": [list(c.parents) for _, _, c in rows],
            "tree": [c.tree for _, _, c in rows],
            "position": [position for position, _, _ in rows],
            "on_mainline": [mainline for _, mainline, _ in rows],
            "message": [c.message for _, _, c in rows],
            "message_raw": [c.message_raw for _, _, c in rows],
            "author_id": [c.author_id(settings.author_key) for _, _, c in rows],
            "author_time": [c.author_time for _, _, c in rows],
            "author_offset": [c.author_offset for _, _, c in rows],
            "is_merge": [len(c.parents) > 1 for _, _, c in rows],
            "is_bot": [c.is_bot for _, _, c in rows],
            "is_revert": [c.is_revert for _, _, c in rows],
            "pull_requests": [c.pull_requests for _, _, c in rows],
            "closes_issues": [c.closes_issues for _, _, c in rows],
        },
    )


def _write_triples(
    work: Work, chain: list[Commit], triples: list[Triple], spdx: str | None
) -> None:
    changes = [t.change for t in triples]
    work.write(
        "triples",
        {
            "triple_id": [_id(work, chain, t) for t in triples],
            "repo_id": [work.unit] * len(triples),
            "sequence": list(range(len(triples))),
            "old_commit": [chain[t.old].id for t in triples],
            "new_commit": [chain[t.new].id for t in triples],
            "old_tree": [chain[t.old].tree for t in triples],
            "new_tree": [chain[t.new].tree for t in triples],
            "old_position": [t.old for t in triples],
            "new_position": [t.new for t in triples],
            "n_commits": [t.new - t.old for t in triples],
            "stop_reason": [t.stop_reason for t in triples],
            "lines_added": [sum(f.lines_added for f in c.files) for c in changes],
            "lines_deleted": [sum(f.lines_deleted for f in c.files) for c in changes],
            "n_files": [c.n_files for c in changes],
            "license": [spdx] * len(triples),
            "has_tests": [c.has_tests for c in changes],
            "patch_complete": [c.complete for c in changes],
            "patch": [c.patch for c in changes],
        },
    )


def _write_changes(work: Work, chain: list[Commit], triples: list[Triple]) -> None:
    rows = [(_id(work, chain, t), f) for t in triples for f in t.change.files]
    work.write(
        "changes",
        {
            "triple_id": [t for t, _ in rows],
            "path": [f.path for _, f in rows],
            "old_path": [f.delta.old_path if f.delta.status == "R" else None for _, f in rows],
            "status": [f.delta.status for _, f in rows],
            "old_mode": [f.delta.old_mode for _, f in rows],
            "new_mode": [f.delta.new_mode for _, f in rows],
            "old_blob": [f.delta.old_blob for _, f in rows],
            "new_blob": [f.delta.new_blob for _, f in rows],
            "kind": [f.kind for _, f in rows],
            "language": [language_of(f.path) for _, f in rows],
            "is_test": [is_test(f.path) for _, f in rows],
            "in_patch": [bool(f.section) for _, f in rows],
            "lines_added": [f.lines_added for _, f in rows],
            "lines_deleted": [f.lines_deleted for _, f in rows],
        },
    )


def _write_repo(
    work: Work, length: int, window: Window, n_commits: int, n_triples: int,
    spdx: str | None, status: str, reason: str,
) -> None:  # fmt: skip
    work.write(
        "repos",
        {
            "repo_id": [work.unit],
            "name": [work.facts["name"]],
            "source": [work.facts["location"]],
            "head": [work.facts["head"]],
            "mainline_commits": [length],
            "window_from": [window.start],
            "window_to": [window.stop],
            "window_commits": [n_commits],
            "triples": [n_triples],
            "license": [spdx],
            "status": [status],
            "reason": [reason],
        },
    )


def _write_empty(work: Work, length: int, window: Window, status: str, reason: str) -> None:
    _write_repo(work, length, window, 0, 0, None, status, reason)


def _id(work: Work, chain: list[Commit], triple: Triple) -> str:
    return triple_id(work.unit, chain[triple.old].id, chain[triple.new].id)
