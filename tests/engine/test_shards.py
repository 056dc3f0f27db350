"""Shards as a reader finds them: checked, whole, in order, and what the manifest says."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_builds import recipe

from codeflow.dataset import Dataset
from codeflow.errors import CodeflowError, DatasetError
from codeflow.pack.run import run as pack
from codeflow.pack.vocabulary import train
from codeflow.tables import TABLES, shard_table
from codeflow.tokenizer import Tokenizer
from codeflow.work import Work, read_files


@pytest.fixture(scope="module")
def manifest(built: Path) -> dict[str, Any]:
    return dict(json.loads((built / "shards/manifest.json").read_text()))


@pytest.fixture(scope="module")
def rows(built: Path) -> list[dict[str, Any]]:
    return list(Dataset.open(built).read("shards").to_pylist())


def test_the_manifest_agrees_with_the_files(
    built: Path, manifest: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    shards = built / "shards"
    assert {p.name for p in shards.iterdir()} == {
        "manifest.json", "tokenizer.json", *(s["file"] for s in manifest["shards"]),
    }  # fmt: skip
    for entry in manifest["shards"]:
        data = (shards / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        metadata = pq.read_metadata(shards / entry["file"])
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert (entry["row_groups"], entry["rows"]) == (groups, metadata.num_rows)
    tokenizer = (shards / "tokenizer.json").read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert manifest["vocab_size"] == 1024
    assert manifest["recipe_hash"] == recipe().hash
    assert manifest["rows"] == len(rows) == sum(s["rows"] for s in manifest["shards"])
    tokens = sum(r["n_tokens"] for r in rows)
    assert manifest["tokens"] == tokens == sum(s["tokens"] for s in manifest["shards"])
    assert manifest["fill"] == pytest.approx(tokens / (len(rows) * 4096), abs=1e-6)
    assert manifest["documents"] == sum(len(r["docs"]) for r in rows)
    assert sum(manifest["repos"].values()) == sum(manifest["licenses"].values())
    assert sum(manifest["repos"].values()) == manifest["documents"]


def test_sums_agree_in_every_row(rows: list[dict[str, Any]]) -> None:
    assert [r["row_id"] for r in rows] == list(range(len(rows)))
    for row in rows:
        assert 0 < row["n_tokens"] == len(row["input_ids"]) <= 4096
        assert sum(row["doc_lens"]) == sum(row["loss_runs"]) == row["n_tokens"]
        assert len(row["docs"]) == len(row["doc_lens"])


def test_rows_hold_every_document_once_and_whole(built: Path, rows: list[dict[str, Any]]) -> None:
    dataset = Dataset.open(built)
    documents = {d["doc_id"]: d for d in dataset.read("documents").to_pylist()}
    tokenizer = Tokenizer.from_file(built / "shards/tokenizer.json")
    openers = {"repo": "<|repo_name|>", "context": "<|file_sep|>",
               "intent": "<|commit_msg|>", "patch": "<|commit_after|>"}  # fmt: skip
    seen = []
    for row in rows:
        at = 0
        for doc, length in zip(row["docs"], row["doc_lens"], strict=True):
            ids = row["input_ids"][at : at + length]
            at += length
            document = documents[doc["doc_id"]]
            text = "".join(openers[s["role"]] + s["text"] for s in document["segments"])
            assert tokenizer.decode(ids) == text + "<|endoftext|>"
            assert ids[-1] == tokenizer.control_id("<|endoftext|>")
            assert len(ids) == document["n_tokens"]
            assert doc["head_commit"] == document["head_commit"]
            seen.append(doc["doc_id"])
    assert sorted(seen) == sorted(documents)


def test_segments_say_which_tokens_have_which_role(built: Path, rows: list[dict[str, Any]]) -> None:
    documents = {d["doc_id"]: d for d in Dataset.open(built).read("documents").to_pylist()}
    tokenizer = Tokenizer.from_file(built / "shards/tokenizer.json")
    opener = {tokenizer.control_id("<|commit_msg|>"): "intent",
              tokenizer.control_id("<|commit_after|>"): "patch"}  # fmt: skip
    for row in rows:
        at = 0
        for doc, length in zip(row["docs"], row["doc_lens"], strict=True):
            stored = [(s["role"], s["n_tokens"]) for s in documents[doc["doc_id"]]["segments"]]
            found = [(s["role"], s["n_tokens"]) for s in doc["segments"]]
            assert found == [*stored[:-1], (stored[-1][0], stored[-1][1] + 1)]
            assert sum(n for _, n in found) == length
            for role, n in found:
                assert opener.get(row["input_ids"][at], role) == role
                at += n


def test_documents_of_a_repository_are_together_and_in_order(
    built: Path, rows: list[dict[str, Any]]
) -> None:
    documents = {d["doc_id"]: d for d in Dataset.open(built).read("documents").to_pylist()}
    places = [[documents[d["doc_id"]] for d in row["docs"]] for row in rows]
    for row in places:
        for a, b in pairwise((d["repo_id"], d["sequence"]) for d in row):
            assert a < b
    assert any(len(row) > 1 for row in places)


def test_rows_are_not_sorted_by_length(rows: list[dict[str, Any]]) -> None:
    lengths = [len(r["docs"]) for r in rows]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


def test_layout_is_what_readers_count_on(built: Path, manifest: dict[str, Any]) -> None:
    file = pq.ParquetFile(built / "shards" / manifest["shards"][0]["file"])
    assert file.schema_arrow.equals(shard_table(pa.uint16(), 1).schema)
    column = file.metadata.row_group(0).column(file.schema_arrow.names.index("input_ids"))
    assert column.path_in_schema == "input_ids.list.element"
    assert column.compression == "ZSTD"
    assert not {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & set(column.encodings)


def test_a_flipped_byte_in_any_page_is_found(
    built: Path, manifest: dict[str, Any], tmp_path: Path
) -> None:
    whole = (built / "shards" / manifest["shards"][0]["file"]).read_bytes()
    metadata = pq.read_metadata(built / "shards" / manifest["shards"][0]["file"])
    path = tmp_path / "shard.parquet"
    for index in range(metadata.num_columns):
        column = metadata.row_group(0).column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        data = bytearray(whole)
        data[start + column.total_compressed_size - 1] ^= 4  # last byte of the last page
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=r"shard\.parquet cannot be read"):
            read_files([path], "shards")


# -- packing tables made by hand ------------------------------------------------------------------


def packed(
    root: Path,
    documents: list[list[int]],
    vocabulary: bytes,
    *overrides: str,
    segments: dict[int, list[tuple[str, int]]] | None = None,
) -> dict[str, Any]:
    """Pack documents given as token ids; each is `doc-N` of one repository."""
    source = Work(root, "in", "0" * 24, {})
    source.write_file("tokenizer", "tables/tokenizer/all", ".json", vocabulary)
    none: dict[str, Any] = {
        f.name: [] if pa.types.is_list(f.type) else "" if pa.types.is_string(f.type) else 0
        for f in TABLES["documents"].schema
    }
    empty = {pa.string(): "", pa.bool_(): False}
    repo = {f.name: empty.get(f.type, 0) for f in TABLES["repos"].schema}
    numbered = [f"doc-{n:06d}" for n in range(len(documents))]
    nothing = {"path": "", "text": "", "train": False}
    meta = [
        none
        | {"doc_id": d, "repo_id": "r", "sequence": n}
        | {"segments": [nothing | {"role": role, "n_tokens": tokens}
                        for role, tokens in (segments or {}).get(n, [])]}
        for n, d in enumerate(numbered)
    ]  # fmt: skip
    tokens = [
        {"doc_id": d, "input_ids": ids, "loss_runs": [0, len(ids)]}
        for d, ids in zip(numbered, documents, strict=True)
    ]
    for table, found in (
        ("repos", [repo | {"repo_id": "r", "name": "a/b"}]), ("documents", meta), ("tokens", tokens)
    ):  # fmt: skip
        source.write(table, pa.Table.from_pylist(found, schema=TABLES[table].schema))
    inputs: dict[str, list[Path]] = {}
    for file in source.written:
        inputs.setdefault(file.table, []).append(root / file.path)
    work = Work(root, "all", "1" * 24, inputs)
    pack(work, recipe(*overrides))
    manifest: dict[str, Any] = json.loads((root / "shards/manifest.json").read_text())
    manifest["table"] = read_files([root / f.path for f in work.written], "shards")
    return manifest


def vocabulary(last_id: int) -> bytes:
    """A small vocabulary whose last token has a given id."""
    content = json.loads(train(iter(["a b c"]), 512))
    far = content["added_tokens"][0] | {"content": "<|far|>", "id": last_id}
    size = len(content["model"]["vocab"])
    for n in range(size, last_id):
        content["model"]["vocab"][f"filler-{n}"] = n
    content["added_tokens"].append(far)
    return json.dumps(content).encode()


@pytest.mark.parametrize(("last_id", "width"), [(65535, "uint16"), (65536, "uint32")])
def test_tokens_take_two_bytes_up_to_65536_ids(tmp_path: Path, last_id: int, width: str) -> None:
    manifest = packed(tmp_path, [[1, last_id]], vocabulary(last_id), "pack.length=128")
    assert (manifest["token_dtype"], manifest["vocab_size"]) == (width, last_id + 1)
    column = manifest["table"]["input_ids"]
    assert column.type.value_type == getattr(pa, width)()
    assert column.to_pylist() == [[1, last_id]]


def test_inside_a_row_documents_keep_the_order_of_history(tmp_path: Path) -> None:
    documents = [[20 + n] * length for n, length in enumerate([5, 60, 1, 40, 20])]
    manifest = packed(tmp_path, documents, vocabulary(600), "pack.length=128")
    (row,) = manifest["table"].to_pylist()
    assert row["doc_lens"] == [5, 60, 1, 40, 20]
    assert row["input_ids"] == [i for ids in documents for i in ids]
    assert [d["doc_id"] for d in row["docs"]] == [f"doc-{n:06d}" for n in range(5)]


def test_segments_stay_with_their_documents_and_may_be_absent(tmp_path: Path) -> None:
    documents = [[20 + n] * length for n, length in enumerate([100, 30, 60, 40, 20])]
    segments = {0: [("repo", 9), ("patch", 90)], 2: [("context", 59)], 4: [("a", 0), ("patch", 19)]}
    manifest = packed(
        tmp_path, documents, vocabulary(600), "pack.length=128", "pack.group_tokens=1024",
        segments=segments,
    )  # fmt: skip
    found = {d["doc_id"]: d["segments"] for r in manifest["table"].to_pylist() for d in r["docs"]}
    assert {k: [(s["role"], s["n_tokens"]) for s in v] for k, v in found.items()} == {
        "doc-000000": [("repo", 9), ("patch", 91)],
        "doc-000001": [],
        "doc-000002": [("context", 60)],
        "doc-000003": [],
        "doc-000004": [("a", 0), ("patch", 20)],
    }


def test_no_documents_make_a_manifest_of_no_rows(tmp_path: Path) -> None:
    work = Work(tmp_path, "in", "0" * 24, {})
    work.write_file("tokenizer", "tables/tokenizer/all", ".json", vocabulary(600))
    inputs = {"tokenizer": [tmp_path / work.written[0].path]}
    counts = pack(Work(tmp_path, "all", "1" * 24, inputs), recipe())
    assert (counts["documents_packed"], counts["rows"], counts["shards"]) == (0, 0, 0)
    assert json.loads((tmp_path / "shards/manifest.json").read_text())["rows"] == 0


def test_shards_are_cut_at_whole_row_groups(tmp_path: Path) -> None:
    documents = [[n % 500] * 100 for n in range(100)]
    manifest = packed(
        tmp_path, documents, vocabulary(600), "pack.length=128", "pack.group_tokens=1024",
        "pack.shard_tokens=4000",
    )  # fmt: skip
    assert [s["row_groups"] for s in manifest["shards"]] == [[8, 8, 8]] * 4 + [[4]]
    assert [s["file"].split(".")[0] for s in manifest["shards"]] == [
        f"shard-{n:05d}" for n in range(5)
    ]
    assert manifest["table"]["row_id"].to_pylist() == list(range(100))


def test_a_document_longer_than_a_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((CodeflowError, ValueError), match="length 129, rows hold 1 to 128"):
        packed(tmp_path, [[1] * 129], vocabulary(600), "pack.length=128")
