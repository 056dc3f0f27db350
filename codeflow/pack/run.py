"""Unit `pack`: documents into rows, rows into shards, and the manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codeflow import __version__
from codeflow.dataset import DataFile
from codeflow.pack.bestfit import best_fit_decreasing
from codeflow.recipe import PackSettings, Recipe
from codeflow.storage import write_atomically
from codeflow.tables import Table, shard_table
from codeflow.tokenizer import Tokenizer
from codeflow.work import Counts, Work

SHARD_FORMAT_VERSION = 1


def run(work: Work, recipe: Recipe) -> Counts:
    """Write `shards/`: Parquet rows, tokenizer.json, manifest.json."""
    settings = recipe.pack
    tokenizer_path = work.inputs["tokenizer"][0]
    tokenizer = Tokenizer.from_file(tokenizer_path)
    documents = _Documents(work)
    rows = best_fit_decreasing(documents.lengths, settings.length)
    rows = [sorted(row, key=documents.order) for row in rows]
    # Best fit leaves rows sorted by length; readers that do not shuffle should not notice.
    rows.sort(key=lambda row: hashlib.blake2b(documents.info[row[0]]["doc_id"].encode()).digest())

    wide = tokenizer.vocab_size > 1 << 16
    group_rows = max(1, settings.group_tokens // settings.length)
    table = shard_table(pa.uint32() if wide else pa.uint16(), group_rows)
    shards = []
    for number, part in enumerate(_shards(len(rows), settings)):
        batches = _batches(documents, rows, part, table)
        file = work.write_batches(table, f"shards/shard-{number:05d}", batches)
        shards.append(_shard_entry(documents, rows, part, file, group_rows))
    tokens = sum(documents.lengths)
    fill = tokens / (len(rows) * settings.length) if rows else 0.0
    manifest = {
        "format": "codeflow-shards",
        "format_version": SHARD_FORMAT_VERSION,
        "codeflow_version": __version__,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "length": settings.length,
        "token_dtype": "uint32" if wide else "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": tokenizer.sha256,
            "special_tokens": tokenizer.control_ids(),
        },
        "documents": len(documents.lengths),
        "tokens": tokens,
        "rows": len(rows),
        "fill": round(fill, 6),
        "licenses": _histogram(documents, "license"),
        "repos": _histogram(documents, "repo"),
        "shards": shards,
    }
    write_atomically(work.root / "shards/tokenizer.json", tokenizer_path.read_bytes())
    write_atomically(
        work.root / "shards/manifest.json", json.dumps(manifest, indent=1).encode() + b"\n"
    )
    return {
        "documents_packed": len(documents.lengths),
        "tokens": tokens,
        "rows": len(rows),
        "capacity": len(rows) * settings.length,
        "shards": len(shards),
    }


class _Documents:
    """All documents as flat arrays: ids and loss runs end to end, and who they are."""

    def __init__(self, work: Work) -> None:
        repos = work.read("repos", ["repo_id", "name"]).to_pylist()
        names = {r["repo_id"]: r["name"] for r in repos}
        columns = ["doc_id", "repo_id", "sequence", "base_commit", "head_commit", "license", "kind"]
        meta = {d["doc_id"]: d for d in work.read("documents", columns).to_pylist()}
        tokens = work.read("tokens")
        self.ids, self._id_offsets = _flat(tokens["input_ids"])
        self._runs, self._run_offsets = _flat(tokens["loss_runs"])
        self.lengths: list[int] = np.diff(self._id_offsets).tolist()
        self._sequence = []
        self.info: list[dict[str, str]] = []
        for doc_id in tokens["doc_id"].to_pylist():
            d = meta[doc_id]
            self._sequence.append((d["repo_id"], d["sequence"], doc_id))
            self.info.append(
                {
                    "doc_id": doc_id,
                    "repo": names[d["repo_id"]],
                    "base_commit": d["base_commit"],
                    "head_commit": d["head_commit"],
                    "license": d["license"],
                    "kind": d["kind"],
                }
            )

    def order(self, index: int) -> tuple[str, int, str]:
        """Reading order inside a row: a repository's documents together, in its own order."""
        return self._sequence[index]

    def token_ids(self, index: int) -> np.ndarray[Any, Any]:
        return self.ids[self._id_offsets[index] : self._id_offsets[index + 1]]

    def loss_runs(self, index: int) -> list[int]:
        runs = self._runs[self._run_offsets[index] : self._run_offsets[index + 1]]
        return [int(r) for r in runs]


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All values of a list column end to end, and 64-bit offsets of its lists.

    Chunk by chunk, because Arrow's own list offsets end at 2^31 values.
    """
    empty = np.empty(0, dtype=np.int64)
    lengths = [c.value_lengths().to_numpy(zero_copy_only=False) for c in column.chunks]
    values = [c.flatten().to_numpy(zero_copy_only=False) for c in column.chunks]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([empty, *lengths]))]).astype(np.int64)
    return np.concatenate(values) if values else empty, offsets


def _shards(rows: int, settings: PackSettings) -> Iterator[range]:
    """Row ranges of the shard files: whole row groups, about `shard_tokens` each."""
    per_shard = max(1, settings.shard_tokens // settings.length)
    group_rows = max(1, settings.group_tokens // settings.length)
    per_shard = max(group_rows, per_shard // group_rows * group_rows)
    for start in range(0, rows, per_shard):
        yield range(start, min(start + per_shard, rows))


def _batches(
    documents: _Documents, rows: list[list[int]], part: range, table: Table
) -> Iterator[pa.RecordBatch]:
    """One record batch a row group, so that a shard is never in memory whole."""
    for start in range(part.start, part.stop, table.row_group_rows):
        group = range(start, min(start + table.row_group_rows, part.stop))
        columns: dict[str, list[Any]] = {
            "row_id": list(group),
            "input_ids": [np.concatenate([documents.token_ids(i) for i in rows[r]]) for r in group],
            "doc_lens": [[documents.lengths[i] for i in rows[r]] for r in group],
            "loss_runs": [_joined([documents.loss_runs(i) for i in rows[r]]) for r in group],
            "docs": [[documents.info[i] for i in rows[r]] for r in group],
            "n_tokens": [sum(documents.lengths[i] for i in rows[r]) for r in group],
        }
        arrays = [pa.array(columns[f.name], type=f.type) for f in table.schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def _joined(parts: list[list[int]]) -> list[int]:
    """Run lengths of a row from those of its documents: each starts with a run not trained."""
    result = [0]
    for runs in parts:
        for index, length in enumerate(runs):
            if length and (len(result) - 1) % 2 != index % 2:
                result.append(0)
            if length:
                result[-1] += length
    return result


def _shard_entry(
    documents: _Documents, rows: list[list[int]], part: range, file: DataFile, group_rows: int
) -> dict[str, Any]:
    groups = [min(group_rows, part.stop - at) for at in range(part.start, part.stop, group_rows)]
    return {
        "file": Path(file.path).name,
        "rows": len(part),
        "tokens": sum(documents.lengths[i] for r in part for i in rows[r]),
        "bytes": file.bytes,
        "sha256": file.sha256,
        "row_groups": groups,
    }


def _histogram(documents: _Documents, key: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for info in documents.info:
        counts[info[key]] = counts.get(info[key], 0) + 1
    return dict(sorted(counts.items()))
