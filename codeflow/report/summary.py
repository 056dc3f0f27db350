"""The numbers of a dataset, from its markers alone: fast enough to print after every run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from codeflow.dataset import Dataset
from codeflow.planning import out_of_date
from codeflow.recipe import Recipe
from codeflow.steps import STAGES, STEPS


@dataclass(frozen=True)
class Summary:
    """The funnel of a dataset: what its present recipe and repositories made of it.

    Attributes:
        repositories: Listed / mined / skipped (with reason) / failed (with reason).
        dropped: Triples by drop reason.
        rejected: Kept triples that gave no document, by reason.
        fill: Used part of the packed rows, 0-1.
        bytes: Size of all committed files.
        stages: What the numbers tell of; those of other stages are 0.
        out_of_date: Stages whose files are of an earlier recipe or list, or not finished.
        update: The command that brings them up to date, empty when none is out of date.
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
    row_length: int
    fill: float
    shards: int
    bytes: int
    stages: tuple[str, ...] = field(default=())
    out_of_date: tuple[str, ...] = field(default=())
    update: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(dataset: Dataset, recipe: Recipe) -> Summary:
    """Add up the counts of all finished units, of the steps that are up to date."""
    counts: dict[str, Counter[str]] = {step.name: Counter() for step in STEPS}
    failed: dict[str, str] = {}
    size = 0
    done = set()
    sources = dataset.stored_sources() or []
    known = {step.name: dataset.markers(step.name) for step in STEPS}
    stale = dict.fromkeys(step.stage for step in out_of_date(dataset, recipe, sources, known))
    for step in STEPS:
        for marker in known[step.name]:
            size += sum(f.bytes for f in marker.files)
            if step.stage in stale:
                continue
            if marker.status != "done":
                failed[f"{marker.step} {marker.unit}"] = marker.reason
                continue
            done.add(step.stage)
            counts[step.name].update(marker.counts)
    survey, mine, decide = counts["survey"], counts["mine"], counts["decide"]
    compose, pack = counts["compose"], counts["pack"]
    capacity = pack["capacity"]
    return Summary(
        folder=str(dataset.root),
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        repositories=len(sources),
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
        row_length=capacity // pack["rows"] if capacity else 0,
        fill=pack["tokens"] / capacity if capacity else 0.0,
        shards=pack["shards"],
        bytes=size,
        stages=tuple(stage for stage in STAGES if stage in done),
        out_of_date=tuple(stale),
        update=_update(dataset, tuple(stale)),
    )


def render(s: Summary, recipe: Recipe) -> str:
    """The summary for a person."""
    lines = [f"{s.folder} · recipe {s.recipe}@{s.recipe_hash[:8]}"]
    if "mine" in s.out_of_date:
        lines.append(_row("repositories", f"{s.repositories} listed", ""))
    else:
        lines += _mined(s, recipe)
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
        length = f"{s.row_length:,} tokens each, {100 * s.fill:.2f} % filled"
        lines.append(_row("rows", f"{s.rows:,}", length))
        files = f"{s.shards} file{'s' if s.shards != 1 else ''}"
        lines.append(
            _row("shards", files, f"{s.folder.rstrip('/')}/shards (all data: {_size(s.bytes)})")
        )
    for unit, reason in sorted(s.failed.items()):
        lines.append(f"  failed: {unit}: {reason}")
    if s.out_of_date:
        lines.append(f"  out of date: {', '.join(s.out_of_date)}: run `{s.update}`")
    return "\n".join(lines)


def _mined(s: Summary, recipe: Recipe) -> list[str]:
    window = f"{100 * recipe.mine.window_from:.0f}-{100 * recipe.mine.window_to:.0f} %"
    steps = f"{window} of {s.mainline_commits:,} mainline steps, their branches included"
    mined = f"{s.mined} mined of {s.repositories}"
    return [
        _row("repositories", mined, _reasons(s.skipped, "skipped ")),
        _row("commits", f"{s.commits:,} mined", steps),
        _row("triples", f"{s.triples:,} found", "each replayed: R_old + P = R_new"),
    ]


def _update(dataset: Dataset, stale: tuple[str, ...]) -> str:
    """The command of the last stage that is out of date; it runs the stages before, too."""
    if not stale:
        return ""
    # `mine` wants the list of repositories again; later stages take the dataset's own.
    return f"codeflow {'pack' if stale[-1] == 'mine' else stale[-1]} {dataset.root}"


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
