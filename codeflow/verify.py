"""`codeflow verify`: every committed file is what it was, every triple is what it claims."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from codeflow.dataset import Dataset
from codeflow.exec import Limits, Unit, make_executor
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
    """

    files: int
    triples: int
    proven: int
    complete: int
    problems: tuple[str, ...]


def verify(dataset: Dataset, workers: int, executor: str = "local") -> Verification:
    """Check every checksum of a dataset and replay every triple, one unit a repository."""
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
    units = []
    for marker in markers:
        if marker.step == "mine":
            inputs: dict[str, list[str]] = {}
            for file in marker.files:
                inputs.setdefault(file.table, []).append(file.path)
            args = {"root": absolute(dataset.root), "unit": marker.unit, "inputs": inputs}
            weight = sum(f.bytes for f in marker.files)
            func = "codeflow.mine.replay:verify_repository"
            units.append(Unit(marker.unit, func, args, weight))
    triples = proven = complete = 0
    with make_executor(executor, workers, Limits()) as running:
        for outcome in sorted(running.run(units), key=lambda o: o.unit_id):
            if outcome.status != "done":
                problems.append(f"{outcome.unit_id}: {outcome.status}: {outcome.reason}")
                continue
            result: dict[str, Any] = outcome.result
            triples += result["triples"]
            proven += result["proven"]
            complete += result["complete"]
            problems += [f"{outcome.unit_id} triple {t}: {what}" for t, what in result["problems"]]
    return Verification(files, triples, proven, complete, tuple(problems))


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
