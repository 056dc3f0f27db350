"""`codeflow show`: one repository, triple, document or packed row, as text for a terminal."""

from __future__ import annotations

from typing import Any

import click
import pyarrow.compute as pc

from codeflow.dataset import Dataset
from codeflow.errors import UsageError, printable
from codeflow.tables import TABLES

_ROW_PREVIEW_TOKENS = 200


def show(dataset: Dataset, wanted: str) -> str:
    """Find an item by id (a unique prefix will do) and describe it.

    Args:
        wanted: A repository id or name, a triple id, a document id, `row:N`, `decisions` or
            `rejects`.

    Raises:
        UsageError: Nothing, or more than one thing, has that id.
    """
    if wanted == "decisions":
        return _decisions(dataset)
    if wanted == "rejects":
        return _rejects(dataset)
    if wanted.startswith("row:"):
        return _row(dataset, wanted.removeprefix("row:"))
    found: list[tuple[str, str]] = []
    for table, column in (("repos", "repo_id"), ("triples", "triple_id"), ("documents", "doc_id")):
        if not dataset.has(table):
            continue
        ids = dataset.read(table, [column])[column]
        fits = pc.starts_with(ids, pattern=wanted)
        if table == "repos":
            fits = pc.or_(fits, pc.equal(dataset.read(table, ["name"])["name"], wanted))
        hits = ids.filter(fits).to_pylist()
        found += [(table, hit) for hit in hits]
        if wanted in hits:
            found = [(table, wanted)]
            break
    if not found:
        raise UsageError(
            f"nothing in {dataset.root} has the id `{wanted}`: give (the start of) a repository, "
            "triple or document id, `row:N`, `recipe`, `decisions` or `rejects`"
        )
    if len(found) > 1:
        some = ", ".join(f"{name} ({table[:-1]})" for table, name in found[:5])
        raise UsageError(f"`{wanted}` fits {len(found)} items, e.g. {some}: give more characters")
    table, name = found[0]
    return {"repos": _repo, "triples": _triple, "documents": _document}[table](dataset, name)


def _one(dataset: Dataset, table: str, column: str, value: str) -> dict[str, Any]:
    """The row with that id; empty when the table, made by an earlier run, does not know it."""
    rows = dataset.read(table) if dataset.has(table) else TABLES[table].schema.empty_table()
    return next(iter(rows.filter(pc.equal(rows[column], value)).to_pylist()), {})


def _repo(dataset: Dataset, name: str) -> str:
    repo = _one(dataset, "repos", "repo_id", name)
    triples = dataset.read(
        "triples",
        ["triple_id", "repo_id", "lines_added", "lines_deleted", "n_files", "stop_reason"],
    )
    rows = triples.filter(pc.equal(triples["repo_id"], name)).to_pylist()
    lines = [f"{key:<17} {value}" for key, value in repo.items() if value not in (None, "")]
    lines += ["", f"{'triple':<17} {'lines':>12} {'files':>6}  ends because"]
    for t in rows:
        size = f"+{t['lines_added']} -{t['lines_deleted']}"
        lines.append(f"{t['triple_id']:<17} {size:>12} {t['n_files']:>6}  {t['stop_reason']}")
    return "\n".join(map(printable, lines))


def _triple(dataset: Dataset, name: str) -> str:
    triple = _one(dataset, "triples", "triple_id", name)
    patch = triple.pop("patch").decode("utf-8", "replace")
    lines = [f"{key:<17} {value}" for key, value in triple.items() if value is not None]
    if d := _one(dataset, "decisions", "triple_id", name):
        told = "kept" if d["keep"] else f"dropped by {d['stage']}: {d['reason']} ({d['detail']})"
        lines.append(f"{'decision':<17} {told}")
    commits = dataset.read("commits", ["repo_id", "position", "message"])
    same = pc.equal(commits["repo_id"], triple["repo_id"])
    after = pc.greater(commits["position"], triple["old_position"])
    until = pc.less_equal(commits["position"], triple["new_position"])
    for message in commits.filter(pc.and_(same, pc.and_(after, until)))["message"].to_pylist():
        lines.append(f"{'message':<17} {message.partition(chr(10))[0]}")
    return "\n".join([*map(printable, lines), "", _colored_patch(patch)])


def _document(dataset: Dataset, name: str) -> str:
    document = _one(dataset, "documents", "doc_id", name)
    segments = document.pop("segments")
    lines = [f"{key:<17} {value}" for key, value in document.items() if value != ""]
    for s in segments:
        trained = "trained" if s["train"] else "not trained"
        title = f"── {s['role']} {s['path']} · {s['n_tokens']} tokens, {trained} "
        lines += ["", click.style(printable(title).ljust(100, "─"), bold=True)]
        text = s["text"].strip("\n")
        lines.append(_colored_patch(text) if s["role"] == "patch" else printable(text))
    return "\n".join(lines)


def _row(dataset: Dataset, number: str) -> str:
    if not number.isdecimal():
        raise UsageError(f"`row:{number}`: write a row number, e.g. row:0")
    from codeflow.tokenizer import Tokenizer

    rows = dataset.read("shards")
    if int(number) >= rows.num_rows:
        raise UsageError(f"there are {rows.num_rows} rows: row:0 to row:{rows.num_rows - 1}")
    row = rows.filter(pc.equal(rows["row_id"], int(number))).to_pylist()[0]
    tokenizer = Tokenizer.from_file(dataset.root / "shards" / "tokenizer.json")
    lines = [f"row {number}: {row['n_tokens']} tokens, {len(row['docs'])} documents"]
    at = 0
    for doc, length in zip(row["docs"], row["doc_lens"], strict=True):
        what = f"{doc['doc_id']} {doc['kind']} {doc['repo']} {doc['head_commit'][:10]}"
        title = f"── {what} · {length} tokens "
        lines += ["", click.style(title.ljust(100, "─"), bold=True)]
        shown = row["input_ids"][at : at + min(length, _ROW_PREVIEW_TOKENS)]
        more = f"\n… {length - len(shown)} tokens more" if length > len(shown) else ""
        lines.append(printable(tokenizer.decode(shown)) + more)
        at += length
    return "\n".join(lines)


def _decisions(dataset: Dataset) -> str:
    rows = dataset.read("decisions").filter(~pc.field("keep")).to_pylist()
    rows.sort(key=lambda d: (d["stage"], d["reason"], d["triple_id"]))
    lines = [f"{'triple':<17} {'stage':<7} {'reason':<17} detail"]
    lines += [f"{d['triple_id']:<17} {d['stage']:<7} {d['reason']:<17} {d['detail']}" for d in rows]
    return "\n".join(map(printable, lines))


def _rejects(dataset: Dataset) -> str:
    rows = dataset.read("rejects").to_pylist()
    rows.sort(key=lambda r: (r["reason"], r["triple_id"]))
    lines = [f"{'triple':<17} {'reason':<17} detail"]
    lines += [f"{r['triple_id']:<17} {r['reason']:<17} {r['detail']}" for r in rows]
    return "\n".join(map(printable, lines))


def _colored_patch(patch: str) -> str:
    colors = {"+": "green", "-": "red", "@": "cyan"}
    return "\n".join(
        click.style(printable(line), fg=colors[line[0]]) if line[:1] in colors else printable(line)
        for line in patch.split("\n")
    )
