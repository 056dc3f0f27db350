"""The numbers of a dataset, from its markers alone: fast enough to print after every run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from codeflow.dataset import Dataset
from codeflow.recipe import Recipe
from codeflow.steps import STEPS


@dataclass(frozen=True)
class Summary:
    """The funnel of a dataset.

    Attributes:
        repositories: Listed / mined / skipped (with reason) / failed (with reason).
        dropped: Triples by drop reason.
        rejected: Kept triples that gave no document, by reason.
        fill: Used part of the packed rows, 0-1.
        bytes: Size of all committed files.
    """

    folder: str
    recipe: str
    recipe_hash: str
    repositories: int
    mined: int
    skipped: dict[str, int]
    failed: dict[str, str]
    mainline_commits: int
    commits: int
    triples: int
    kept: int
    dropped: dict[str, int]
    documents: int
    rejected: dict[str, int]
    context_files: int
    context_dropped: int
    vocab_size: int
    tokens: int
    rows: int
    fill: float
    shards: int
    bytes: int
    stages: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(dataset: Dataset, recipe: Recipe) -> Summary:
    """Add up the counts of all finished units."""
    counts: dict[str, Counter[str]] = {step.name: Counter() for step in STEPS}
    failed: dict[str, str] = {}
    size = 0
    done = set()
    for marker in dataset.all_markers():
        if marker.status != "done":
            failed[f"{marker.step} {marker.unit}"] = marker.reason
            continue
        done.add(marker.step)
        counts[marker.step].update(marker.counts)
        size += sum(f.bytes for f in marker.files)
    survey, mine, decide = counts["survey"], counts["mine"], counts["decide"]
    compose, pack = counts["compose"], counts["pack"]
    listed = len(dataset.stored_sources() or [])
    capacity = pack["capacity"]
    return Summary(
        folder=str(dataset.root),
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        repositories=listed,
        mined=survey["mined"],
        skipped=_with_prefix(survey, "skipped_"),
        failed=failed,
        mainline_commits=survey["mainline_commits"],
        commits=mine["window_commits"],
        triples=mine["triples"],
        kept=decide["kept"],
        dropped=_with_prefix(decide, "dropped_"),
        documents=compose["documents"],
        rejected=_with_prefix(compose, "rejected_"),
        context_files=compose["context_files"],
        context_dropped=compose["context_dropped"],
        vocab_size=counts["tokenizer"]["vocab_size"],
        tokens=pack["tokens"],
        rows=pack["rows"],
        fill=pack["tokens"] / capacity if capacity else 0.0,
        shards=pack["shards"],
        bytes=size,
        stages=tuple(dict.fromkeys(s.stage for s in STEPS if s.name in done)),
    )


def render(s: Summary, recipe: Recipe) -> str:
    """The summary for a person."""
    lines = [
        f"{s.folder} · recipe {s.recipe}@{s.recipe_hash[:8]}",
        _row(
            "repositories", f"{s.mined} mined of {s.repositories}", _reasons(s.skipped, "skipped ")
        ),
        _row(
            "commits",
            f"{s.commits:,} mined",
            f"{100 * recipe.mine.window_from:.0f}-{100 * recipe.mine.window_to:.0f} % of "
            f"{s.mainline_commits:,} mainline steps, their branches included",
        ),
        _row("triples", f"{s.triples:,} found", "each replayed: R_old + P = R_new"),
    ]
    if "filter" in s.stages:
        lines.append(_row("", f"{s.kept:,} kept", ""))
        dropped = sum(s.dropped.values())
        lines.append(_row("", f"{dropped:,} dropped", _reasons(s.dropped)))
    if "compose" in s.stages:
        context = f"{s.context_files:,} old files shown, {s.context_dropped:,} left out to fit"
        lines.append(_row("documents", f"{s.documents:,}", context))
        if s.rejected:
            lines.append(_row("", f"{sum(s.rejected.values()):,} rejected", _reasons(s.rejected)))
    if "pack" in s.stages:
        lines.append(_row("tokens", f"{s.tokens:,}", f"vocabulary of {s.vocab_size:,}"))
        length = f"{recipe.pack.length:,} tokens each, {100 * s.fill:.2f} % filled"
        lines.append(_row("rows", f"{s.rows:,}", length))
        files = f"{s.shards} file{'s' if s.shards != 1 else ''}"
        lines.append(
            _row("shards", files, f"{s.folder.rstrip('/')}/shards (all data: {_size(s.bytes)})")
        )
    for unit, reason in sorted(s.failed.items()):
        lines.append(f"  failed: {unit}: {reason}")
    return "\n".join(lines)


def _with_prefix(counts: Counter[str], prefix: str) -> dict[str, int]:
    found = {k.removeprefix(prefix): v for k, v in counts.items() if k.startswith(prefix) and v}
    return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def _row(label: str, value: str, note: str) -> str:
    return f"  {label:<13} {value:<22} {note}".rstrip()


def _reasons(counts: dict[str, int], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name} {n:,}" for name, n in counts.items())


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
