"""`codeflow show`: every kind of item, ids that fit none or many, and hostile text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pytest
from engine_builds import Recorder, recipe, run_build

from codeflow.dataset import Dataset
from codeflow.errors import DatasetError, UsageError
from codeflow.pipeline import RunOptions, build
from codeflow.report.show import show
from codeflow.report.summary import render, summarize
from codeflow.steps import STAGES
from codeflow.tables import TABLES
from codeflow.work import Work


@pytest.fixture(scope="module")
def dataset(built: Path) -> Dataset:
    return Dataset.open(built)


def first(dataset: Dataset, table: str) -> dict[str, Any]:
    return dict(dataset.read(table).slice(0, 1).to_pylist()[0])


def test_a_repository_by_id_by_its_start_and_by_name(dataset: Dataset) -> None:
    (ledger,) = [r for r in dataset.read("repos").to_pylist() if r["name"] == "ledger"]
    text = show(dataset, ledger["repo_id"])
    assert show(dataset, "ledg") == show(dataset, "ledger") == text
    assert ledger["head"] in text
    triples = [t for t in dataset.read("triples").to_pylist() if t["repo_id"] == ledger["repo_id"]]
    assert triples
    for triple in triples:
        assert triple["triple_id"] in text
        assert f"+{triple['lines_added']} -{triple['lines_deleted']}" in text


def test_a_triple_with_its_decision_messages_and_patch(dataset: Dataset) -> None:
    triple = first(dataset, "triples")
    text = click.unstyle(show(dataset, triple["triple_id"][:12]))
    assert triple["new_commit"] in text
    assert "\ndecision " in text
    assert "\nmessage " in text
    assert triple["patch"].decode("utf-8").splitlines()[-1] in text


def test_a_document_with_all_its_segments(dataset: Dataset) -> None:
    document = first(dataset, "documents")
    text = click.unstyle(show(dataset, document["doc_id"]))
    for segment in document["segments"]:
        assert f"── {segment['role']} {segment['path']} · {segment['n_tokens']} tokens" in text
        assert segment["text"].strip("\n").splitlines()[-1] in text


def test_rows_by_number(dataset: Dataset) -> None:
    rows = dataset.read("shards").to_pylist()
    for number in (0, len(rows) - 1):
        text = click.unstyle(show(dataset, f"row:{number}"))
        assert f"row {number}: {rows[number]['n_tokens']} tokens" in text
        assert text.count("<|repo_name|>") == len(rows[number]["docs"])
        assert all(d["doc_id"] in text for d in rows[number]["docs"])
    for number in (len(rows), 10**30):
        with pytest.raises(UsageError, match=rf"there are {len(rows)} rows: row:0 to row:"):
            show(dataset, f"row:{number}")
    for word in ("", "x", "-1", "1.5"):
        with pytest.raises(UsageError, match=r"write a row number, e\.g\. row:0"):
            show(dataset, f"row:{word}")


def test_decisions_lists_every_drop(dataset: Dataset) -> None:
    dropped = [d for d in dataset.read("decisions").to_pylist() if not d["keep"]]
    lines = show(dataset, "decisions").splitlines()
    assert dropped
    assert len(lines) == 1 + len(dropped)
    assert all(any(d["triple_id"] in x and d["reason"] in x for x in lines) for d in dropped)


def test_rejects_lists_every_triple_that_gave_no_document(built: Path, tmp_path: Path) -> None:
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    build(dataset.root, recipe("pack.length=1024"), None, Recorder(), RunOptions("inline"))
    rejects = dataset.read("rejects").to_pylist()
    lines = show(dataset, "rejects").splitlines()
    assert rejects
    assert len(lines) == 1 + len(rejects)
    assert all(any(r["triple_id"] in x and r["detail"] in x for x in lines) for r in rejects)


def test_an_unknown_id_says_what_there_is(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match=r"has the id `zzz`: give .*`row:N`, `recipe`"):
        show(dataset, "zzz")


def test_an_ambiguous_id_names_candidates(dataset: Dataset) -> None:
    starts = [t[:1] for t in dataset.read("triples")["triple_id"].to_pylist()]
    common = max(starts, key=starts.count)
    assert starts.count(common) > 1
    with pytest.raises(UsageError, match=r"fits \d+ items, e\.g\. .*give more characters"):
        show(dataset, common)


def test_a_table_that_is_not_there_yet_is_named(
    tmp_path: Path, repositories: tuple[Path, Path, Path]
) -> None:
    run_build(tmp_path / "data", repositories[:1], until="mine")
    dataset = Dataset.open(tmp_path / "data")
    assert "decision" not in show(dataset, first(dataset, "triples")["triple_id"])
    for item, table in (("row:0", "shards"), ("decisions", "decisions")):
        with pytest.raises(DatasetError, match=f"has no table `{table}` yet"):
            show(dataset, item)


def test_a_triple_that_no_decision_knows_is_still_shown(built: Path, tmp_path: Path) -> None:
    """As after `codeflow mine` with other settings, before `codeflow filter`."""
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    _replace(dataset, "decisions", {"triple_id": "other"})
    text = show(dataset, first(dataset, "triples")["triple_id"])
    assert "\ndecision" not in text


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"


def _replace(dataset: Dataset, table: str, values: dict[str, Any]) -> None:
    """Overwrite fields of every row of a table, on disk."""
    for file in dataset.files(table):
        path = dataset.root / file.path
        rows = Dataset.read(dataset, table).to_pylist()
        work = Work(dataset.root, "x", "0" * 24, {})
        work.write(table, pa.Table.from_pylist(
            [row | values for row in rows], schema=TABLES[table].schema
        ))  # fmt: skip
        shutil.move(dataset.root / work.written[0].path, path)


def test_no_control_character_of_a_repository_reaches_the_terminal(
    built: Path, tmp_path: Path
) -> None:
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    segment = {"role": "context", "path": EVIL, "text": EVIL, "train": True, "n_tokens": 3}
    _replace(dataset, "documents", {"segments": [segment, segment | {"role": "patch"}]})
    _replace(dataset, "triples", {"patch": f"+{EVIL}\n-{EVIL}\n {EVIL}".encode(), "license": EVIL})
    _replace(dataset, "commits", {"message": EVIL})
    _replace(dataset, "decisions", {"keep": False, "detail": EVIL})
    _replace(dataset, "repos", {"reason": EVIL})
    items = [
        first(dataset, "documents")["doc_id"],
        first(dataset, "triples")["triple_id"],
        first(dataset, "repos")["repo_id"],
        "decisions",
    ]
    for item in items:
        text = show(dataset, item)
        assert "\ufffd" in text
        plain = click.unstyle(text)  # takes away our own colours, which are all well-formed
        assert not [c for c in plain if c not in "\n\t" and not c.isprintable()]
        assert "\x1b]" not in text
        assert "\x1b[2J" not in text


# -- the summary ----------------------------------------------------------------------------------


def test_the_summary_adds_up(dataset: Dataset) -> None:
    s = summarize(dataset, recipe())
    assert (s.repositories, s.mined, s.skipped, s.failed) == (2, 2, {}, {})
    assert s.triples == dataset.read("triples").num_rows == s.kept + sum(s.dropped.values())
    assert s.kept == s.documents + sum(s.rejected.values())
    assert s.documents == dataset.read("documents").num_rows
    shards = dataset.read("shards")
    assert s.rows == shards.num_rows
    assert s.tokens == sum(shards["n_tokens"].to_pylist())
    assert s.fill == pytest.approx(s.tokens / (s.rows * 4096))
    assert s.bytes == sum(f.bytes for m in dataset.all_markers() for f in m.files)
    text = render(s, recipe())
    for told in (f"{s.triples:,} found", f"{s.kept:,} kept", f"{s.tokens:,}", f"{s.rows:,}"):
        assert told in text


def test_the_summary_of_a_dataset_without_shards_tells_of_none(
    tmp_path: Path, repositories: tuple[Path, Path, Path]
) -> None:
    run_build(tmp_path / "data", repositories[:1], until="mine")
    s = summarize(Dataset.open(tmp_path / "data"), recipe())
    assert (s.stages, s.rows, s.fill) == (("mine",), 0, 0.0)
    text = render(s, recipe())
    assert "triples" in text
    assert "shards" not in text
    assert "out of date" not in text


@pytest.mark.parametrize(
    ("override", "stage", "current", "gone"),
    [
        ("mine.max_lines=300", "mine", ("mine",), ("kept", "documents", "rows")),
        (
            "filter.min_message_words=9",
            "filter",
            ("mine", "dedup", "filter"),
            ("documents", "rows"),
        ),
        ("pack.length=8192", "filter", ("mine", "dedup", "filter"), ("documents", "rows")),
        ("pack.group_tokens=8192", "compose", ("mine", "dedup", "filter", "compose"), ("rows",)),
    ],
)
def test_the_summary_tells_nothing_of_what_is_out_of_date(
    built: Path, tmp_path: Path, override: str, stage: str, current: tuple[str, ...],
    gone: tuple[str, ...],
) -> None:  # fmt: skip
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    changed = recipe(override)
    build(dataset.root, changed, None, Recorder(), RunOptions("inline"), stage)
    s = summarize(dataset, changed)
    assert s.stages == current
    assert s.out_of_date == tuple(x for x in STAGES if x not in current)
    assert s.update == f"codeflow pack {dataset.root}"
    numbers = s.as_json()
    assert all(numbers[name] == 0 for name in gone)
    text = render(s, changed)
    assert not [line for line in text.splitlines() for name in gone if f" {name} " in line]
    assert f"out of date: {', '.join(s.out_of_date)}: run `codeflow pack {dataset.root}`" in text
    build(dataset.root, changed, None, Recorder(), RunOptions("inline"))
    s = summarize(dataset, changed)
    assert (s.stages, s.out_of_date, s.update) == (STAGES, (), "")
    assert s.row_length == changed.pack.length


def test_the_summary_of_an_unfinished_mining_has_no_numbers_of_it(
    built: Path, tmp_path: Path
) -> None:
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    dataset.forget("mine", [dataset.markers("mine")[0].unit])
    s = summarize(dataset, recipe())
    assert (s.triples, s.stages, s.out_of_date) == (0, (), STAGES)
    assert "2 listed" in render(s, recipe())


def test_the_summary_does_not_need_the_vocabulary_file(built: Path, tmp_path: Path) -> None:
    """As on another machine, which has the dataset alone."""
    dataset = Dataset(Path(shutil.copytree(built, tmp_path / "data")))
    file = tmp_path / "tokenizer.json"
    shutil.copy(built / "shards/tokenizer.json", file)
    own = recipe(f"tokenizer.path={file}")
    build(dataset.root, own, None, Recorder(), RunOptions("inline"))
    file.unlink()
    assert summarize(dataset, own).stages == STAGES
