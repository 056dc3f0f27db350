"""The manifest of a set of shards: what is there, before any Parquet file is opened.

It repeats the row count of every row group, so that the order of an epoch, and a resume in the
middle of it, need no footers. The price is that a shard changed behind the manifest's back is only
noticed when its size differs (checked here) or when its pages are read (checked by the loader).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeflow.errors import ShardError

FORMAT = "codeflow-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_HINT = "Give a dataset folder in which `codeflow pack` has finished."


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    Attributes:
        path: Where the file lies.
        rows: Packed rows in it.
        tokens: Tokens in it, without padding (none is stored).
        bytes: Size of the file.
        sha256: Checksum of the file, lower-case hex.
        row_groups: Rows of each row group, in file order.
    """

    path: Path
    rows: int
    tokens: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A validated `manifest.json`.

    Attributes:
        folder: The folder of the shards.
        sha256: Checksum of the manifest itself; identifies the data in a loader's state.
        length: Most tokens a row can have.
        token_dtype: `uint16` or `uint32`, as stored.
        vocab_size: Every token id is smaller than this.
        special_tokens: Token text to id.
        documents: Documents in all shards.
        tokens: Tokens in all shards.
        rows: Rows in all shards.
        recipe_hash: Hash of the recipe that made the data.
        shards: The files, in order.
    """

    folder: Path
    sha256: str
    length: int
    token_dtype: str
    vocab_size: int
    special_tokens: Mapping[str, int]
    documents: int
    tokens: int
    rows: int
    recipe_hash: str
    shards: tuple[Shard, ...]


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest and the presence and size of every shard it names.

    Args:
        path: A dataset folder that holds `shards/`, the shards folder, or its `manifest.json`.

    Raises:
        ShardError: No manifest there, another format or a newer version of it, a field missing or
            inconsistent, a shard missing or of another size.
    """
    try:
        return _read(_locate(Path(path)))
    except PermissionError as e:  # of looking for a file in a closed folder
        raise ShardError(f"{e.filename or path}: no permission to read it") from e


def _read(file: Path) -> Manifest:
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError) as e:
        raise ShardError(f"{file}: cannot be read as a manifest: {e}") from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f'{file}: not a manifest of shards (no `"format": "{FORMAT}"`). {_HINT}')
    version = content.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ShardError(
            f"{file}: format_version {version!r}; this codeflow reads up to {FORMAT_VERSION}. "
            "Update codeflow, or pack the documents again with this one."
        )
    try:
        manifest = _parse(content, file.parent, hashlib.sha256(raw).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ShardError(f"{file}: field missing or malformed: {e!r}. Pack again.") from e
    _check(manifest, file)
    return manifest


def _locate(path: Path) -> Path:
    # A dataset folder has a manifest of its own, of everything; the shards have theirs below.
    candidates = [path / "shards" / MANIFEST_NAME, path / MANIFEST_NAME]
    for candidate in [path] if path.is_file() else candidates:
        if candidate.is_file():
            return candidate
    raise ShardError(f"{path}: no {MANIFEST_NAME} here nor in {path / 'shards'}. {_HINT}")


def _parse(content: dict[str, Any], folder: Path, sha256: str) -> Manifest:
    shards = tuple(
        Shard(
            path=folder / Path(str(s["file"])).name,  # a manifest names files beside itself only
            rows=int(s["rows"]),
            tokens=int(s["tokens"]),
            bytes=int(s["bytes"]),
            sha256=str(s["sha256"]),
            row_groups=tuple(int(n) for n in s["row_groups"]),
        )
        for s in content["shards"]
    )
    return Manifest(
        folder=folder,
        sha256=sha256,
        length=int(content["length"]),
        token_dtype=str(content["token_dtype"]),
        vocab_size=int(content["vocab_size"]),
        special_tokens={str(k): int(v) for k, v in content["tokenizer"]["special_tokens"].items()},
        documents=int(content["documents"]),
        tokens=int(content["tokens"]),
        rows=int(content["rows"]),
        recipe_hash=str(content["recipe_hash"]),
        shards=shards,
    )


def _check(manifest: Manifest, file: Path) -> None:
    if manifest.token_dtype not in ("uint16", "uint32"):
        raise ShardError(f"{file}: token_dtype {manifest.token_dtype!r} is not uint16 or uint32")
    if manifest.rows == 0:
        raise ShardError(f"{file}: holds no rows; were all documents filtered out?")
    for total in ("rows", "tokens"):
        found = sum(getattr(shard, total) for shard in manifest.shards)
        if found != getattr(manifest, total):
            raise ShardError(
                f"{file}: says {getattr(manifest, total)} {total}, its shards add up to {found}"
            )
    for shard in manifest.shards:
        if sum(shard.row_groups) != shard.rows or min(shard.row_groups, default=1) < 1:
            raise ShardError(f"{file}: row groups of {shard.path.name} do not add up to its rows")
        if not shard.path.is_file():
            raise ShardError(f"{shard.path}: shard is missing; copy it again or pack again")
        size = shard.path.stat().st_size
        if size != shard.bytes:
            raise ShardError(
                f"{shard.path}: {size} bytes instead of {shard.bytes}; copy it again or pack again"
            )
