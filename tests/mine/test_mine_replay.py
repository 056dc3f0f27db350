"""Stored data proves itself: any damage to it is found, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repo_builder import LINK, WIDE, Mined, Repo, mine, text

from codeflow.dataset import Dataset, Marker
from codeflow.tables import TABLES
from codeflow.verify import Verification, verify
from codeflow.work import Work

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Mined:
    """A mined dataset whose repository is gone."""
    folder = tmp_path_factory.mktemp("replay")
    repo = Repo(folder / "r.git")
    base = {b"src/a.py": text("a", 30), b"keep/same.txt": b"never changed\n", b"link": (LINK, b"x")}
    repo.chain(
        base,
        base | {b"src/a.py": text("a", 28, 2), b"src/b.py": text("b", 5)},
        base | {b"src/a.py": text("a", 30, 4), b"src/b.py": text("b", 5, 1)},
        base | {b"src/a.py": text("a", 30, 4), b"bin": b"\0"},
        {b"src/a.py": text("a", 30, 9), b"bin": b"\0", b"keep/same.txt": b"never changed\n"},
    )
    result = mine(repo.path, folder / "data", **WIDE, max_commits=1)
    shutil.rmtree(repo.path)
    return result


@pytest.fixture
def mined(pristine: Mined, tmp_path: Path) -> Mined:
    shutil.copytree(pristine.dataset.root, tmp_path / "data")
    return Mined(tmp_path / "data")


def check(mined: Mined) -> Verification:
    return verify(mined.dataset, workers=1, executor="inline")


def rewrite(mined: Mined, table: str, damage: Callable[[Rows], None]) -> None:
    """Change rows of a table behind a marker that agrees with the new file."""
    rows = mined.rows(table)
    damage(rows)
    work = Work(mined.dataset.root, mined.unit, "d" * 64, {})
    work.write(table, pa.Table.from_pylist(rows, schema=TABLES[table].schema))
    files = [f for f in mined.marker.files if f.table != table] + work.written
    mined.dataset.commit(replace(mined.marker, files=tuple(files)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_undamaged_data_proves_itself_without_its_repository(mined: Mined) -> None:
    found = check(mined)
    assert found.problems == ()
    assert (found.triples, found.proven, found.complete) == (4, 4, 3)
    assert found.files == len({*mined.survey.files, *mined.marker.files})


def test_bytes_flipped_in_any_file_are_found(mined: Mined) -> None:
    for file in mined.marker.files:
        path = mined.dataset.root / file.path
        data = path.read_bytes()
        path.write_bytes(flipped(data, len(data) // 2))
        assert f"{file.path} has changed since it was written" in check(mined).problems
        path.write_bytes(data)
    path.unlink()
    assert f"{file.path} is missing" in check(mined).problems


def _first(triples: Rows) -> dict[str, Any]:
    return triples[0]


def _set(row: dict[str, Any], **values: Any) -> None:
    assert all(row[k] != v for k, v in values.items())
    row.update(values)


def _row(rows: Rows, **values: Any) -> dict[str, Any]:
    return next(r for r in rows if all(r[k] == v for k, v in values.items()))


def _swap_patches(triples: Rows) -> None:
    a, b = triples[0], triples[1]
    a["patch"], b["patch"] = b["patch"], a["patch"]


def _flip_blob(path: bytes) -> Callable[[Rows], None]:
    def damage(rows: Rows) -> None:
        row = _row(rows, path=path)
        _set(row, data=flipped(row["data"], 0))

    return damage


def _flip_in_patch(needle: bytes) -> Callable[[Rows], None]:
    def damage(rows: Rows) -> None:
        row = next(r for r in rows if needle in r["patch"])
        _set(row, patch=flipped(row["patch"], row["patch"].index(needle) + len(needle) - 1))

    return damage


DAMAGE: dict[str, tuple[str, Callable[[Rows], None], str]] = {
    "a changed file": ("blobs", _flip_blob(b"src/a.py"), "other content than its id"),
    "an unchanged file": ("blobs", _flip_blob(b"keep/same.txt"), "other content than its id"),
    "a link": ("blobs", _flip_blob(b"link"), "other content than its id"),
    "a file without data": (
        "blobs",
        lambda r: _set(_row(r, path=b"link"), data=None),
        "other content than its id",
    ),
    "a lost file": ("blobs", lambda r: r.remove(_row(r, path=b"keep/same.txt")), "is not stored"),
    "a tree": (
        "trees",
        lambda r: _set(r[0], data=flipped(r[0]["data"], 30)),
        "other content than its id",
    ),
    "a lost tree": ("trees", lambda r: r.remove(r[-1]), "is not stored"),
    "swapped patches": ("triples", _swap_patches, ""),
    "an added line": ("triples", _flip_in_patch(b"\n+a line"), "'src/a.py'"),
    "a context line": ("triples", _flip_in_patch(b"\n a line"), "'src/a.py'"),
    "a line of a deleted file": ("triples", _flip_in_patch(b"\n-b line 5"), "'src/b.py'"),
    "a hunk header": ("triples", _flip_in_patch(b"\n@@ "), ""),
    "a lost patch": ("triples", lambda r: _set(_first(r), patch=b""), "patch has 0 sections"),
    "a patch of something else": ("triples", lambda r: _set(_first(r), patch=b"x"), "expected"),
    "another R_new": (
        "triples",
        lambda r: _set(_first(r), new_tree=r[1]["new_tree"]),
        "R_new rebuilds to tree",
    ),
    "another R_old": ("triples", lambda r: _set(_first(r), old_tree="12" * 20), "is not stored"),
    "a lie about completeness": (
        "triples",
        lambda r: _set(_first(r), patch_complete=False),
        "patch_complete contradicts",
    ),
    "a wrong new blob": ("changes", lambda r: _set(r[0], new_blob="12" * 20), "header names blob"),
    "a wrong old blob": ("changes", lambda r: _set(r[0], old_blob="12" * 20), "12121212"),
    "a wrong mode": ("changes", lambda r: _set(r[0], new_mode=0o100755), "header says"),
    "a wrong path": ("changes", lambda r: _set(r[0], path=b"src/else.py"), "header says"),
    "a lost change": ("changes", lambda r: r.remove(r[0]), "the listed changes have"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_its_triple_named(mined: Mined, what: str) -> None:
    table, damage, message = DAMAGE[what]
    triples = {t["triple_id"] for t in mined.rows("triples")}
    rewrite(mined, table, damage)
    found = check(Mined(mined.dataset.root))
    assert found.proven < found.triples == 4
    for problem in found.problems:
        assert problem.split()[2].rstrip(":") in triples, problem
    assert any(message in p for p in found.problems), found.problems


def test_a_damaged_page_fails_its_repository_and_not_the_run(mined: Mined) -> None:
    """Past the checksum of the file, Parquet's own page checksum still speaks."""
    (file,) = (f for f in mined.marker.files if f.table == "blobs")
    path = mined.dataset.root / file.path
    data = path.read_bytes()
    with pq.ParquetFile(path) as parquet:
        chunk = parquet.metadata.row_group(0).column(parquet.schema_arrow.names.index("data"))
    end = chunk.data_page_offset + chunk.total_compressed_size
    path.write_bytes(flipped(data, end - 5))
    found = verify(Dataset.open(mined.dataset.root), workers=1, executor="inline")
    assert found.triples == 0
    assert any(p.startswith("repo.0000: failed") for p in found.problems)


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[]", b'{"shards": null, "tokenizer": null}'])
def test_an_unusable_shard_manifest_is_a_problem(mined: Mined, manifest: bytes) -> None:
    mined.dataset.commit(Marker("pack", "all", "f" * 64))
    (mined.dataset.root / "shards").mkdir()
    (mined.dataset.root / "shards/manifest.json").write_bytes(manifest)
    (problem,) = check(mined).problems
    assert problem.startswith("shards/manifest.json cannot be used")
