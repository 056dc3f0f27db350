"""Writes small shards in the published format, independently of the packer, for tests and demos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

END = 256  # end of text; bytes are their own tokens
VOCABULARY = 257


@dataclass(frozen=True)
class Row:
    """One packed row before it is written."""

    ids: list[int]
    doc_lens: list[int]
    loss_runs: list[int]


def schema(token_dtype: str = "uint16") -> pa.Schema:
    token = pa.uint16() if token_dtype == "uint16" else pa.uint32()
    text = ("doc_id", "repo", "base_commit", "head_commit", "license", "kind")
    document = pa.struct([pa.field(name, pa.string()) for name in text])
    return pa.schema(
        [
            pa.field("row_id", pa.int64(), nullable=False),
            pa.field("input_ids", pa.list_(pa.field("item", token, False)), nullable=False),
            pa.field("doc_lens", pa.list_(pa.field("item", pa.int32(), False)), nullable=False),
            pa.field("loss_runs", pa.list_(pa.field("item", pa.int32(), False)), nullable=False),
            pa.field("docs", pa.list_(document), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
        ]
    )


def write_shards(
    folder: Path,
    rows: Sequence[Row],
    *,
    length: int,
    rows_per_group: int = 4,
    groups_per_shard: int = 3,
    token_dtype: str = "uint16",
    vocab_size: int = VOCABULARY,
    manifest_fields: Mapping[str, object] | None = None,
) -> Path:
    """Write `folder/shards` and return `folder`; `manifest_fields` overwrite what is true."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    entries = []
    per_shard = rows_per_group * groups_per_shard
    for number, start in enumerate(range(0, len(rows), per_shard)):
        part = rows[start : start + per_shard]
        file = shards / f"shard-{number:05d}.0badcafe.parquet"
        groups = _write(file, part, start, rows_per_group, token_dtype)
        entries.append(
            {
                "file": file.name,
                "rows": len(part),
                "tokens": sum(len(r.ids) for r in part),
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "row_groups": groups,
            }
        )
    tokens = sum(len(r.ids) for r in rows)
    manifest = {
        "format": "codeflow-shards",
        "format_version": 1,
        "length": length,
        "token_dtype": token_dtype,
        "vocab_size": vocab_size,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": "0" * 64,
            "special_tokens": {"<|endoftext|>": END},
        },
        "documents": sum(len(r.doc_lens) for r in rows),
        "tokens": tokens,
        "rows": len(rows),
        "fill": tokens / (length * max(1, len(rows))),
        "recipe_hash": "test",
        "codeflow_version": "test",
        "shards": entries,
        **(manifest_fields or {}),
    }
    (shards / "manifest.json").write_text(json.dumps(manifest))
    (shards / "tokenizer.json").write_text("{}")
    return folder


def _write(
    file: Path, rows: Sequence[Row], first_id: int, rows_per_group: int, token_dtype: str
) -> list[int]:
    columns = schema(token_dtype)
    groups = []
    with pq.ParquetWriter(
        file, columns, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for start in range(0, len(rows), rows_per_group):
            part = rows[start : start + rows_per_group]
            provenance = dict.fromkeys(columns.field("docs").type.value_type.names, "test")
            table = pa.table(
                {
                    "row_id": [first_id + start + i for i in range(len(part))],
                    "input_ids": [r.ids for r in part],
                    "doc_lens": [r.doc_lens for r in part],
                    "loss_runs": [r.loss_runs for r in part],
                    "docs": [[provenance] * len(r.doc_lens) for r in part],
                    "n_tokens": [len(r.ids) for r in part],
                },
                schema=columns,
            )
            writer.write_table(table, row_group_size=rows_per_group)
            groups.append(len(part))
    return groups


def random_rows(count: int, length: int, seed: int = 0, vocab_size: int = VOCABULARY) -> list[Row]:
    """Rows of random tokens, documents and loss runs, some of them not full."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = int(rng.integers(max(1, length // 2), length + 1))
        rows.append(
            Row(
                ids=rng.integers(0, vocab_size, n).tolist(),
                doc_lens=_cut(rng, n, 5),
                loss_runs=[0, *_cut(rng, n, 6)] if rng.random() < 0.5 else _cut(rng, n, 6),
            )
        )
    return rows


def _cut(rng: np.random.Generator, n: int, most: int) -> list[int]:
    cuts = np.unique(rng.integers(1, n, int(rng.integers(0, most)))) if n > 1 else []
    return [int(x) for x in np.diff([0, *cuts, n])]


def text_rows(texts: Iterator[str], length: int, count: int) -> list[Row]:
    """Pack texts, as bytes and an end token, greedily into `count` rows; long texts are cut."""
    rows: list[Row] = []
    ids: list[int] = []
    doc_lens: list[int] = []
    for text in texts:
        document = [*text.encode()[: length - 1], END]
        if len(ids) + len(document) > length:
            rows.append(Row(ids, doc_lens, [0, len(ids)]))
            ids, doc_lens = [], []
            if len(rows) == count:
                return rows
        ids, doc_lens = ids + document, [*doc_lens, len(document)]
    raise ValueError(f"only {len(rows)} of {count} rows could be filled")


def stdlib_texts() -> Iterator[str]:
    """The functions and classes of the Python standard library, in a fixed order."""
    for file in sorted(Path(json.__file__).parents[1].glob("*.py")):
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield from (part for part in source.split("\n\n\n") if len(part) > 40)
