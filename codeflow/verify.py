"""`codeflow verify`: every committed file is what it was, every triple is what it claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from codeflow.dataset import Dataset, Marker, remake
from codeflow.errors import DatasetError
from codeflow.exec import Limits, Outcome, Unit, make_executor
from codeflow.storage import absolute, sha256_of


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong.

    Attributes:
        files: Files whose sha256 was compared.
        triples: Triples replayed.
        proven: Triples with R_old + P = R_new.
        complete: Triples whose patch alone leads to R_new.
        problems: One sentence each: which file or triple, and what.
        git_checked: Triples of the sample that the git command replayed.
        git_agreed: Those where it came to R_new, too.
        remedy: How to get damaged or missing files again; empty when there are none.
    """

    files: int
    triples: int
    proven: int
    complete: int
    problems: tuple[str, ...]
    git_checked: int = 0
    git_agreed: int = 0
    remedy: str = ""


def verify(
    dataset: Dataset, workers: int, executor: str = "local", git_sample: int = 0
) -> Verification:
    """Check every checksum of a dataset and replay every triple, one unit a mined part.

    Args:
        git_sample: Triples that the git command replays besides; only those whose patch is
            complete can be.
    """
    problems: list[str] = []
    files = 0
    markers = [m for m in dataset.all_markers() if m.status == "done"]
    for file in (f for m in markers for f in m.files):
        files += 1
        found = sha256_of(dataset.root / file.path)
        if found != file.sha256:
            what = "is missing" if found is None else "has changed since it was written"
            problems.append(f"{file.path} {what}")
    problems += _check_shards(dataset)
    remedy = _remedy(dataset) if problems else ""
    mined = [m for m in markers if m.step == "mine"]
    with make_executor(executor, workers, Limits()) as running:
        units = [_unit(dataset, m, "codeflow.mine.replay:verify_repository") for m in mined]
        replayed, wrong = _results(running.run(units))
        problems += wrong
        units = []
        for marker, chosen in _sampled(dataset, mined, git_sample):
            func = "codeflow.mine.gitproof:prove_with_git"
            units.append(_unit(dataset, marker, func, triples=chosen))
        by_git, wrong = _results(running.run(units)) if units else ([], [])
        problems += wrong
    return Verification(
        files,
        triples=sum(r["triples"] for r in replayed),
        proven=sum(r["proven"] for r in replayed),
        complete=sum(r["complete"] for r in replayed),
        problems=tuple(problems),
        git_checked=sum(r["checked"] for r in by_git),
        git_agreed=sum(r["agreed"] for r in by_git),
        remedy=remedy,
    )


def _remedy(dataset: Dataset) -> str:
    return (
        f"delete the files below {dataset.root} that are damaged, then run "
        f"{remake(dataset.root)}: it makes what is missing again"
    )


def _unit(dataset: Dataset, marker: Marker, func: str, **more: Any) -> Unit:
    inputs: dict[str, list[str]] = {}
    for file in marker.files:
        inputs.setdefault(file.table, []).append(file.path)
    args = {"root": absolute(dataset.root), "unit": marker.unit, "inputs": inputs, **more}
    return Unit(marker.unit, func, args, sum(f.bytes for f in marker.files))


def _results(outcomes: Iterable[Outcome]) -> tuple[list[dict[str, Any]], list[str]]:
    """What the units found, by unit, and their problems as sentences."""
    results: list[dict[str, Any]] = []
    problems = []
    for outcome in sorted(outcomes, key=lambda o: o.unit_id):
        if outcome.status != "done":
            problems.append(f"{outcome.unit_id}: {outcome.status}: {outcome.reason}")
            continue
        results.append(outcome.result)
        found = outcome.result["problems"]
        problems += [f"{outcome.unit_id} triple {t}: {what}" for t, what in found]
    return results, problems


def _sampled(
    dataset: Dataset, mined: list[Marker], size: int
) -> Iterator[tuple[Marker, list[str]]]:
    """The parts that hold chosen triples, and which; unreadable ones are a problem already."""
    from codeflow.mine.gitproof import choose
    from codeflow.work import read_files

    columns = ["repo_id", "triple_id", "patch_complete"]
    candidates: list[tuple[Marker, str, str]] = []
    for marker in mined if size else []:
        paths = [dataset.root / f.path for f in marker.files if f.table == "triples"]
        try:
            rows = read_files(paths, "triples", columns).to_pylist()
        except DatasetError:
            continue
        candidates += [(marker, r["repo_id"], r["triple_id"]) for r in rows if r["patch_complete"]]
    chosen = choose([(repo, triple) for _, repo, triple in candidates], size)
    by_unit: dict[str, list[str]] = {}
    for marker, _, triple in candidates:
        if triple in chosen:
            by_unit.setdefault(marker.unit, []).append(triple)
    for marker in mined:
        if marker.unit in by_unit:
            yield marker, by_unit[marker.unit]


def _check_shards(dataset: Dataset) -> list[str]:
    """The shards folder must also hold for someone who copies nothing but that folder."""
    if dataset.marker("pack", "all") is None:
        return []
    folder = dataset.root / "shards"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {s["file"]: s["sha256"] for s in manifest["shards"]}
        expected[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [f"shards/manifest.json cannot be used: {e!r}"]
    return [
        f"shards/{name} is missing or not what shards/manifest.json says"
        for name, sha256 in expected.items()
        if sha256_of(folder / name) != sha256
    ]
