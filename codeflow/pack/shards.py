"""Documents to a `shards/` folder: rows, Parquet files, and the manifest that vouches for them.

Where documents come from is their caller's matter (`run.py`: mined ones, `messages.py`:
conversations); what a shard looks like is decided here alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from codeflow import __version__
from codeflow.dataset import DataFile
from codeflow.pack.bestfit import best_fit_decreasing
from codeflow.recipe import PackSettings
from codeflow.storage import write_atomically
from codeflow.tables import DOC, Table, shard_table
from codeflow.tokenizer import Tokenizer
from codeflow.work import Counts, Work

SHARD_FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of numbers end to end: list i is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        values: Of all lists.
        offsets: int64, one more than there are lists.
    """

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> Lists:
        """The lists of a column, chunk by chunk: Arrow's own list offsets end at 2^31 values."""
        lengths = [c.value_lengths().to_numpy(zero_copy_only=False) for c in column.chunks]
        values = [c.flatten().to_numpy(zero_copy_only=False) for c in column.chunks]
        return cls.of_parts(values, lengths)

    @classmethod
    def of_parts(
        cls, values: Sequence[npt.NDArray[Any]], lengths: Sequence[npt.NDArray[Any]]
    ) -> Lists:
        """The lists whose values and lengths lie in these arrays."""
        every = np.concatenate([[0], *lengths]).astype(np.int64)
        return cls(np.concatenate(values) if values else np.empty(0, np.int64), np.cumsum(every))

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, indices: Sequence[int]) -> Lists:
        """These lists, in this order."""
        parts = [self[i] for i in indices]
        return Lists.of_parts(parts, [np.array([len(p) for p in parts], np.int64)])


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents as flat arrays; entry i of each attribute belongs to document i.

    Attributes:
        ids: Token ids.
        loss_runs: Run lengths: not trained, trained, not trained, …; they add up to the length.
        roles: Role of each segment in reading order, as an index into `role_names`.
        role_tokens: Tokens of each segment; they add up to the length. A document may have none.
        role_names: The roles there are.
        origin: Where it comes from: the fields of `tables.DOC` but for its segments.
        reading_order: Inside a row, documents are laid in ascending order of this.
    """

    ids: Lists
    loss_runs: Lists
    roles: Lists
    role_tokens: Lists
    role_names: Sequence[str]
    origin: pa.Table
    reading_order: npt.NDArray[np.int64]


def write_shards(
    work: Work,
    documents: Documents,
    settings: PackSettings,
    tokenizer_json: bytes,
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
) -> Counts:
    """Pack documents and write `shards/`: Parquet rows, tokenizer.json, and manifest.json last.

    Args:
        work: Takes the files, under names with its fingerprint.
        documents: None longer than a row.
        settings: Sizes of rows, row groups and files.
        tokenizer_json: What the ids belong to; copied beside the shards.
        tokenizer: The same, read.
        about: Entries of the manifest that say what the data is: `recipe`, `recipe_hash`, ….

    Returns:
        `documents_packed`, `tokens`, `rows`, `capacity` (tokens), `shards`.
    """
    lengths = documents.ids.lengths()
    rows = _rows(documents, settings.length)
    wide = tokenizer.vocab_size > 1 << 16
    table = shard_table(pa.uint32() if wide else pa.uint16(), _rows_of_group(settings))
    shards = []
    for number, part in enumerate(_shards(len(rows), settings)):
        file = work.write_batches(
            table, f"shards/shard-{number:05d}", _batches(documents, rows, part, table)
        )
        tokens = sum(int(lengths[row].sum()) for row in rows[part.start : part.stop])
        shards.append(_shard_entry(part, tokens, file, table.row_group_rows))
    total = int(lengths.sum())
    fill = total / (len(rows) * settings.length) if rows else 0.0
    manifest = {
        "format": "codeflow-shards",
        "format_version": SHARD_FORMAT_VERSION,
        "codeflow_version": __version__,
        **about,
        "length": settings.length,
        "token_dtype": "uint32" if wide else "uint16",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": tokenizer.sha256,
            "special_tokens": tokenizer.control_ids(),
        },
        "documents": len(lengths),
        "tokens": total,
        "rows": len(rows),
        "fill": round(fill, 6),
        "licenses": _histogram(documents.origin["license"]),
        "repos": _histogram(documents.origin["repo"]),
        "shards": shards,
    }
    write_atomically(work.root / "shards/tokenizer.json", tokenizer_json)
    write_atomically(
        work.root / "shards/manifest.json", json.dumps(manifest, indent=1).encode() + b"\n"
    )
    return {
        "documents_packed": len(lengths),
        "tokens": total,
        "rows": len(rows),
        "capacity": len(rows) * settings.length,
        "shards": len(shards),
    }


def joined_runs(parts: Sequence[Sequence[int]]) -> list[int]:
    """Run lengths of a row from those of its documents: each starts with a run not trained."""
    result = [0]
    for runs in parts:
        for index, length in enumerate(runs):
            if length and (len(result) - 1) % 2 != index % 2:
                result.append(0)
            if length:
                result[-1] += length
    return result


def _rows(documents: Documents, length: int) -> list[list[int]]:
    """Which documents go into each row, in reading order."""
    rows = best_fit_decreasing(documents.ids.lengths().tolist(), length)
    place = documents.reading_order.tolist()
    rows = [sorted(row, key=place.__getitem__) for row in rows]
    names = documents.origin["doc_id"]
    # Best fit leaves rows sorted by length; readers that do not shuffle should not notice.
    rows.sort(key=lambda row: hashlib.blake2b(names[row[0]].as_py().encode()).digest())
    return rows


def _rows_of_group(settings: PackSettings) -> int:
    return max(1, settings.group_tokens // settings.length)


def _shards(rows: int, settings: PackSettings) -> Iterator[range]:
    """Row ranges of the shard files: whole row groups, about `shard_tokens` each."""
    group_rows = _rows_of_group(settings)
    per_shard = max(1, settings.shard_tokens // settings.length)
    per_shard = max(group_rows, per_shard // group_rows * group_rows)
    for start in range(0, rows, per_shard):
        yield range(start, min(start + per_shard, rows))


def _batches(
    documents: Documents, rows: list[list[int]], part: range, table: Table
) -> Iterator[pa.RecordBatch]:
    """One record batch a row group, so that a shard is never in memory whole."""
    for start in range(part.start, part.stop, table.row_group_rows):
        stop = min(start + table.row_group_rows, part.stop)
        yield _batch(documents, rows[start:stop], start, table.schema)


def _batch(
    documents: Documents, rows: list[list[int]], first_row: int, schema: pa.Schema
) -> pa.RecordBatch:
    members = [i for row in rows for i in row]
    ids = documents.ids.take(members)
    ends = np.cumsum([0, *map(len, rows)])  # of each row, counted in documents
    tokens = np.diff(ids.offsets[ends])
    runs = [joined_runs([documents.loss_runs[i].tolist() for i in row]) for row in rows]
    columns = {
        "row_id": range(first_row, first_row + len(rows)),
        "input_ids": _list_array(
            ids.offsets[ends], pa.array(ids.values), schema.field("input_ids").type
        ),
        "doc_lens": _list_array(ends, pa.array(ids.lengths()), schema.field("doc_lens").type),
        "loss_runs": runs,
        "docs": _list_array(ends, _docs(documents, members), schema.field("docs").type),
        "n_tokens": tokens,
    }
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, schema.field(name).type)
        for name, c in columns.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _docs(documents: Documents, members: list[int]) -> pa.StructArray:
    """`tables.DOC` of these documents."""
    origin = documents.origin.take(pa.array(members, pa.int64())).combine_chunks()
    roles, lengths = documents.roles.take(members), documents.role_tokens.take(members)
    segments_type = DOC.field("segments").type
    names = pa.array(documents.role_names, pa.string()).take(pa.array(roles.values, pa.int64()))
    segments = pa.StructArray.from_arrays(
        [names, pa.array(lengths.values, pa.int32())], fields=list(segments_type.value_type)
    )
    found = {"segments": _list_array(roles.offsets, segments, segments_type)}
    return pa.StructArray.from_arrays(
        [
            found[f.name] if f.name in found else pa.concat_arrays(origin[f.name].chunks)
            for f in DOC
        ],
        fields=list(DOC),
    )


def _list_array(
    offsets: npt.NDArray[np.int64], values: pa.Array, list_type: pa.ListType
) -> pa.ListArray:
    """A list array of this type, its values cast where they are numbers of another width."""
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values.cast(list_type.value_type), type=list_type
    )


def _shard_entry(part: range, tokens: int, file: DataFile, group_rows: int) -> dict[str, Any]:
    groups = [min(group_rows, part.stop - at) for at in range(part.start, part.stop, group_rows)]
    return {
        "file": Path(file.path).name,
        "rows": len(part),
        "tokens": tokens,
        "bytes": file.bytes,
        "sha256": file.sha256,
        "row_groups": groups,
    }


def _histogram(column: pa.ChunkedArray) -> dict[str, int]:
    counts = {c["values"]: c["counts"] for c in pc.value_counts(column).to_pylist()}
    return dict(sorted(counts.items()))
