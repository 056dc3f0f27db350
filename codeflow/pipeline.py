"""The story: which steps run, in which order, on which units, and what is skipped and why.

    fetch ─ families ─ survey ─ mine ─┬─ sign ── cluster ─┐
                                      └─ score ───────────┴─ decide ─ tokenizer ─ compose ─ pack

A step has one unit per repository, one per slice of a repository's mainline, or one for the whole
dataset (`steps.py`). A unit's fingerprint is a hash of the contents of its inputs, of the settings
the step uses, and of the step's version (`planning.py`); a marker with that fingerprint means done.
Everything else follows: a finished build has nothing to do, a changed setting redoes the steps that
use it and those whose input it changes, a killed run goes on where it was, and the same recipe
gives the same bytes with any number of workers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from codeflow.dataset import Dataset, Marker
from codeflow.errors import CodeflowError, DatasetError, UsageError, did_you_mean
from codeflow.exec import Limits, Outcome, Unit, make_executor
from codeflow.mine.sources import Source
from codeflow.planning import Planned, is_done, plan_step
from codeflow.recipe import Recipe, changed_settings
from codeflow.settings import to_mapping
from codeflow.steps import ALL, STAGES, STEPS, Step
from codeflow.storage import AnyPath, absolute


class Progress(Protocol):
    """Told what happens, for whoever watches."""

    def note(self, text: str) -> None: ...

    def step_started(self, step: str, todo: int, done_before: int) -> None: ...

    def unit_ended(self, outcome: Outcome) -> None: ...

    def step_ended(self, step: str, counts: dict[str, int]) -> None: ...


@dataclass(frozen=True)
class BuildResult:
    """What a run did.

    Attributes:
        ran: Units computed in this run.
        skipped: Units that were done before.
        quarantined: Units without a result, with the reason.
    """

    ran: int
    skipped: int
    quarantined: tuple[Marker, ...]

    @property
    def exit_code(self) -> int:
        return 3 if self.quarantined else 0


@dataclass(frozen=True)
class RunOptions:
    """How to run; never changes what comes out.

    Attributes:
        executor: `local`, `inline` or `ray`.
        workers: Units at work at the same time.
        address: The Ray cluster, `host:port` or `auto`; only for `ray`.
        retry_failed: Run quarantined units again.
        update: Pin the heads of all repositories anew (remote ones are cloned again).
        replace_recipe: Turn a dataset of one recipe over to another.
    """

    executor: str = "local"
    workers: int = 1
    address: str | None = None
    retry_failed: bool = False
    update: bool = False
    replace_recipe: bool = False


def build(
    root: AnyPath,
    recipe: Recipe,
    sources: Sequence[Source] | None,
    progress: Progress,
    options: RunOptions = RunOptions(),
    until: str = "pack",
) -> BuildResult:
    """Bring a dataset up to date with its recipe and sources, as far as one stage.

    Args:
        root: The dataset folder.
        recipe: What to make.
        sources: The repositories; None: those the dataset was made from.
        until: Last stage to run, one of `STAGES`.

    Raises:
        DatasetError: The folder is no dataset, is another recipe's, is in use, or its disk is full.
        CodeflowError: No repository could be mined, no triple was kept, or a dataset-wide step
            failed.
    """
    if until not in STAGES:
        raise UsageError(f"unknown stage `{until}`. {did_you_mean(until, STAGES)}")
    dataset = Dataset.create(root) if sources is not None else Dataset.open(root)
    limits = Limits(recipe.run.unit_seconds, recipe.run.unit_memory_mib << 20, recipe.run.attempts)
    with dataset.locked():
        listed = _adopt(dataset, recipe, sources, options, progress)
        if options.update:
            dataset.forget("fetch", [source["repo_id"] for source in listed])
        with make_executor(options.executor, options.workers, limits, options.address) as executor:
            runner = _Runner(dataset, recipe, listed, options, executor.run, progress)
            for step in STEPS:
                runner.run(step)
                if step.stage == until and step is _last_step(until):
                    break
        dataset.sweep()  # even where nothing ran: the run before may have died right here
        dataset.write_manifest(recipe)
        dataset.close_journal()
    return BuildResult(runner.ran, runner.skipped, tuple(runner.quarantined))


def plan(
    root: AnyPath, recipe: Recipe, sources: Sequence[Source] | None
) -> dict[str, tuple[int, int]]:
    """How many units of each step would run and how many are done, as far as can be told now.

    A step whose inputs must be computed first counts all its units as to run. Nothing is written.
    """
    exists = (root / "codeflow.json").exists()
    dataset = Dataset(root)
    if sources is not None:
        listed = [_source_record(s) for s in sources]
    else:
        listed = Dataset.open(root).stored_sources() or []
    result: dict[str, tuple[int, int]] = {}
    pending: set[str] = set()
    for step in STEPS:
        # One slice a repository until the survey says more.
        units = [ALL] if step.scope == "dataset" else [s["repo_id"] for s in listed]
        if not exists or pending & set(step.needs):
            result[step.name] = (len(units), 0)
        else:
            planned = plan_step(dataset, recipe, listed, step)
            todo = sum(not is_done(dataset.marker(step.name, p.unit), p) for p in planned)
            result[step.name] = (todo, len(planned) - todo)
        if result[step.name][0]:
            pending.add(step.name)
    return result


def _last_step(stage: str) -> Step:
    return [step for step in STEPS if step.stage == stage][-1]


class _Runner:
    """Runs steps one after another and keeps the tally."""

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        sources: list[dict[str, Any]],
        options: RunOptions,
        execute: Any,
        progress: Progress,
    ) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.sources = sources
        self.options = options
        self.execute = execute
        self.progress = progress
        self.ran = 0
        self.skipped = 0
        self.quarantined: list[Marker] = []
        self.totals: Counter[str] = Counter()

    def run(self, step: Step) -> None:
        planned = {p.unit: p for p in plan_step(self.dataset, self.recipe, self.sources, step)}
        before = {m.unit: m for m in self.dataset.markers(step.name)}
        self.dataset.forget(step.name, before.keys() - planned.keys())
        todo = []
        for unit, p in planned.items():
            marker = before.get(unit)
            retry = marker is not None and marker.status != "done" and self.options.retry_failed
            if not is_done(marker, p) or retry:
                todo.append(p)
        self.skipped += len(planned) - len(todo)
        if todo:
            # A manifest vouches for a finished run; the next one is written when this run ends.
            (self.dataset.root / "manifest.json").unlink(missing_ok=True)
            self.progress.step_started(step.name, len(todo), len(planned) - len(todo))
            self._execute(step, todo)
        counts: Counter[str] = Counter()
        for marker in self.dataset.markers(step.name):
            counts.update(marker.counts)
            if marker.status != "done":
                self.quarantined.append(marker)
        if todo:
            self.progress.step_ended(step.name, dict(counts))
        self.totals += counts
        self._check(step, counts)

    def _execute(self, step: Step, todo: list[Planned]) -> None:
        mapping = to_mapping(self.recipe)
        # How the pinned head came about is no part of what it is: not in the fingerprint.
        extra = {"update": True} if step.name == "fetch" and self.options.update else {}
        units = [
            Unit(
                p.unit,
                "codeflow.work:run_unit",
                {
                    "root": absolute(self.dataset.root),
                    "step": step.name,
                    "unit": p.unit,
                    "fingerprint": p.fingerprint,
                    "run": step.run,
                    "inputs": p.inputs,
                    "facts": p.facts | extra,
                    "recipe": mapping,
                },
                p.weight,
            )
            for p in todo
        ]
        by_unit = {p.unit: p for p in todo}
        for outcome in self.execute(units):
            planned = by_unit[outcome.unit_id]
            self.ran += 1
            self.dataset.journal(
                time=round(time.time(), 3),
                step=step.name,
                unit=outcome.unit_id,
                status=outcome.status,
                reason=outcome.reason,
                seconds=round(outcome.seconds, 3),
                peak_rss=outcome.peak_rss,
                attempts=outcome.attempts,
            )
            if outcome.status == "disk_full":
                raise DatasetError(
                    f"no space left on the disk of {self.dataset.root} ({step.name} of "
                    f"{outcome.unit_id}): free some and run the same command again; "
                    "finished units are kept"
                )
            if outcome.status != "done":
                self.dataset.commit(
                    Marker(
                        step.name,
                        outcome.unit_id,
                        planned.fingerprint,
                        status="quarantined",
                        reason=f"{outcome.status}: {outcome.reason}",
                    )
                )
            elif not is_done(self.dataset.marker(step.name, outcome.unit_id), planned):
                raise DatasetError(
                    f"{step.name} of {outcome.unit_id} is done, but {self.dataset.root} does not "
                    "show it: the machine that ran it has another folder under this name. Every "
                    "node must see the dataset on a file system that all of them share"
                )
            self.progress.unit_ended(outcome)

    def _check(self, step: Step, counts: Counter[str]) -> None:
        """Stop with a sentence where going on would only fail further down."""
        failed = [m for m in self.quarantined if m.step == step.name]
        if step.scope == "dataset" and failed:
            raise CodeflowError(
                f"{step.name} failed: {failed[0].reason}\n"
                "(run again with --failed once the cause is gone)"
            )
        if step.name in ("fetch", "survey") and len(self.quarantined) == len(self.sources):
            places = {source["repo_id"]: source["location"] for source in self.sources}
            reasons = "\n".join(f"  {places[m.unit]}: {m.reason}" for m in self.quarantined)
            raise CodeflowError(
                f"no repository could be mined:\n{reasons}\n"
                "(run again with --failed once the cause is gone)"
            )
        if step.name == "mine" and failed and not counts["triples"]:
            reasons = "\n".join(f"  {m.unit}: {m.reason}" for m in failed)
            raise CodeflowError(f"no triple was found, because mining failed:\n{reasons}")
        if step.name == "mine" and not counts["triples"]:
            skipped = ", ".join(f"{k} {v}" for k, v in sorted(self.totals.items()) if v)
            raise CodeflowError(
                f"no triple was found ({skipped}): the histories are too short for this recipe; "
                "add repositories, or lower mine.min_commits or mine.min_lines with --set"
            )
        if step.name == "decide" and not counts["kept"]:
            reasons = ", ".join(
                f"{k.removeprefix('dropped_')} {v}" for k, v in counts.most_common()
            )
            raise CodeflowError(
                f"no triple was kept ({reasons}): see `codeflow show {self.dataset.root} "
                "decisions`, and relax the [filter] settings with --set"
            )
        if step.name == "compose" and not counts["documents"]:
            reasons = ", ".join(
                f"{k.removeprefix('rejected_')} {v}" for k, v in counts.most_common()
            )
            raise CodeflowError(f"no document fits a row ({reasons}): raise pack.length with --set")


# -- taking over recipe and sources --------------------------------------------------------------


def _source_record(source: Source) -> dict[str, Any]:
    return {
        "repo_id": source.repo_id,
        "name": source.name,
        "kind": source.kind,
        "location": source.location,
    }


def _adopt(
    dataset: Dataset,
    recipe: Recipe,
    sources: Iterable[Source] | None,
    options: RunOptions,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Compare recipe and sources with what the dataset was made from, say what changed, store."""
    stored = dataset.stored_recipe()
    if stored is not None and stored.name != recipe.name and not options.replace_recipe:
        raise DatasetError(
            f"{dataset.root} was made with recipe `{stored.name}`, this is `{recipe.name}`: name "
            "another folder, or turn the dataset over to the new recipe with --replace-recipe"
        )
    for key, old, new in changed_settings(stored, recipe) if stored is not None else []:
        progress.note(f"recipe changed: {key} {_show(old)} -> {_show(new)}")
    if stored != recipe:
        dataset.store_recipe(recipe)
    before = dataset.stored_sources()
    if sources is None:
        if before is None:
            raise DatasetError(
                f"{dataset.root} has no repositories yet: start with "
                f"`codeflow mine --repos list.txt --out {dataset.root}`"
            )
        return before
    listed = sorted((_source_record(s) for s in sources), key=lambda s: str(s["repo_id"]))
    if before is not None and before != listed:
        old_ids = {s["repo_id"] for s in before}
        new_ids = {s["repo_id"] for s in listed}
        added, removed = len(new_ids - old_ids), len(old_ids - new_ids)
        progress.note(f"list of repositories changed: {added} added, {removed} removed")
    if before != listed:
        dataset.store_sources(listed)
    return listed


def _show(value: Any) -> str:
    return "(unset)" if value is None else str(value)
