"""The steps of the pipeline: what each runs, on which units, and what its output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALL = "all"


@dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    Attributes:
        name: Also the name of its marker folder.
        stage: The command a user types to come as far as this step.
        run: The unit function, `module:function`.
        scope: `repo` has a unit per repository, `slice` one per slice that `survey` found (named
            `<repository>.<number>`), `dataset` has one unit, `all`.
        needs: Steps whose files and facts it reads; a repository's unit reads its own only. Of a
            dataset-wide step it gets the facts kept under its name in `by_repo`.
        settings: Recipe sections or keys that its output depends on.
        files: Settings that name a file; its content counts as a setting, too.
        version: Raise it when the same inputs and settings give other bytes than before.
    """

    name: str
    stage: str
    run: str
    scope: Literal["repo", "slice", "dataset"]
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    version: int = 1


STEPS = (
    Step("fetch", "mine", "codeflow.mine.fetch:run", "repo"),
    Step(
        "families", "mine", "codeflow.mine.families:run", "dataset",
        ("fetch",), ("mine.collapse_forks",),
    ),
    Step(
        "survey", "mine", "codeflow.mine.survey:run", "repo", ("fetch", "families"),
        ("mine.lifecycle", "mine.window_from", "mine.window_to", "mine.min_commits",
         "mine.slice_commits", "mine.max_blob_bytes"),
    ),
    Step(
        "mine", "mine", "codeflow.mine.run:run", "slice", ("fetch", "survey"), ("mine",), version=2
    ),
    Step("sign", "dedup", "codeflow.dedup.sign:run", "slice", ("mine",), ("dedup.min_shingles",)),
    Step("cluster", "dedup", "codeflow.dedup.cluster:run", "dataset", ("mine", "sign"), ("dedup",)),
    Step("score", "filter", "codeflow.filter.score:run", "slice", ("mine",)),
    Step(
        "decide", "filter", "codeflow.filter.decide:run", "slice",
        ("mine", "score", "cluster"), ("filter",),
    ),
    Step(
        "tokenizer", "compose", "codeflow.pack.vocabulary:run", "dataset",
        ("mine", "decide"), ("tokenizer",), ("tokenizer.path",),
    ),
    Step(
        "compose", "compose", "codeflow.compose.run:run", "slice",
        ("survey", "mine", "decide", "tokenizer"), ("compose", "pack.length"),
    ),
    Step(
        "pack", "pack", "codeflow.pack.run:run", "dataset", ("survey", "tokenizer", "compose"),
        # Its manifest vouches for the whole recipe by hash.
        ("name", "mine", "dedup", "filter", "tokenizer", "compose", "pack"),
        version=2,
    ),
)  # fmt: skip
STAGES = tuple(dict.fromkeys(step.stage for step in STEPS))
