"""Which token an id stands for: in the shards and beside the weights it has to be the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codeflow.errors import UsageError
from codeflow.load import Manifest

TOKENIZER = "tokenizer.json"


def token_ids(file: Path) -> dict[str | None, int]:
    """Every token's id; a Unigram vocabulary is a list, of the others a dict.

    Raises:
        UsageError: No tokenizer there.
    """
    try:
        tokenizer: dict[str, Any] = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = tokenizer.get("added_tokens") or []
        return {**vocabulary, **{t["content"]: t["id"] for t in added}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{file}: cannot be read as a tokenizer.json: {e!r}") from e


def require_same_tokens(folder: Path, manifest: Manifest, remedy: str) -> None:
    """Refuse weights for whose tokenizer the ids of the shards are other tokens.

    Ids that only one of the two has are no conflict: vocabularies grow. Where either has no
    `tokenizer.json` nothing is known and nothing refused.

    Args:
        folder: Of the weights.
        manifest: Of the shards.
        remedy: What to do about it.

    Raises:
        UsageError: It names a token that differs.
    """
    own, theirs = folder / TOKENIZER, manifest.folder / TOKENIZER
    if not (own.is_file() and theirs.is_file()) or own.read_bytes() == theirs.read_bytes():
        return
    known = {id_: token for token, id_ in token_ids(own).items()}
    packed = {id_: token for token, id_ in token_ids(theirs).items()}
    if not (differing := sorted(i for i in known.keys() & packed.keys() if known[i] != packed[i])):
        return
    first = differing[0]
    raise UsageError(
        f"{manifest.folder}: packed with another tokenizer than that of {folder}: "
        f"{len(differing):,} ids are other tokens (id {first} is {packed[first]!r} in the shards, "
        f"{known[first]!r} there). {remedy}"
    )
