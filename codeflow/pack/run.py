"""Unit `pack`: the documents of a dataset into shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from codeflow.pack.shards import Documents, Lists, write_shards
from codeflow.recipe import Recipe
from codeflow.tokenizer import Tokenizer
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Write `shards/`: Parquet rows, tokenizer.json, manifest.json."""
    tokenizer_path = work.inputs["tokenizer"][0]
    return write_shards(
        work,
        _documents(work),
        recipe.pack,
        tokenizer_path.read_bytes(),
        Tokenizer.from_file(tokenizer_path),
        {"recipe": recipe.name, "recipe_hash": recipe.hash},
    )


def _documents(work: Work) -> Documents:
    """All documents, in the order of `tokens`."""
    tokens = work.read("tokens")
    columns = ["doc_id", "repo_id", "sequence", "base_commit", "head_commit", "license", "kind"]
    origin = work.read("documents", columns)
    at = pc.index_in(tokens["doc_id"], value_set=origin["doc_id"].combine_chunks())
    origin = origin.take(at)
    repos = work.read("repos", ["repo_id", "name"])
    repo = pc.index_in(origin["repo_id"], value_set=repos["repo_id"].combine_chunks())
    origin = origin.append_column("repo", repos["name"].take(repo)).combine_chunks()
    # Inside a row: a repository's documents together, in its own order.
    by_history = [("repo_id", "ascending"), ("sequence", "ascending"), ("doc_id", "ascending")]
    reading_order = np.argsort(pc.sort_indices(origin, sort_keys=by_history).to_numpy())
    roles, role_tokens, role_names = _segments(work)
    return Documents(
        Lists.of_column(tokens["input_ids"]),
        Lists.of_column(tokens["loss_runs"]),
        roles.take(at.to_pylist()),
        role_tokens.take(at.to_pylist()),
        role_names,
        origin,
        reading_order,
    )


def _segments(work: Work) -> tuple[Lists, Lists, list[str]]:
    """Roles (as indices of the names, third) and lengths of the segments of `documents`.

    Text is not read. The end token, which closes a document, is counted to its last segment.
    """
    names: list[str] = []
    roles: list[np.ndarray[Any, Any]] = []
    tokens: list[np.ndarray[Any, Any]] = []
    lengths: list[np.ndarray[Any, Any]] = []
    leaves = [f"segments.list.element.{name}" for name in ("role", "n_tokens")]
    for batch in work.batches("documents", leaves):
        segments = batch["segments"].flatten()
        of_document = batch["segments"].value_lengths().to_numpy()
        encoded = segments.field("role").dictionary_encode()
        local = encoded.dictionary.to_pylist()
        names += [name for name in local if name not in names]
        codes = np.array([names.index(name) for name in local], np.uint8)
        counts = segments.field("n_tokens").to_numpy().copy()
        counts[np.cumsum(of_document)[of_document > 0] - 1] += 1
        roles.append(codes[encoded.indices.to_numpy()])
        tokens.append(counts)
        lengths.append(of_document)
    return Lists.of_parts(roles, lengths), Lists.of_parts(tokens, lengths), names
