"""From markers to units: what a step would run, on which inputs, under which fingerprint.

A unit's fingerprint is a hash of the contents of its input files, the facts it is told, the
settings its step uses, and the step's version. Nothing else may influence what it writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeflow.dataset import Dataset, Marker
from codeflow.errors import RecipeError
from codeflow.recipe import Recipe, digest
from codeflow.steps import ALL, STEPS, Step

Known = Mapping[str, Sequence[Marker]]  # markers by step, in unit order


@dataclass(frozen=True)
class Planned:
    unit: str
    fingerprint: str
    inputs: dict[str, list[str]]
    facts: dict[str, Any]
    weight: float


def plan_step(
    known: Known, recipe: Recipe, sources: list[dict[str, Any]], step: Step
) -> list[Planned]:
    """The units of a step, from the markers of the steps it needs.

    A repository without a finished upstream unit has no unit here: its absence is what the
    dataset-wide steps see, too.
    """
    settings = recipe.part(step.settings) | _file_hashes(recipe, step)
    base = [step.name, step.version, settings]
    upstream = {need: _by_repository(known, need, sources) for need in step.needs}
    if step.scope == "dataset":
        return [
            _planned(ALL, base, {}, [m for n in upstream.values() for ms in n.values() for m in ms])
        ]
    planned = []
    for source in sources:
        repo = source["repo_id"]
        found = {need: units.get(ALL, units.get(repo, [])) for need, units in upstream.items()}
        if not all(found.values()):
            continue
        markers = [m for ms in found.values() for m in ms]
        if step.scope == "repo":
            planned.append(_planned(repo, base, source, markers))
        elif step.name == "mine":
            slices = next(m.facts["slices"] for m in markers if m.step == "survey")
            for number, bounds in enumerate(slices):
                facts = source | {"slice": bounds}
                planned.append(_planned(f"{repo}.{number:04d}", [*base, bounds], facts, markers))
        else:  # a slice of what `mine` made of it
            sliced = [m for m in markers if "." in m.unit.removeprefix(repo)]
            for unit in [m.unit for m in found["mine"]]:
                own = [m for m in markers if m not in sliced or m.unit == unit]
                if {m.step for m in own} == set(step.needs):
                    planned.append(_planned(unit, base, source, own))
    return planned


def _planned(unit: str, base: list[Any], facts: dict[str, Any], markers: list[Marker]) -> Planned:
    """One unit: its fingerprint, its input files, and the facts it is told."""
    repo = facts.get("repo_id", ALL)
    identity: list[Any] = []
    inputs: dict[str, list[str]] = {}
    told: dict[str, Any] = {}
    weight = 1.0
    for marker in markers:
        contents = sorted((f.table, f.sha256) for f in marker.files)
        known = marker.facts
        if marker.unit == ALL:
            known = marker.facts.get("by_repo", {}).get(repo, {})
        identity.append([marker.step, marker.unit, contents, known])
        if repo != ALL:
            told |= known
        elif known:
            told.setdefault("repos", {}).setdefault(marker.unit, {}).update(known)
        for file in marker.files:
            inputs.setdefault(file.table, []).append(file.path)
            weight += file.bytes
    if "slice" in facts:
        weight = facts["slice"][1] - facts["slice"][0]
    source = {} if markers else facts  # later steps know the source through the facts of `fetch`
    return Planned(unit, digest([*base, source, identity]), inputs, facts | told, weight)


def _by_repository(
    known: Known, step_name: str, sources: list[dict[str, Any]]
) -> dict[str, list[Marker]]:
    """Finished units of a step by repository (`all` for a dataset-wide one), in source order."""
    step = next(s for s in STEPS if s.name == step_name)
    names = [s["repo_id"] for s in sources] if step.scope != "dataset" else [ALL]
    result: dict[str, list[Marker]] = {name: [] for name in names}
    for marker in known[step_name]:
        repo = marker.unit.rpartition(".")[0] if step.scope == "slice" else marker.unit
        if marker.status == "done" and repo in result:
            result[repo].append(marker)
    return result


def _file_hashes(recipe: Recipe, step: Step) -> dict[str, str]:
    hashes = {}
    for key, path in recipe.part(step.files).items():
        if path is not None:
            try:
                hashes[f"{key} content"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as e:
                raise RecipeError(f"`{key}`: cannot read {path}: {e.strerror}") from e
    return hashes


def is_done(marker: Marker | None, planned: Planned) -> bool:
    return marker is not None and marker.fingerprint == planned.fingerprint


def units_to_run(
    dataset: Dataset,
    planned: Iterable[Planned],
    markers: Iterable[Marker],
    retry_failed: bool = False,
) -> list[Planned]:
    """Those of a step's units that no marker covers, or whose files are gone.

    Args:
        retry_failed: Count units that were quarantined, too.
    """
    found = {m.unit: m for m in dataset.whole(markers) if m.status == "done" or not retry_failed}
    return [p for p in planned if not is_done(found.get(p.unit), p)]


def out_of_date(
    dataset: Dataset, recipe: Recipe, sources: list[dict[str, Any]], known: Known
) -> list[Step]:
    """The steps that left something which this recipe and these sources would make anew.

    A step after one that would run counts, too: what it would read cannot be known before.
    """
    current: set[str] = set()
    for step in STEPS:
        if current.issuperset(step.needs) and _is_current(dataset, recipe, sources, known, step):
            current.add(step.name)
    return [step for step in STEPS if known[step.name] and step.name not in current]


def _is_current(
    dataset: Dataset, recipe: Recipe, sources: list[dict[str, Any]], known: Known, step: Step
) -> bool:
    try:
        planned = plan_step(known, recipe, sources, step)
    except RecipeError:  # a vocabulary file that is gone says nothing about what was made from it
        return True
    markers = known[step.name]
    obsolete = {m.unit for m in markers} - {p.unit for p in planned}
    return not obsolete and not units_to_run(dataset, planned, markers)
