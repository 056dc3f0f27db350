"""The sign unit: every triple gets its keys, large enough ones a sketch and bands."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from pathlib import Path

import dedup_triples as make
import numpy as np
import pyarrow.parquet as pq
import pytest

from codeflow.dedup import cfmh1, keys, sign
from codeflow.errors import DatasetError
from codeflow.recipe import Recipe
from codeflow.tables import TABLES
from codeflow.work import Work

RECIPE = Recipe()


def change_of(n_shingles: int) -> bytes:
    """A one-line change with so many distinct shingles; the sign is a token too."""
    return make.patch(added=[" ".join(f"t{i}" for i in range(n_shingles + 3))])


def test_rows_say_what_the_patch_says(tmp_path: Path) -> None:
    triples = [
        make.Triple("b", change_of(30), license="GPL-3.0-only", time=-7),
        make.Triple("a", change_of(12), license="MIT", time=1_700_000_000),
        make.Triple("c", b"", changes=((b"x\xff", None, "1" * 40), (b"y", "2" * 40, None))),
    ]
    work = make.signed(tmp_path, "r", triples, RECIPE)
    rows = make.rows(work, "signatures")
    assert [row["triple_id"] for row in rows] == ["b", "a", "c"]
    assert [row["repo_id"] for row in rows] == ["r"] * 3
    assert [row["n_shingles"] for row in rows] == [30, 12, 0]
    assert [row["license_rank"] for row in rows] == [2, 0, 1]
    assert [row["time"] for row in rows] == [-7, 1_700_000_000, 0]
    for triple, row in zip(triples, rows, strict=True):
        changes = [keys.BlobChange(*change) for change in triple.files]
        lines = keys.changed_lines(triple.patch)
        assert row["delta_key"] == keys.delta_key(changes)
        assert row["blob_key"] == keys.blob_key(changes)
        assert row["change_key"] == keys.change_key(lines, row["delta_key"])
    assert work.facts["counts"] == {"triples": 3, "sketched": 2, "band_rows": 72}


def test_sketch_and_bands_are_those_of_the_changed_lines(tmp_path: Path) -> None:
    triples = make.families(random.Random(1), 30, [0.05])  # more than one batch of input
    assert len(triples) < 64 < len(triples + triples[:10])
    triples += [dataclasses.replace(t, id=f"x{t.id}") for t in triples[:10]]
    work = make.signed(tmp_path, "r", triples, RECIPE)
    texts = [keys.shingle_text(keys.changed_lines(t.patch)) for t in triples]
    expected = cfmh1.minhash(cfmh1.shingle_sets(texts))
    rows = make.rows(work, "signatures")
    assert [row["minhash"] for row in rows] == [e.astype("<u4").tobytes() for e in expected]
    bands = defaultdict(set)
    for row in make.rows(work, "bands"):
        bands[row["triple_id"]].add(row["band_hash"])
    hashes = cfmh1.band_hashes(expected)
    assert bands == {t.id: set(h.tolist()) for t, h in zip(triples, hashes, strict=True)}
    order = [(row["band_hash"], row["triple_id"]) for row in make.rows(work, "bands")]
    assert order == sorted(order)
    assert len(order) == 36 * len(triples)


@pytest.mark.parametrize("minimum", [1, 10, 25])
def test_small_changes_have_no_sketch(tmp_path: Path, minimum: int) -> None:
    triples = [make.Triple(str(n), change_of(n)) for n in (minimum - 1, minimum) if n]
    triples.append(make.Triple("empty"))
    settings = dataclasses.replace(RECIPE.dedup, min_shingles=minimum)
    work = make.signed(tmp_path, "r", triples, dataclasses.replace(RECIPE, dedup=settings))
    sketched = {r["triple_id"] for r in make.rows(work, "signatures") if r["minhash"]}
    assert sketched == {str(minimum)}
    assert {row["triple_id"] for row in make.rows(work, "bands")} == sketched


def test_a_repository_without_triples(tmp_path: Path) -> None:
    work = make.signed(tmp_path, "r", [], RECIPE)
    assert make.rows(work, "signatures") == []
    assert work.facts["counts"] == {"triples": 0, "sketched": 0, "band_rows": 0}


def test_files_have_the_schemas_and_the_same_bytes_twice(tmp_path: Path) -> None:
    triples = make.families(random.Random(1), 20, [0.05])
    works = [make.signed(tmp_path / name, "r", triples, RECIPE) for name in "ab"]
    for table in ("signatures", "bands"):
        one, two = (make.written(work, table) for work in works)
        assert pq.read_schema(one).equals(TABLES[table].schema, check_metadata=False)
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("table", "message"),
    [("changes", "triple a: its changed files"), ("commits", "triple a: its commit")],
)
def test_incomplete_inputs_are_an_error(tmp_path: Path, table: str, message: str) -> None:
    inputs = make.mined(tmp_path, "r", [make.Triple("a", change_of(20))])
    with pytest.raises(DatasetError, match=message):
        sign.run(Work(tmp_path, "r", "0" * 24, {**inputs, table: []}), RECIPE)


def test_offsets_of_bands_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    """A small change between two large ones must not shift whose bands are whose."""
    triples = [make.Triple("a", change_of(20)), make.Triple("b"), make.Triple("c", change_of(50))]
    rows = make.rows(make.signed(tmp_path, "r", triples, RECIPE), "bands")
    alone = make.rows(make.signed(tmp_path / "alone", "r", triples[2:], RECIPE), "bands")
    assert [row for row in rows if row["triple_id"] == "c"] == alone
    assert len(np.unique([row["band_hash"] for row in alone])) == 36
