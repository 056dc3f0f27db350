"""Weights and shards whose ids are different tokens do not go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shard_factory import byte_tokenizer, random_rows, write_shards
from small_runs import small

from codeflow.errors import UsageError
from codeflow.load import read_manifest
from codeflow.train.evaluate import main
from codeflow.train.vocabulary import require_same_tokens, token_ids


def changed(**changes: int) -> dict[str, Any]:
    """The byte tokenizer of the shards with other ids for some tokens."""
    tokenizer: dict[str, Any] = byte_tokenizer()
    tokenizer["model"]["vocab"] |= changes
    return tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "data", random_rows(12, 32), length=32)


def other(data: Path) -> Path:
    """The same shards with the ids of two letters exchanged."""
    folder = shutil.copytree(data, data.with_name("other"))
    (folder / "shards" / "tokenizer.json").write_text(json.dumps(changed(a=ord("b"), b=ord("a"))))
    return folder


def test_other_tokens_are_refused_and_one_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(a=ord("b"), b=ord("a"))))
    message = r"2 ids are other tokens \(id 97 is 'a' in the shards, 'b' there\)\. Do that"
    with pytest.raises(UsageError, match=message):
        require_same_tokens(tmp_path, read_manifest(data), "Do that.")


def test_a_vocabulary_may_grow_and_be_written_otherwise(data: Path, tmp_path: Path) -> None:
    manifest = read_manifest(data)
    require_same_tokens(tmp_path, manifest, "")  # nothing is known
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(more=300), indent=4))
    require_same_tokens(tmp_path, manifest, "")
    (manifest.folder / "tokenizer.json").unlink()
    require_same_tokens(tmp_path, manifest, "")


def test_a_unigram_vocabulary_is_a_list(tmp_path: Path) -> None:
    content = {"model": {"vocab": [["x", -1.0], ["y", -2.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert token_ids(tmp_path / "tokenizer.json") == {"x": 0, "y": 1}


def test_commands_refuse(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = small(data, tmp_path / "run", 1).checkpoint
    exchanged = other(data)
    assert main([checkpoint, "--shards", str(exchanged), "--device", "cpu"]) == 2
    assert "packed with another tokenizer" in capsys.readouterr().err
    source = f"train.initialise_from={checkpoint}"
    with pytest.raises(UsageError, match=r"take .*tokenizer\.json away"):
        small(exchanged, tmp_path / "more", 1, source)
    assert not (tmp_path / "more").exists()
    (Path(checkpoint) / "tokenizer.json").unlink()
    assert small(exchanged, tmp_path / "more", 1, source).steps == 1
