"""The story: which steps run, in which order, on which units, and what is skipped and why.

    fetch ─ families ─ survey ─ mine ─┬─ sign ── cluster ─┐
                                      └─ score ───────────┴─ decide ─ tokenizer ─ compose ─ pack

A step has one unit per repository, one per slice of a repository's mainline, or one for the whole
dataset (`steps.py`). A unit's fingerprint is a hash of the contents of its inputs, of the settings
the step uses, and of the step's version (`planning.py`); a marker with that fingerprint, and all
files that it names, mean done.
Everything else follows: a finished build has nothing to do, a changed setting redoes the steps that
use it and those whose input it changes, a killed run goes on where it was, and the same recipe
gives the same bytes with any number of workers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from codeflow.dataset import Dataset, Marker
from codeflow.errors import CodeflowError, DatasetError, UsageError, did_you_mean
from codeflow.exec import Limits, Outcome, Unit, make_executor
from codeflow.mine.sources import Source
from codeflow.planning import Known, Planned, is_done, plan_step, units_to_run
from codeflow.recipe import Recipe, changed_settings
from codeflow.settings import to_mapping
from codeflow.steps import STAGES, STEPS, Step
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
        _check_recipe(dataset, recipe, options)
        listed = _adopt(dataset, recipe, sources, progress)
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


@dataclass(frozen=True)
class StepPlan:
    """How many units of a step a build would run.

    Attributes:
        bound: `at most`: what runs before may turn out the same as it is. `about`: nor can the
            slices of repositories that no `survey` has seen be told; one each is counted.
    """

    to_run: int
    done: int
    bound: Literal["exactly", "at most", "about"] = "exactly"


@dataclass(frozen=True)
class Plan:
    """What a build would do.

    Attributes:
        steps: All steps by name, in their order.
        added: Names of repositories that are new to the dataset.
        removed: Names of repositories whose data would be deleted.
    """

    steps: dict[str, StepPlan]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def plan(
    root: AnyPath,
    recipe: Recipe,
    sources: Sequence[Source] | None,
    options: RunOptions = RunOptions(),
) -> Plan:
    """What `build` would do, as far as can be told now; nothing is written.

    Raises:
        DatasetError: The folder is no dataset, or is another recipe's.
    """
    dataset = Dataset.open(root) if sources is None else Dataset.find(root) or Dataset(root)
    _check_recipe(dataset, recipe, options)
    before = dataset.stored_sources()
    listed = _listed(dataset, before, sources)
    known = {step.name: dataset.markers(step.name) for step in STEPS}
    if options.update:
        known["fetch"] = []
    steps: dict[str, StepPlan] = {}
    for step in STEPS:
        pending = {need for need in step.needs if steps[need].to_run}
        if pending:
            steps[step.name] = _guess(step, listed, known, steps.get("survey"))
        else:
            planned = plan_step(known, recipe, listed, step)
            todo = units_to_run(dataset, planned, known[step.name], options.retry_failed)
            steps[step.name] = StepPlan(len(todo), len(planned) - len(todo))
    return Plan(steps, *_changes(before or [], listed))


def _guess(
    step: Step, listed: list[dict[str, Any]], known: Known, survey: StepPlan | None
) -> StepPlan:
    """All units of a step, as far as they can be counted before what it needs has run."""
    if step.scope == "dataset":
        return StepPlan(1, 0, "at most")
    if step.scope == "repo":
        return StepPlan(len(listed), 0, "at most")
    slices = {m.unit: len(m.facts.get("slices", ())) for m in known["survey"]}
    units = sum(slices.get(source["repo_id"], 1) for source in listed)
    surveyed = survey is not None and survey.to_run == 0
    return StepPlan(units, 0, "at most" if surveyed else "about")


def _last_step(stage: str) -> Step:
    return [step for step in STEPS if step.stage == stage][-1]


# What a step must give for the next ones to have anything to do.
_PRODUCTS = {"mine": "triples", "decide": "kept", "compose": "documents"}


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
        self.known: dict[str, list[Marker]] = {}
        self.totals: Counter[str] = Counter()

    def run(self, step: Step) -> None:
        planned = plan_step(self.known, self.recipe, self.sources, step)
        units = {p.unit for p in planned}
        before = self.dataset.markers(step.name)
        self.dataset.forget(step.name, {m.unit for m in before} - units)
        todo = units_to_run(self.dataset, planned, before, self.options.retry_failed)
        self.skipped += len(planned) - len(todo)
        if todo:
            # A manifest vouches for a finished run; the next one is written when this run ends.
            (self.dataset.root / "manifest.json").unlink(missing_ok=True)
            self.progress.step_started(step.name, len(todo), len(planned) - len(todo))
            self._execute(step, todo)
            before = self.dataset.markers(step.name)
        markers = self.known[step.name] = [m for m in before if m.unit in units]
        counts: Counter[str] = Counter()
        for marker in markers:
            counts.update(marker.counts)
        self.quarantined += [m for m in markers if m.status != "done"]
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
                        reason=_reason(outcome),
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
        markers = self.known[step.name]
        failed = [m for m in markers if m.status != "done"]
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
        useless = step.name in _PRODUCTS and not counts[_PRODUCTS[step.name]]
        if failed and (useless or len(failed) == len(markers)):
            share = "all" if len(failed) == len(markers) else f"{len(failed):,} of"
            raise CodeflowError(
                f"{share} {len(markers):,} {_plural(len(markers), 'unit')} of `{step.name}` "
                f"failed: {failed[0].reason}\n(run again with --failed once the cause is gone)"
            )
        if step.name == "mine" and not counts["triples"]:
            skipped = ", ".join(f"{k} {v}" for k, v in sorted(self.totals.items()) if v)
            raise CodeflowError(
                f"no triple was found ({skipped}): the histories are too short for this recipe; "
                "add repositories, or lower mine.min_commits or mine.min_lines with --set"
            )
        if step.name == "decide" and not counts["kept"]:
            reasons = _reasons(counts, "dropped_")
            raise CodeflowError(
                f"no triple was kept ({reasons}): see `codeflow show {self.dataset.root} "
                "decisions`, and relax the [filter] settings with --set"
            )
        if step.name == "compose" and not counts["documents"]:
            reasons = _reasons(counts, "rejected_")
            raise CodeflowError(f"no document fits a row ({reasons}): raise pack.length with --set")


# -- taking over recipe and sources --------------------------------------------------------------


def _source_record(source: Source) -> dict[str, Any]:
    return {
        "repo_id": source.repo_id,
        "name": source.name,
        "kind": source.kind,
        "location": source.location,
    }


def _check_recipe(dataset: Dataset, recipe: Recipe, options: RunOptions) -> None:
    stored = dataset.stored_recipe()
    if stored is not None and stored.name != recipe.name and not options.replace_recipe:
        raise DatasetError(
            f"{dataset.root} was made with recipe `{stored.name}`, this is `{recipe.name}`: name "
            "another folder, or turn the dataset over to the new recipe with --replace-recipe"
        )


def _listed(
    dataset: Dataset, before: list[dict[str, Any]] | None, sources: Iterable[Source] | None
) -> list[dict[str, Any]]:
    """The repositories that the dataset is to hold, by id; those it holds if no list is given."""
    if sources is not None:
        return sorted((_source_record(s) for s in sources), key=lambda s: str(s["repo_id"]))
    if before is None:
        raise DatasetError(
            f"{dataset.root} has no repositories yet: start with "
            f"`codeflow mine --repos list.txt --out {dataset.root}`"
        )
    return before


def _changes(
    before: list[dict[str, Any]], listed: list[dict[str, Any]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the repositories that are new, and of those that are no longer listed."""
    old = {s["repo_id"]: s["name"] for s in before}
    new = {s["repo_id"]: s["name"] for s in listed}
    added = tuple(name for repo, name in new.items() if repo not in old)
    return added, tuple(name for repo, name in old.items() if repo not in new)


def _adopt(
    dataset: Dataset, recipe: Recipe, sources: Iterable[Source] | None, progress: Progress
) -> list[dict[str, Any]]:
    """Compare recipe and sources with what the dataset was made from, say what changed, store."""
    stored = dataset.stored_recipe()
    for key, old, new in changed_settings(stored, recipe) if stored is not None else []:
        progress.note(f"recipe changed: {key} {_show(old)} -> {_show(new)}")
    if stored != recipe:
        dataset.store_recipe(recipe)
    before = dataset.stored_sources()
    listed = _listed(dataset, before, sources)
    if before is not None and before != listed:
        added, removed = _changes(before, listed)
        progress.note(
            f"list of repositories changed: {len(added)} added, {len(removed)} removed"
            + (f" with all their data: {some_names(removed)}" if removed else "")
        )
    if before != listed:
        dataset.store_sources(listed)
    return listed


# -- wording --------------------------------------------------------------------------------------


def some_names(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"


def _reasons(counts: Counter[str], prefix: str) -> str:
    """What the counts with this prefix say, most frequent first."""
    found = ((k.removeprefix(prefix), n) for k, n in counts.most_common() if k.startswith(prefix))
    return ", ".join(f"{name} {n:,}" for name, n in found if n)


def _reason(outcome: Outcome) -> str:
    """Why a unit has no result; that it failed is clear from where this is read."""
    prefix = "" if outcome.status == "failed" else f"{outcome.status}: "
    return prefix + outcome.reason


def _show(value: Any) -> str:
    return "(unset)" if value is None else json.dumps(value, ensure_ascii=False, default=str)
