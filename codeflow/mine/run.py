"""Unit `mine`: a slice of a repository to its triples and all that rebuilds their states."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from codeflow.mine.commits import Commit, parse_commit, parse_parents
from codeflow.mine.fetch import repository
from codeflow.mine.flow import Flow, State
from codeflow.mine.history import Window, read_mainline, steps
from codeflow.mine.objects import UNREAD, CorruptObject, Objects
from codeflow.mine.refs import GitDir, tags
from codeflow.mine.snapshot import Snapshot
from codeflow.mine.survey import time_progress
from codeflow.mine.triple import NetChange, Prover, Unprovable, net_change, triple_id
from codeflow.paths import is_test, language_of
from codeflow.recipe import MineSettings, Recipe
from codeflow.tables import BLOBS
from codeflow.work import Counts, Work

_BATCH_BYTES = 8 << 20
_STORED = ("text", "symlink", "lfs")


@dataclass(frozen=True)
class Triple:
    """A proven triple: mainline positions of its ends, why it ends there, and its change."""

    old: int
    new: int
    stop_reason: str
    change: NetChange


def run(work: Work, recipe: Recipe) -> Counts:
    """Mine one slice into commits, triples, changes, blobs and trees.

    Facts in: those of the source, of `fetch` and of `survey`; `repo_id` and `slice`, its first
    position and the one after its last.

    Raises:
        RepositoryError: The history cannot be read at all. Damage in a part of it costs that part.
    """
    settings, facts = recipe.mine, work.facts
    git = repository(work, recipe)
    objects = Objects(git.objects, settings.max_blob_bytes)
    chain = read_mainline(objects, facts["head"])
    window = Window(*facts["slice"])

    def read(commit: str) -> Commit:
        return parse_commit(commit, objects.commit(commit))

    # A slice's first state is the last one of the slice before, which has its commit.
    first = window.start + (window.start > facts["window_start"])
    brought = steps(
        read, chain, Window(first, window.stop), lambda c: parse_parents(objects.commit(c))
    )
    tagged = _tagged(git, objects) if settings.policy == "release" else set()
    released = {i for i, step in enumerate(brought, first) if any(c.id in tagged for c in step)}
    known = {step[-1].id: step[-1] for step in brought}
    mainline = [chain[i].id for i in range(window.start, window.stop)]
    states = [
        _state(known.get(c) or read(c), i in released) for i, c in enumerate(mainline, window.start)
    ]
    triples, dropped = find_triples(objects, Flow(objects, states, settings), window.start)
    triples, snapshot, damaged = _snapshot(objects, chain, triples)
    dropped["unreadable"] += damaged

    _write_commits(work, settings, first, brought)
    _write_triples(work, chain, triples)
    _write_changes(work, chain, triples)
    work.write(
        "trees",
        {
            "repo_id": [facts["repo_id"]] * len(snapshot.trees),
            "tree": list(snapshot.trees),
            "data": list(snapshot.trees.values()),
        },
    )
    work.write_batches(BLOBS, f"tables/blobs/{work.unit}", _blobs(work, objects, snapshot))
    return {
        "window_commits": sum(map(len, brought)),
        "triples": len(triples),
        **{f"ends_{t}": n for t, n in sorted(Counter(t.stop_reason for t in triples).items())},
        **{f"rejected_{reason}": n for reason, n in sorted(dropped.items()) if n},
    }


def find_triples(objects: Objects, flow: Flow, offset: int) -> tuple[list[Triple], Counter[str]]:
    """Non-overlapping triples along a flow, oldest first, and why candidates were rejected.

    R_old of the next triple is R_new of the one before; where no endpoint is found, the search
    moves on by one commit.

    Args:
        offset: Mainline position of the flow's first state.
    """
    triples: list[Triple] = []
    rejected: Counter[str] = Counter()
    prover = Prover(objects)
    start = 0
    while start < len(flow.states) - 1:
        found = _first_proven(objects, prover, flow, start, rejected)
        if found is None:
            start += 1
            continue
        end, stop_reason, change = found
        triples.append(Triple(offset + start, offset + end, stop_reason, change))
        start = end
    return triples, rejected


def _first_proven(
    objects: Objects, prover: Prover, flow: Flow, start: int, rejected: Counter[str]
) -> tuple[int, str, NetChange] | None:
    settings = flow.settings
    # With renames found, a change can be smaller than the band's search counted.
    least, most = 1, sys.maxsize
    if settings.policy == "band":
        least, most = settings.min_lines, settings.max_lines
    try:
        for endpoint in flow.endpoints(start):
            old, new = flow.states[start].tree, flow.states[endpoint.index].tree
            change = net_change(objects, old, new, settings)
            if not least <= change.lines <= most:
                continue
            try:
                prover.prove(old, new, change)
            except Unprovable:
                rejected["unprovable"] += 1
                continue
            return endpoint.index, endpoint.stop_reason, change
    except (KeyError, CorruptObject):  # a missing or damaged object ends this search, not the run
        rejected["unreadable"] += 1
    return None


def _state(commit: Commit, is_tagged: bool) -> State:
    return State(commit.tree, len(commit.parents) > 1, bool(commit.pull_requests), is_tagged)


def _tagged(git: GitDir, objects: Objects) -> set[str]:
    """Commits that a tag points at, annotated tags followed to their commit."""
    found = set()
    for target in tags(git).values():
        try:
            found.add(objects.peeled(target))
        except (KeyError, CorruptObject):
            continue
    return found


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


def _blobs(work: Work, objects: Objects, snapshot: Snapshot) -> Iterator[pa.RecordBatch]:
    """Blob rows in batches bounded by rows and bytes; contents are read as they are written."""
    repo_id, pending = work.facts["repo_id"], 0
    rows: list[tuple[str, str, bytes, str, int, bytes | None]] = []

    def batch() -> pa.RecordBatch:
        columns = zip(*rows, strict=True)
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, BLOBS.schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=BLOBS.schema)

    for blob, first in snapshot.blobs_in_order():
        try:
            info = objects.blob_info(blob, first.mode)
            kind, size = info.kind, info.size
            data = None if kind in UNREAD else objects.blob(blob)  # also vouches for the kind
            data = data if kind in _STORED else None
        except (KeyError, CorruptObject):
            kind, size, data = "missing", -1, None
        rows.append((repo_id, blob, first.path, kind, size, data))
        pending += len(data or b"")
        if len(rows) == BLOBS.row_group_rows or pending >= _BATCH_BYTES:
            yield batch()
            rows, pending = [], 0
    if rows:
        yield batch()


def _write_commits(
    work: Work, settings: MineSettings, first: int, brought: list[list[Commit]]
) -> None:
    rows = [
        (first + i, commit is step[-1], commit) for i, step in enumerate(brought) for commit in step
    ]
    work.write(
        "commits",
        {
            "repo_id": [work.facts["repo_id"]] * len(rows),
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
            "trailers": [c.trailers for _, _, c in rows],
            "pull_requests": [c.pull_requests for _, _, c in rows],
            "closes_issues": [c.closes_issues for _, _, c in rows],
        },
    )


def _write_triples(work: Work, chain: list[Commit], triples: list[Triple]) -> None:
    ids = [_id(work, chain, t) for t in triples]
    times = [time_progress(chain[t.new].author_time, chain) for t in triples]
    changes = [t.change for t in triples]
    work.write(
        "triples",
        {
            "triple_id": ids,
            "repo_id": [work.facts["repo_id"]] * len(triples),
            "flow": _flows(ids, triples),
            "sequence": [t.old for t in triples],
            "old_commit": [chain[t.old].id for t in triples],
            "new_commit": [chain[t.new].id for t in triples],
            "old_tree": [chain[t.old].tree for t in triples],
            "new_tree": [chain[t.new].tree for t in triples],
            "old_position": [t.old for t in triples],
            "new_position": [t.new for t in triples],
            "commit_percentile": [t.new / (len(chain) - 1) for t in triples],
            "time_percentile": times,
            "n_commits": [t.new - t.old for t in triples],
            "stop_reason": [t.stop_reason for t in triples],
            "lines_added": [sum(f.lines_added for f in c.files) for c in changes],
            "lines_deleted": [sum(f.lines_deleted for f in c.files) for c in changes],
            "n_files": [c.n_files for c in changes],
            "license": [work.facts["license"]] * len(triples),
            "permissive": [work.facts["permissive"]] * len(triples),
            "has_tests": [c.has_tests for c in changes],
            "patch_complete": [c.complete for c in changes],
            "patch": [c.patch for c in changes],
        },
    )


def _flows(ids: list[str], triples: list[Triple]) -> list[str]:
    """The first triple of the contiguous chain that each triple is in."""
    flows: list[str] = []
    for i, triple in enumerate(triples):
        goes_on = i > 0 and triples[i - 1].new == triple.old
        flows.append(flows[-1] if goes_on else ids[i])
    return flows


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


def _id(work: Work, chain: list[Commit], triple: Triple) -> str:
    return triple_id(work.facts["repo_id"], chain[triple.old].id, chain[triple.new].id)
