from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shard_factory import random_rows, write_shards

from codeflow.errors import ShardError
from codeflow.load import read_manifest


def write(folder: Path, **fields: object) -> Path:
    return write_shards(folder, random_rows(10, 16), length=16, manifest_fields=fields)


def test_folder_shards_and_file_are_the_same_manifest(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    found = [read_manifest(data / p) for p in ("", "shards", "shards/manifest.json")]
    assert found[0] == found[1] == found[2]
    assert found[0].rows == 10
    assert [s.row_groups for s in found[0].shards] == [(4, 4, 2)]
    assert found[0].special_tokens == {"<|endoftext|>": 256}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "mds", "codeflow-shards"),
        ("format_version", 2, "format_version 2"),
        ("format_version", "1", "format_version"),
        ("token_dtype", "int8", "token_dtype"),
        ("rows", 11, "says 11 rows"),
        ("tokens", 1, "says 1 tokens"),
        ("shards", "none", "malformed"),
        ("shards", [{"file": "x.parquet"}], "rows"),
        ("vocab_size", "many", "malformed"),
        ("tokenizer", {}, "special_tokens"),
    ],
)
def test_refuses(tmp_path: Path, field: str, value: object, message: str) -> None:
    data = write(tmp_path / "data", **{field: value})
    with pytest.raises(ShardError, match=message) as e:
        read_manifest(data)
    assert "manifest.json" in str(e.value)


def test_refuses_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no rows"):
        read_manifest(write_shards(tmp_path / "data", [], length=16))


def test_no_manifest_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nor in .*shards"):
        read_manifest(tmp_path)


def test_not_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="cannot be read"):
        read_manifest(tmp_path)


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    shard = read_manifest(data).shards[0].path
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match=rf"{shard.name}: \d+ bytes instead of"):
        read_manifest(data)
    shard.unlink()
    with pytest.raises(ShardError, match=rf"{shard.name}: shard is missing"):
        read_manifest(data)


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    file = data / "shards" / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0]["file"] = "../" * 3 + content["shards"][0]["file"]
    file.write_text(json.dumps(content))
    assert read_manifest(data).shards[0].path.parent == data / "shards"


def test_a_dataset_without_shards_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "codeflow-dataset"}')
    with pytest.raises(ShardError, match=r"not a manifest of shards.*`codeflow pack` has finished"):
        read_manifest(tmp_path)


def test_a_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data")
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:  # permissions do not bind root
        if path.parent.name == "shards":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ShardError, match=r"shards/manifest\.json: no permission to read it"):
        read_manifest(data)
