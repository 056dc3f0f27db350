"""Which units run: none twice, all that a change reaches, and always to the same bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine_builds import (
    HEAVY,
    Recorder,
    environment,
    fingerprint,
    make_repository,
    recipe,
    run_build,
    temporary_files,
    write_list,
)

from codeflow.dataset import Dataset
from codeflow.errors import DatasetError, UsageError
from codeflow.mine.sources import parse_sources
from codeflow.pipeline import Plan, RunOptions, StepPlan, build, plan
from codeflow.recipe import Recipe
from codeflow.report.summary import summarize
from codeflow.steps import STAGES, STEPS

Repositories = tuple[Path, Path, Path]
LOCAL = RunOptions(executor="local", workers=2)
ALL_STEPS = [step.name for step in STEPS]
PER_REPOSITORY = [step.name for step in STEPS if step.scope != "dataset"]


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A finished dataset of the first two repositories, to play with."""
    return Path(shutil.copytree(built, tmp_path / "data"))


def test_a_build_makes_documents_of_every_repository(built: Path) -> None:
    dataset = Dataset.open(built)
    assert len(set(dataset.read("documents")["repo_id"].to_pylist())) == 2
    assert dataset.read("shards").num_rows > 4
    assert temporary_files(built) == []


def test_a_second_build_runs_nothing_and_changes_nothing(
    data: Path, repositories: Repositories
) -> None:
    before = fingerprint(data)
    times = {p: p.stat().st_mtime_ns for p in data.rglob("*") if p.name not in (".lock", "data")}
    result, seen = run_build(data, repositories[:2])
    assert (result.ran, result.skipped, result.exit_code, seen.ran) == (0, 18, 0, [])
    assert fingerprint(data) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_a_build_with_nothing_to_do_imports_nothing_heavy(
    data: Path, repositories: Repositories, tmp_path: Path
) -> None:
    listed = write_list(tmp_path / "list", repositories[:2])
    arguments = ["build", "--repos", str(listed), "--out", str(data)]
    code = (
        "import sys; from codeflow.cli import cli; "
        f"cli.main({arguments!r}, standalone_mode=False); "
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert "nothing to do: all 18 units" in done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("override", "first", "untouched"),
    [
        ("filter.min_message_words=4", "decide", ["fetch", "mine", "sign", "cluster", "score"]),
        ("dedup.threshold=0.8", "cluster", ["fetch", "mine", "sign", "score"]),
        ("dedup.min_shingles=11", "sign", ["fetch", "mine", "score"]),
        ("mine.max_lines=300", "mine", ["fetch", "families", "survey"]),
        ("mine.min_commits=21", "survey", ["fetch", "families"]),
        ("pack.length=8192", "compose", ALL_STEPS[:9]),
        ("pack.group_tokens=8192", "pack", ALL_STEPS[:10]),
        ("tokenizer.vocab_size=1000", "tokenizer", ALL_STEPS[:8]),
        ("compose.max_messages=1", "compose", ALL_STEPS[:9]),
    ],
)
def test_a_changed_setting_redoes_what_uses_it(
    data: Path, repositories: Repositories, override: str, first: str, untouched: list[str]
) -> None:
    _, seen = run_build(data, repositories[:2], override)
    key, _, value = override.partition("=")
    assert [n for n in seen.notes if n.startswith(f"recipe changed: {key} ")] == seen.notes
    assert seen.notes[0].endswith(f" -> {value}")
    assert seen.steps[0] == first
    assert not set(seen.steps) & set(untouched)
    assert "pack" in seen.steps  # its manifest vouches for the recipe
    # And back: the same bytes as ever, so nothing depended on what was there before.
    run_build(data, repositories[:2], override)
    fresh = data.with_name("fresh")
    run_build(fresh, repositories[:2], override)
    assert fingerprint(fresh) == fingerprint(data)


def test_a_run_setting_redoes_nothing(data: Path, repositories: Repositories) -> None:
    result, seen = run_build(data, repositories[:2], "run.unit_seconds=50", "run.attempts=1")
    assert (result.ran, seen.notes) == (0, [])


def test_an_added_repository_runs_its_own_units_and_the_common_ones(
    data: Path, repositories: Repositories
) -> None:
    _, seen = run_build(data, repositories)
    assert seen.notes == ["list of repositories changed: 1 added, 0 removed"]
    own = [s for s, unit in seen.ran if unit.startswith("depot-")]
    assert own == PER_REPOSITORY
    others = {s for s, unit in seen.ran if unit.startswith(("ledger-", "stockroom-"))}
    # `decide` needs the common clusters, `compose` the common vocabulary.
    assert others <= {"decide", "compose"}
    assert {s for s, unit in seen.ran if unit == "all"} == {
        "families", "cluster", "tokenizer", "pack",
    }  # fmt: skip


def test_a_removed_repository_leaves_nothing_behind(
    data: Path, repositories: Repositories, tmp_path: Path
) -> None:
    _, seen = run_build(data, repositories[:1])
    assert seen.notes == [
        "list of repositories changed: 0 added, 1 removed with all their data: ledger"
    ]
    run_build(tmp_path / "fresh", repositories[:1])
    assert fingerprint(data) == fingerprint(tmp_path / "fresh")


@pytest.mark.parametrize(
    "options", [RunOptions(executor="local", workers=1), LOCAL], ids=["one worker", "two"]
)
def test_same_bytes_for_every_executor_number_of_workers_and_order_of_the_list(
    built: Path, repositories: Repositories, tmp_path: Path, options: RunOptions
) -> None:
    shuffled = random.Random(options.workers).sample(repositories[:2], 2)
    run_build(tmp_path / "data", [*reversed(shuffled), *shuffled], options=options)
    assert fingerprint(tmp_path / "data") == fingerprint(built)


@pytest.mark.parametrize("moment", ["sweep", "write_manifest"])
def test_a_manifest_vouches_for_finished_runs_only(
    data: Path, repositories: Repositories, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed after the last unit, a rebuild must still sweep and write a new manifest."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            run_build(data, repositories[:2], "dedup.threshold=0.8")
    assert not (data / "manifest.json").exists()
    result, _ = run_build(data, repositories[:2], "dedup.threshold=0.8")
    assert result.ran == 0
    fresh = data.with_name("fresh")
    run_build(fresh, repositories[:2], "dedup.threshold=0.8")
    assert fingerprint(data) == fingerprint(fresh)


# -- stages, plans and recipes --------------------------------------------------------------------


def test_stages_one_after_another_are_one_build(built: Path, repositories: Repositories) -> None:
    out = built.with_name("staged")
    run_build(out, repositories[:2], until="mine")
    for stage in STAGES[1:]:
        seen = Recorder()
        build(out, recipe(), None, seen, RunOptions(executor="inline"), stage)
        assert {s.stage for s in STEPS if s.name in seen.steps} == {stage}
    assert fingerprint(out) == fingerprint(built)


def test_an_unknown_stage_and_a_missing_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown stage `packs`\. Did you mean `pack`"):
        build(tmp_path, recipe(), None, Recorder(), until="packs")
    with pytest.raises(DatasetError, match="is not a codeflow dataset"):
        build(tmp_path / "x", recipe(), None, Recorder())


def test_a_plan_tells_what_will_run_and_writes_nothing(data: Path) -> None:
    nothing = {s.name: StepPlan(0, 1 if s.scope == "dataset" else 2) for s in STEPS}
    assert plan(data, recipe(), None) == Plan(nothing, (), ())
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    changed = plan(data, recipe("dedup.threshold=0.8"), None).steps
    assert {name: (s.to_run, s.bound) for name, s in changed.items() if s.to_run} == {
        "cluster": (1, "exactly"),
        "decide": (2, "at most"),
        "tokenizer": (1, "at most"),
        "compose": (2, "at most"),
        "pack": (1, "at most"),
    }
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before


def test_a_plan_counts_the_slices_it_knows(repositories: Repositories, tmp_path: Path) -> None:
    root = tmp_path / "data"
    sliced = ("mine.slice_commits=5",)
    run_build(root, repositories[:1], *sliced, until="mine")
    slices = len(Dataset.open(root).markers("mine"))
    assert slices > 2
    mined_anew = plan(root, recipe(*sliced, "mine.max_lines=300"), None).steps
    assert mined_anew["mine"] == StepPlan(slices, 0)
    assert mined_anew["score"] == StepPlan(slices, 0, "at most")
    sources = parse_sources([str(path) for path in repositories[:2]], "list")
    grown = plan(root, recipe(*sliced), sources)
    assert grown.steps["fetch"] == StepPlan(1, 1)
    assert grown.steps["survey"] == StepPlan(2, 0, "at most")
    assert grown.steps["mine"] == StepPlan(slices + 1, 0, "about")
    assert (grown.added, grown.removed) == (("ledger",), ())


def test_a_plan_refuses_what_a_build_refuses(
    data: Path, repositories: Repositories, tmp_path: Path
) -> None:
    sources = parse_sources([str(repositories[2])], "list")
    with pytest.raises(DatasetError, match=r"made with recipe `default`.*--replace-recipe"):
        plan(data, recipe("name=other"), sources)
    options = RunOptions(replace_recipe=True)
    planned = plan(data, recipe("name=other"), sources, options)
    assert (planned.added, planned.removed) == (("depot",), ("ledger", "stockroom"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(DatasetError, match="not a codeflow dataset and not empty"):
        plan(tmp_path / "foreign", recipe(), sources)


def test_a_plan_counts_what_options_would_run_again(data: Path) -> None:
    assert plan(data, recipe(), None, RunOptions(update=True)).steps["fetch"] == StepPlan(2, 0)
    dataset = Dataset.open(data)
    score = dataset.markers("score")[0]
    dataset.commit(replace(score, status="quarantined"))
    assert plan(data, recipe(), None).steps["score"] == StepPlan(0, 2)
    retried = plan(data, recipe(), None, RunOptions(retry_failed=True)).steps
    assert retried["score"] == StepPlan(1, 1)


# -- files that are gone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "cut", "step"),
    [
        ("tables/triples/ledger-*", 0, "mine"),
        ("tables/triples/ledger-*", 1, "mine"),
        ("tables/edges/*", 0, "cluster"),
        ("tables/tokenizer/*", 1, "tokenizer"),
        ("shards/*.parquet", 0, "pack"),
        ("shards/*.parquet", 1, "pack"),
        ("shards/manifest.json", 0, "pack"),
    ],
)
def test_a_unit_whose_file_is_gone_or_cut_is_done_again_to_the_same_bytes(
    data: Path, built: Path, pattern: str, cut: int, step: str
) -> None:
    (path,) = data.glob(pattern)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    else:
        path.unlink()
    assert summarize(Dataset.open(data), recipe()).update == f"codeflow pack {data}"
    seen = Recorder()
    result = build(data, recipe(), None, seen, RunOptions(executor="inline"))
    assert (seen.steps, result.ran) == ([step], 1)
    assert fingerprint(data) == fingerprint(built)


def test_the_advice_for_a_damaged_file_mends_it(data: Path, built: Path) -> None:
    (path,) = data.glob("tables/triples/ledger-*")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    advice = f"delete it, then run `codeflow pack {data} --failed`"
    filtered = recipe("filter.min_message_words=4")
    inline = RunOptions(executor="inline")
    result = build(data, filtered, None, Recorder(), inline, "filter")
    assert [m.step for m in result.quarantined] == ["decide"]
    assert advice in result.quarantined[0].reason
    with pytest.raises(DatasetError, match=re.escape(advice)):
        Dataset.open(data).read("triples")
    path.unlink()
    again = replace(inline, retry_failed=True)
    assert build(data, recipe(), None, Recorder(), again).exit_code == 0
    assert fingerprint(data) == fingerprint(built)


def test_a_recipe_of_another_name_needs_a_word(data: Path, repositories: Repositories) -> None:
    before = fingerprint(data)
    with pytest.raises(DatasetError, match=r"made with recipe `default`.*--replace-recipe"):
        run_build(data, repositories[:2], "name=other")
    assert fingerprint(data) == before
    assert Dataset.open(data).stored_recipe() == recipe()
    options = RunOptions(executor="inline", replace_recipe=True)
    _, seen = run_build(data, repositories[:2], "name=other", options=options)
    assert seen.steps == ["pack"]
    assert json.loads((data / "shards/manifest.json").read_text())["recipe"] == "other"
    assert Dataset.open(data).stored_recipe() == recipe("name=other")


def test_a_vocabulary_file_counts_by_its_content(
    data: Path, repositories: Repositories, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    shutil.copy(data / "shards/tokenizer.json", path)
    run_build(data, repositories[:2], f"tokenizer.path={path}")
    result, _ = run_build(data, repositories[:2], f"tokenizer.path={path}")
    assert result.ran == 0
    path.write_bytes(path.read_bytes().replace(b"<|fim_pad|>", b"<|fim_out|>"))
    _, seen = run_build(data, repositories[:2], f"tokenizer.path={path}")
    assert seen.steps == ["tokenizer", "compose", "pack"]
    with pytest.raises(UsageError, match=r"`tokenizer\.path`: cannot read .*absent: No such file"):
        run_build(data, repositories[:2], f"tokenizer.path={tmp_path / 'absent'}")


def test_a_moved_head_is_seen_with_update_alone(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r.git", 3, commits=40)
    run_build(tmp_path / "data", [repository])
    shutil.rmtree(repository)
    make_repository(repository, 3, commits=44)
    result, _ = run_build(tmp_path / "data", [repository])
    assert result.ran == 0
    options = RunOptions(executor="inline", update=True)
    _, seen = run_build(tmp_path / "data", [repository], options=options)
    assert "mine" in seen.steps
    run_build(tmp_path / "fresh", [repository])
    assert fingerprint(tmp_path / "data") == fingerprint(tmp_path / "fresh")


def test_the_recipe_a_dataset_was_made_with_can_be_read_back(built: Path) -> None:
    stored = Dataset.open(built).stored_recipe()
    assert stored == recipe()
    assert stored != Recipe()
