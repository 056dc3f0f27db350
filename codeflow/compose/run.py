"""Unit `compose`: one repository's kept triples to documents, encoded and fitted into a row."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from codeflow.compose.document import Example, Fitted, Segment, fit
from codeflow.compose.transition import transition
from codeflow.recipe import ComposeSettings, Recipe
from codeflow.tables import TABLES
from codeflow.tokenizer import Tokenizer
from codeflow.work import Counts, Work

Renderer = Callable[[Example, ComposeSettings], Sequence[Segment]]
RENDERERS: dict[str, Renderer] = {"transition": transition}


def run(work: Work, recipe: Recipe) -> Counts:
    """Write `documents`, `tokens` and `rejects` of one repository."""
    tokenizer = Tokenizer.from_file(work.inputs["tokenizer"][0])
    documents: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    for example in _examples(work):
        triple_id = example.triple["triple_id"]
        for kind, render in RENDERERS.items():
            try:
                segments = render(example, recipe.compose)
            except UnicodeDecodeError as e:
                rejects.append({"triple_id": triple_id, "reason": "not_utf8", "detail": str(e)})
                continue
            fitted = fit(segments, tokenizer, recipe.pack.length)
            if isinstance(fitted, int):
                detail = f"{fitted} tokens without context, pack.length is {recipe.pack.length}"
                rejects.append({"triple_id": triple_id, "reason": "too_long", "detail": detail})
                continue
            doc_id = hashlib.blake2b(f"{kind} {triple_id}".encode(), digest_size=8).hexdigest()
            documents.append(_document(doc_id, kind, example, fitted, recipe.compose))
            runs = loss_runs(fitted, recipe.compose)
            tokens.append({"doc_id": doc_id, "input_ids": fitted.input_ids, "loss_runs": runs})
    _write(work, "documents", documents)
    _write(work, "tokens", tokens)
    _write(work, "rejects", rejects)
    reasons = Counter(f"rejected_{r['reason']}" for r in rejects)
    return {
        "documents": len(documents),
        "document_tokens": sum(d["n_tokens"] for d in documents),
        "context_files": sum(d["context_files"] for d in documents),
        "context_dropped": sum(d["context_dropped"] for d in documents),
        **reasons,
    }


def loss_runs(fitted: Fitted, settings: ComposeSettings) -> list[int]:
    """Run lengths of tokens that are not, are, are not … training targets.

    The patch is always a target, and so is the end token; the rest by `compose.train_context`.
    """
    runs = [0, 0]
    for segment, length in [*fitted.segments, (None, 1)]:
        train = segment is None or segment.role == "patch" or settings.train_context
        if train != (len(runs) % 2 == 0):
            runs.append(0)
        runs[-1] += length
    return runs


def _examples(work: Work) -> list[Example]:
    decisions = work.read("decisions", ["triple_id", "keep"]).to_pylist()
    kept = {d["triple_id"] for d in decisions if d["keep"]}
    changes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for change in work.read("changes").to_pylist():
        if change["triple_id"] in kept:
            changes[change["triple_id"]].append(change)
    old_blobs = {
        c["old_blob"] for rows in changes.values() for c in rows if c["kind"] == "text"
    } - {None}
    texts = _texts(work, old_blobs)
    messages: dict[int, list[str]] = defaultdict(list)
    for commit in work.read("commits", ["position", "message", "is_merge"]).to_pylist():
        messages[commit["position"]].append(commit["message"])
    names = work.read("repos", ["name"])["name"].to_pylist()
    result = []
    for triple in work.read("triples").to_pylist():
        if triple["triple_id"] in kept:
            span = range(triple["old_position"] + 1, triple["new_position"] + 1)
            rows = changes[triple["triple_id"]]
            old = {c["old_path"] or c["path"]: c["old_blob"] for c in rows}
            result.append(
                Example(
                    triple,
                    rows,
                    [m for position in span for m in messages[position]],
                    names[0],
                    {path: texts[blob] for path, blob in old.items() if blob in texts},
                )
            )
    return result


def _texts(work: Work, wanted: set[str]) -> dict[str, str]:
    """Contents of the wanted blobs that are valid UTF-8; others cannot be shown as context."""
    found = {}
    for batch in work.batches("blobs", ["blob", "data"]):
        for blob, data in zip(batch["blob"].to_pylist(), batch["data"], strict=True):
            if blob in wanted and data.is_valid:
                try:
                    found[blob] = data.as_py().decode("utf-8")
                except UnicodeDecodeError:
                    continue
    return found


def _document(
    doc_id: str, kind: str, example: Example, fitted: Fitted, settings: ComposeSettings
) -> dict[str, Any]:
    lines: Counter[str] = Counter()
    for change in example.changes:
        lines[change["language"]] += change["lines_added"] + change["lines_deleted"]
    triple = example.triple
    return {
        "doc_id": doc_id,
        "kind": kind,
        "repo_id": triple["repo_id"],
        "triple_id": triple["triple_id"],
        "sequence": triple["sequence"],
        "base_commit": triple["old_commit"],
        "head_commit": triple["new_commit"],
        "license": triple["license"] or "",
        "language": max(sorted(lines), key=lambda name: lines[name], default=""),
        "segments": [
            {
                "role": s.role,
                "path": s.path,
                "text": s.text,
                "train": s.role == "patch" or settings.train_context,
                "n_tokens": n,
            }
            for s, n in fitted.segments
        ],
        "context_files": sum(s.role == "context" for s, _ in fitted.segments),
        "context_dropped": fitted.dropped,
        "n_tokens": len(fitted.input_ids),
    }


def _write(work: Work, table: str, rows: list[dict[str, Any]]) -> None:
    work.write(table, pa.Table.from_pylist(rows, schema=TABLES[table].schema))
