"""Hand-made triples, and the dedup units run on them as the pipeline would."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from codeflow.dedup import cluster, sign
from codeflow.recipe import Recipe
from codeflow.tables import TABLES
from codeflow.work import Work, parquet_options

Change = tuple[bytes, str | None, str | None]


@dataclass(frozen=True)
class Triple:
    """What dedup looks at. By default all keys differ from those of every other id."""

    id: str
    patch: bytes = b""
    repo: str = "r"
    changes: tuple[Change, ...] = ()
    old_commit: str = ""
    new_commit: str = ""
    license: str | None = None
    time: int = 0

    @property
    def commits(self) -> tuple[str, str]:
        return self.old_commit or git_id(self.id, "old"), self.new_commit or git_id(self.id, "new")

    @property
    def files(self) -> tuple[Change, ...]:
        return self.changes or ((b"f.py", git_id(self.id, "before"), git_id(self.id, "after")),)


def git_id(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def patch(
    deleted: Sequence[str] = (),
    added: Sequence[str] = (),
    *,
    path: str = "f.py",
    at: int = 1,
    context: str = "same",
) -> bytes:
    """One file's git patch with one hunk."""
    head = [
        f"diff --git a/{path} b/{path}",
        f"index {git_id(at, 'a')[:7]}..{git_id(at, 'b')[:7]} 100644",
        f"--- a/{path}",
        f"+++ b/{path}",
        f"@@ -{at},{len(deleted) + 1} +{at},{len(added) + 1} @@ def {context}",
        f" {context}",
    ]
    body = [f"-{line}" for line in deleted] + [f"+{line}" for line in added]
    return "\n".join([*head, *body, ""]).encode()


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(n)]


def lines_of(tokens: Sequence[str], per_line: int = 8) -> list[str]:
    return [" ".join(tokens[i : i + per_line]) for i in range(0, len(tokens), per_line)]


def families(rng: random.Random, n: int, rates: Sequence[float]) -> list[Triple]:
    """n unrelated changes, each followed by a copy per rate with that share of words replaced."""
    triples = []
    for base in range(n):
        tokens = words(rng, rng.choice([30, 60, 150, 400]))
        for k, rate in enumerate((0.0, *rates)):
            edited = [words(rng, 1)[0] if rng.random() < rate else token for token in tokens]
            if rate or not k:
                name = hashlib.sha256(f"{base} {k}".encode()).hexdigest()[:16]
                triples.append(Triple(name, patch(added=lines_of(edited))))
    return triples


def write_table(root: Path, table: str, unit: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows as the miner would store them; columns that dedup ignores get a value of their type."""
    schema = TABLES[table].schema
    rows = list(rows)
    columns = {}
    for f in schema:
        filler = None if f.nullable else _FILLERS.get(str(f.type).split("<")[0])
        columns[f.name] = [row.get(f.name, filler) for row in rows]
    path = root / "in" / f"{table}.{unit}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = parquet_options(TABLES[table])
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=64, **options)
    return path


_FILLERS: dict[str, Any] = {
    "string": "",
    "int8": 0,
    "float": 0.0,
    "int32": 0,
    "int64": 0,
    "bool": False,
    "binary": b"",
    "large_binary": b"",
    "list": [],
}


def mined(root: Path, unit: str, triples: Sequence[Triple]) -> dict[str, list[Path]]:
    """The tables that mining would leave behind for one unit."""
    triple_rows = [
        {
            "triple_id": t.id,
            "repo_id": t.repo,
            "old_commit": t.commits[0],
            "new_commit": t.commits[1],
            "license": t.license,
            "patch": t.patch,
        }
        for t in triples
    ]
    change_rows = [
        {"triple_id": t.id, "path": path, "old_blob": old, "new_blob": new}
        for t in triples
        for path, old, new in t.files
    ]
    commit_rows = [{"commit": t.commits[1], "author_time": t.time} for t in triples]
    return {
        "triples": [write_table(root, "triples", unit, triple_rows)],
        "changes": [write_table(root, "changes", unit, change_rows)],
        "commits": [write_table(root, "commits", unit, commit_rows)],
    }


def signed(root: Path, unit: str, triples: Sequence[Triple], recipe: Recipe) -> Work:
    """The finished sign unit of one repository."""
    work = Work(root, unit, "0" * 24, mined(root, unit, triples))
    work.facts["counts"] = sign.run(work, recipe)
    return work


def written(work: Work, table: str) -> Path:
    (path,) = [work.root / f.path for f in work.written if f.table == table]
    return path


def rows(work: Work, table: str) -> list[dict[str, Any]]:
    return pq.read_table(written(work, table)).to_pylist()


@dataclass(frozen=True)
class Result:
    counts: dict[str, int]
    edges: list[dict[str, Any]]
    clusters: list[dict[str, Any]]
    sha256: tuple[str, ...]

    @property
    def dropped(self) -> set[str]:
        return {row["triple_id"] for row in self.clusters if not row["keep"]}

    @property
    def kinds(self) -> dict[tuple[str, str], str]:
        return {(e["other_id"], e["triple_id"]): e["kind"] for e in self.edges}


def clustered(root: Path, inputs: dict[str, list[Path]], recipe: Recipe) -> Result:
    work = Work(root, "all", "1" * 24, inputs)
    counts = cluster.run(work, recipe)
    return Result(
        counts, rows(work, "edges"), rows(work, "clusters"), tuple(f.sha256 for f in work.written)
    )


def dedup(root: Path, triples: Sequence[Triple], **settings: Any) -> Result:
    """Both units, with one sign unit per repository, in the order the repositories first appear."""
    recipe = Recipe()
    recipe = dataclasses.replace(recipe, dedup=dataclasses.replace(recipe.dedup, **settings))
    inputs: dict[str, list[Path]] = {"triples": [], "signatures": [], "bands": []}
    for repo in dict.fromkeys(t.repo for t in triples):
        work = signed(root, repo, [t for t in triples if t.repo == repo], recipe)
        inputs["triples"] += work.inputs["triples"]
        inputs["signatures"].append(written(work, "signatures"))
        inputs["bands"].append(written(work, "bands"))
    return clustered(root, inputs, recipe)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """For hypothesis tests, which must not share `tmp_path` between examples."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
