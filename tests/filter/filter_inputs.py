"""Input tables of the filter stages for small histories, with ids and patches made by libgit2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pygit2

from codeflow.filter import decide, score
from codeflow.paths import is_test, language_of
from codeflow.recipe import Recipe
from codeflow.tables import TABLES
from codeflow.work import Work

Files = dict[str, bytes]
FINGERPRINT = "0123456789abcdef"
INTENT = "Teach the parser about nested lists"


@dataclass(frozen=True)
class Commit:
    message: str = INTENT
    is_bot: bool = False
    is_revert: bool = False
    is_merge: bool = False


@dataclass(frozen=True)
class Step:
    """One triple: files before and after, and the commits in between."""

    old: Files
    new: Files
    commits: tuple[Commit, ...] = (Commit(),)
    triple: dict[str, Any] = field(default_factory=dict)


def build(root: Path, steps: list[Step], clusters: list[dict[str, Any]] | None = None) -> Work:
    """A work whose inputs hold `steps` as triples t0, t1, … of one repository."""
    repo = pygit2.init_repository(str(root / "repo"), bare=True)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("triples", "changes", "commits", "blobs")
    }
    rows["clusters"] = clusters or []
    stored: dict[str, dict[str, Any]] = {}
    for i, step in enumerate(steps):
        diff = repo.diff(_tree(repo, step.old), _tree(repo, step.new))
        for delta, patch in zip(diff.deltas, diff, strict=True):
            rows["changes"].append(_change(f"t{i}", delta, patch))
        added, deleted = diff.stats.insertions, diff.stats.deletions
        triple = {
            "triple_id": f"t{i}", "sequence": i, "old_position": i, "new_position": i + 1,
            "license": "MIT", "patch_complete": True, "patch": _patch(diff),
            "lines_added": added, "lines_deleted": deleted, "n_files": len(diff),
        }  # fmt: skip
        rows["triples"].append(_filled("triples", triple | step.triple))
        rows["commits"] += [_filled("commits", vars(c) | {"position": i + 1}) for c in step.commits]
        for path, data in (step.old | step.new).items() | step.old.items():
            kind = "lfs" if data.startswith(b"version https://git-lfs") else "text"
            kind = "binary" if b"\0" in data else kind
            blob = {"blob": str(pygit2.hash(data)), "path": path.encode(), "kind": kind}
            stored[blob["blob"]] = blob | {"size": len(data), "data": data}
    rows["blobs"] = [_filled("blobs", stored[key]) for key in sorted(stored)]
    writer = Work(root, "r", FINGERPRINT, {})
    for table, content in rows.items():
        names = TABLES[table].schema.names
        writer.write(table, {name: [row[name] for row in content] for name in names})
    return Work(root, "r", FINGERPRINT, {f.table: [root / f.path] for f in writer.written})


def scored(root: Path, *steps: Step) -> list[dict[str, Any]]:
    """The `scores` rows of some triples."""
    work = build(root, list(steps))
    score.run(work, Recipe())
    return output(work, "scores")


def decided(
    root: Path,
    *steps: Step,
    recipe: Recipe | None = None,
    clusters: list[dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The `decisions` rows and the counts after scoring and deciding."""
    recipe = recipe or Recipe()
    work = build(root, list(steps), clusters)
    score.run(work, recipe)
    inputs = dict(work.inputs) | {"scores": [root / work.written[-1].path]}
    judge = Work(root, "r", FINGERPRINT, inputs)
    counts = decide.run(judge, recipe)
    return output(judge, "decisions"), counts


def output(work: Work, table: str) -> list[dict[str, Any]]:
    paths = [work.root / f.path for f in work.written if f.table == table]
    rows: list[dict[str, Any]] = Work(work.root, "r", "", {table: paths}).read(table).to_pylist()
    return rows


def _tree(repo: pygit2.Repository, files: Files) -> pygit2.Tree:
    index = pygit2.Index()
    for path, data in files.items():
        mode = pygit2.enums.FileMode.BLOB
        index.add(pygit2.IndexEntry(path, repo.create_blob(data), mode))
    return repo[index.write_tree(repo)]


def _patch(diff: pygit2.Diff) -> bytes:
    return b"".join(p.data for p in diff)


def _change(triple_id: str, delta: pygit2.DiffDelta, patch: pygit2.Patch) -> dict[str, Any]:
    path = delta.new_file.raw_path
    _, added, deleted = patch.line_stats
    status = delta.status_char()
    return _filled(
        "changes",
        {
            "triple_id": triple_id, "path": path, "status": status,
            "old_mode": int(delta.old_file.mode), "new_mode": int(delta.new_file.mode),
            "old_blob": None if status == "A" else str(delta.old_file.id),
            "new_blob": None if status == "D" else str(delta.new_file.id),
            "kind": "binary" if delta.is_binary else "text",
            "language": language_of(path), "is_test": is_test(path), "in_patch": True,
            "lines_added": added, "lines_deleted": deleted,
        },
    )  # fmt: skip


def _filled(table: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with every other column set to null, or to an empty value of its type."""
    empty = {
        "string": "",
        "int32": 0,
        "int64": 0,
        "float": 0.0,
        "bool": False,
        "binary": b"",
        "large_binary": b"",
    }
    return {
        c.name: row.get(c.name, None if c.nullable else empty.get(str(c.type), []))
        for c in TABLES[table].columns
    }
