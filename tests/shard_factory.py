"""Writes small shards in the published format, independently of the packer, for tests and demos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

END = 256  # end of text; bytes are their own tokens
VOCABULARY = 257


@dataclass(frozen=True)
class Row:
    """One packed row before it is written; without kinds every document is of kind `test`."""

    ids: list[int]
    doc_lens: list[int]
    loss_runs: list[int]
    kinds: list[str] | None = None
    segments: list[list[tuple[str, int]]] | None = None


def schema(token_dtype: str = "uint16", *, segments: bool = False) -> pa.Schema:
    """The schema of shards; those of before segments were recorded lack that field of `docs`."""
    token = pa.uint16() if token_dtype == "uint16" else pa.uint32()
    text = ("doc_id", "repo", "base_commit", "head_commit", "license", "kind")
    fields = [pa.field(name, pa.string()) for name in text]
    if segments:
        run = pa.struct([pa.field("role", pa.string()), pa.field("n_tokens", pa.int32())])
        fields.append(pa.field("segments", pa.list_(pa.field("item", run, False))))
    document = pa.struct(fields)
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
    """Write `folder/shards` and return `folder`; `manifest_fields` overwrite what is true.

    The `docs` column has a field for segments when some row has any.
    """
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
    (shards / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def _write(
    file: Path, rows: Sequence[Row], first_id: int, rows_per_group: int, token_dtype: str
) -> list[int]:
    columns = schema(token_dtype, segments=any(row.segments for row in rows))
    groups = []
    with pq.ParquetWriter(
        file, columns, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for start in range(0, len(rows), rows_per_group):
            part = rows[start : start + rows_per_group]
            table = pa.table(
                {
                    "row_id": [first_id + start + i for i in range(len(part))],
                    "input_ids": [r.ids for r in part],
                    "doc_lens": [r.doc_lens for r in part],
                    "loss_runs": [r.loss_runs for r in part],
                    "docs": [_docs(r, columns) for r in part],
                    "n_tokens": [len(r.ids) for r in part],
                },
                schema=columns,
            )
            writer.write_table(table, row_group_size=rows_per_group)
            groups.append(len(part))
    return groups


def byte_tokenizer() -> dict[str, object]:
    """The `tokenizer.json` of `text_rows`: every byte is a token, and one control token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    end = {"id": END, "content": "<|endoftext|>", "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def _docs(row: Row, columns: pa.Schema) -> list[dict[str, object]]:
    provenance = dict.fromkeys((f.name for f in columns.field("docs").type.value_type), "test")
    kinds = row.kinds or ["test"] * len(row.doc_lens)
    segments = row.segments or [[] for _ in row.doc_lens]
    return [
        provenance | {"kind": kind} | ({"segments": runs} if "segments" in provenance else {})
        for kind, runs in zip(kinds, segments, strict=True)
    ]


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


def described(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """The rows with random kinds, and segments of random roles for all but some documents."""
    rng = np.random.default_rng(seed)
    result = []
    for row in rows:
        kinds = rng.choice(["snapshot", "transition"], len(row.doc_lens)).tolist()
        segments: list[list[tuple[str, int]]] = []
        for n in row.doc_lens:
            runs = _cut(rng, n, 4) if rng.random() < 0.9 else []
            roles = rng.choice(["context", "message", "patch"], len(runs)).tolist()
            segments.append(list(zip(roles, runs, strict=True)))
        result.append(replace(row, kinds=kinds, segments=segments))
    return result
