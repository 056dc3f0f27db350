"""From what a user says (size, recipe, `--set`) to a run whose stages fit their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeflow.errors import RecipeError, UsageError, did_you_mean
from codeflow.load import Manifest, read_manifest
from codeflow.settings import build, read_toml, to_mapping, with_overrides
from codeflow.train.config import SIZES, ModelConfig
from codeflow.train.hf import read_hf_config
from codeflow.train.recipe import RunConfig, Stage, StageSettings, TrainConfig
from codeflow.train.vocabulary import TOKENIZER, require_same_tokens

DEFAULT_STEPS = 200
"""Length of a run without stages that says nothing about it."""

HOLDOUT, HOLDOUT_ROWS, HOLDOUT_FROM = 0.05, 500, 50
"""Where nothing is said: this share of the rows is held out, no more than so many, if there are
enough. A loss over 500 rows is sharp enough; of a few rows, each is needed for training."""

_SAME_THING = (
    {"steps", "tokens"},
    {"batch_rows", "batch_tokens"},
    {"decay_steps", "decay_share"},
)
"""Settings of a stage that say one thing in two units."""

_OF_DATASETS = ("mine", "dedup", "filter", "tokenizer", "compose", "pack")
"""Sections of the other kind of recipe, which is easily given for one of this kind."""

_INHERITED = tuple(f.name for f in dataclasses.fields(StageSettings))


@dataclass(frozen=True)
class StagePlan:
    """A stage with its data, in numbers.

    Attributes:
        stage: Its settings, what it takes from `[train]` filled in.
        manifest: Its data.
        first: Step of the run it starts after; its own steps are `first` + 1 to `end`.
        steps: Optimizer updates.
        batch_rows: Rows of one step, over all processes.
    """

    stage: Stage
    manifest: Manifest
    first: int
    steps: int
    batch_rows: int

    @property
    def end(self) -> int:
        """Step of the run that is its last."""
        return self.first + self.steps

    @property
    def row_length(self) -> int:
        """Most tokens that a row of it has."""
        return min(self.stage.max_length or self.manifest.length, self.manifest.length)

    @property
    def tokens(self) -> int:
        """Tokens of the stage, estimated by the mean row."""
        return round(self.steps * self.batch_rows * _row_tokens(self.stage, self.manifest))

    @property
    def holdout(self) -> float:
        """Share of its rows that is kept from training."""
        if self.stage.holdout is not None:
            return self.stage.holdout
        rows = self.manifest.rows
        return min(HOLDOUT, HOLDOUT_ROWS / rows) if rows >= HOLDOUT_FROM else 0.0

    @property
    def epochs(self) -> float:
        """How often it goes through its training rows."""
        rows = max(1, round(self.manifest.rows * (1 - self.holdout)))
        return self.steps * self.batch_rows / rows


@dataclass(frozen=True)
class Run:
    """All that a run is."""

    model: ModelConfig
    train: TrainConfig
    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        return self.stages[-1].end

    def require_stage(self, saved: Mapping[str, Any], step: int, checkpoint: Path) -> None:
        """Refuse to go on in a stage that began elsewhere, or that now ends before.

        Args:
            saved: `name` of the checkpoint's stage, and `first`, the step it began after.
            step: Of the checkpoint.
            checkpoint: For the message.

        Raises:
            UsageError: It says which stages there are.
        """
        now = {plan.stage.name: plan for plan in self.stages}.get(saved["name"])
        if now is None or now.first != saved["first"] or step > now.end:
            stages = (f"`{p.stage.name}` ({p.first + 1} to {p.end})" for p in self.stages)
            raise UsageError(
                f"{checkpoint}: was saved at step {step} in stage `{saved['name']}`, which began "
                f"after step {saved['first']}; the stages here are {', '.join(stages)}. Resume "
                "with the stages of the first run; this one and later ones may become longer."
            )


def resolve(
    shards: str | Path | Manifest | None,
    *,
    steps: int | None = None,
    size: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    world_size: int = 1,
) -> Run:
    """Defaults < size or `train.initialise_from` < recipe < overrides < steps.

    Everything is checked before anything starts: every stage's settings, data, vocabulary and row
    length. The vocabulary is the largest of the data, if not said.

    Args:
        shards: Data of the stages that name none.
        steps: Overrides `train.steps`.
        size: A named model size.
        config: The recipe, a TOML file. Paths in it are relative to its folder.
        overrides: `section.key=value`, and `stage.NAME.key=value`; paths as they are.
        world_size: Number of processes.

    Raises:
        UsageError: Settings that do not exist or do not fit the data.
        ShardError: Data missing or damaged.
    """
    if size is not None and size not in SIZES:
        raise UsageError(f"--size {size}: unknown. {did_you_mean(size, SIZES)}")
    mapping = {} if config is None else _read(Path(config))
    where = "--set" if config is None else str(config)
    mapping = _override(mapping, overrides, steps, where)
    settings = _build(mapping, SIZES[size] if size else {}, where)
    stages = settings.stage or (Stage(name="train", **_inherited(settings.train)),)
    manifests = _read_manifests(stages, shards)
    if settings.train.initialise_from:
        _require_tokens_of(Path(settings.train.initialise_from), manifests)
    model = settings.model
    if "vocab_size" not in mapping.get("model", {}):
        source = model.vocab_size if settings.train.initialise_from else 1
        largest = max(source, *(manifest.vocab_size for manifest in manifests))
        model = dataclasses.replace(model, vocab_size=largest)
    first, plans = 0, []
    for stage, manifest in zip(stages, manifests, strict=True):
        plans.append(_plan(stage, manifest, first, settings.train.micro_rows, world_size))
        _check_fit(plans[-1], model)
        first = plans[-1].end
    return Run(model, settings.train, tuple(plans))


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--config {file}: cannot be read: {e}") from e
    mapping = read_toml(text, str(file))
    if sections := [f"[{name}]" for name in _OF_DATASETS if name in mapping]:
        raise RecipeError(
            f"{file}: is a recipe for a dataset (it has {', '.join(sections)}), for `codeflow "
            "build --recipe`. A training recipe has [model], [train] and [[stage]]; without "
            "--recipe, --size and --set say the same."
        )
    tables = mapping.get("stage", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RecipeError(f"{file}: `stage` is a list of tables; write [[stage]]")
    for section, key in [
        (mapping.get("train"), "initialise_from"),
        *((t, "shards") for t in tables),
    ]:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = str(file.parent / section[key])
    return mapping


def _override(
    mapping: dict[str, Any], overrides: Sequence[str], steps: int | None, where: str
) -> dict[str, Any]:
    """Apply `--set` and `--steps`; a stage is addressed by its name."""
    tables = mapping.get("stage", [])
    names = [str(table.get("name") or "") for table in tables]
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            problem = f"a second stage `{name}`" if name else "has no `name`"
            raise RecipeError(f"{where}: [[stage]] {i + 1}: {problem}; every stage needs its own")
    if steps is not None:
        if tables:
            raise UsageError(
                f"--steps: {where} has stages, each with its length; "
                f"use --set stage.{names[-1]}.steps={steps}"
            )
        overrides = [*overrides, f"train.steps={steps}"]
    said = with_overrides({}, overrides)
    stages = said.pop("stage", {})
    if not isinstance(stages, dict) or not all(isinstance(v, dict) for v in stages.values()):
        raise UsageError("--set stage.…: write it as stage.NAME.key=value")
    if unknown := stages.keys() - set(names):
        hint = did_you_mean(min(unknown), names) or f"{where} has no [[stage]] tables."
        raise UsageError(f"--set stage.{min(unknown)}.…: no such stage. {hint}")
    for section, values in said.items():
        below = mapping.get(section)
        if isinstance(values, dict) and isinstance(below, dict):
            values = _over(values, below)
        mapping = mapping | {section: values}
    tables = [_over(stages.get(name, {}), t) for name, t in zip(names, tables, strict=True)]
    return mapping | {"stage": tables}


def _over(strong: Mapping[str, Any], weak: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `strong` where they disagree, were it by saying the same thing in another unit."""
    said = set(strong).union(*(pair for pair in _SAME_THING if pair & strong.keys()))
    return {name: value for name, value in weak.items() if name not in said} | dict(strong)


def _build(mapping: dict[str, Any], size: Mapping[str, Any], where: str) -> RunConfig:
    """Settings from the mapping, with the model's shape below it and `[train]` below stages."""
    train = mapping.get("train", {})
    source = train.get("initialise_from") if isinstance(train, dict) else None
    shape = _shape_of(source, bool(train.get("fold"))) if isinstance(source, str) else {}
    model = mapping.get("model", {})
    if isinstance(model, dict):
        mapping = mapping | {"model": {**SIZES["tiny"], **shape, **size, **model}}
    settings = build(RunConfig, mapping, where)
    below = _inherited(settings.train)
    stages = []
    for stage, table in zip(settings.stage, mapping["stage"], strict=True):
        unsaid = {n: value for n, value in _over(table, below).items() if n not in table}
        stages.append(dataclasses.replace(stage, **unsaid))
    return dataclasses.replace(settings, stage=tuple(stages))


def _shape_of(folder: str, fold: bool) -> dict[str, Any]:
    """The shape of the model to start from; a dense one is given the loops of the defaults."""
    shape = to_mapping(read_hf_config(folder))
    if shape["loop_num"] == 1:
        del shape["loop_num"], shape["loop_window_size"]
        if fold:
            shape["num_hidden_layers"] //= ModelConfig().loop_num
    return shape


def _inherited(train: TrainConfig) -> dict[str, Any]:
    return {name: getattr(train, name) for name in _INHERITED}


def _read_manifests(
    stages: Sequence[Stage], shards: str | Path | Manifest | None
) -> list[Manifest]:
    nameless = [stage.name for stage in stages if stage.shards is None]
    if nameless and shards is None:
        raise UsageError(f"stage `{nameless[0]}` has no data: give --shards, or set its `shards`")
    if shards is not None and not nameless:
        raise UsageError("--shards: every stage of the recipe names its own; leave it out")
    if isinstance(shards, (str, Path)):
        shards = read_manifest(shards)
    read: dict[str, Manifest] = {}
    for stage in stages:
        if stage.shards is not None and stage.shards not in read:
            read[stage.shards] = read_manifest(stage.shards)
    manifests = [shards if stage.shards is None else read[stage.shards] for stage in stages]
    return [manifest for manifest in manifests if isinstance(manifest, Manifest)]


def _require_tokens_of(source: Path, manifests: Sequence[Manifest]) -> None:
    """Refuse data whose ids are other tokens than the weights to start from know."""
    for manifest in manifests:
        require_same_tokens(
            source,
            manifest,
            f"Pack with the tokenizer of train.initialise_from, or take {source / TOKENIZER} away "
            "to start from its layers all the same.",
        )


def _plan(
    stage: Stage, manifest: Manifest, first: int, micro_rows: int, world_size: int
) -> StagePlan:
    row = _row_tokens(stage, manifest)
    if stage.batch_tokens is not None:
        # Every process needs as many rows as the others.
        rows = world_size * max(1, round(stage.batch_tokens / row / world_size))
    else:
        rows = stage.batch_rows or micro_rows * world_size
    if rows % world_size:
        raise UsageError(
            f"stage `{stage.name}`: batch_rows ({rows}) must be a multiple of the number of "
            f"processes ({world_size})"
        )
    steps = stage.steps
    if steps is None and stage.tokens is not None:
        steps = max(1, round(stage.tokens / (rows * row)))
    if steps is None and stage.name != "train":
        raise UsageError(f"stage `{stage.name}`: has no length: set its `steps` or `tokens`")
    return StagePlan(stage, manifest, first, steps or DEFAULT_STEPS, rows)


def _row_tokens(stage: Stage, manifest: Manifest) -> float:
    """Tokens of a row on average; packed rows are nearly full, so cropped ones are, too."""
    return min(manifest.tokens / manifest.rows, stage.max_length or manifest.length)


def _check_fit(plan: StagePlan, model: ModelConfig) -> None:
    where, manifest = f"stage `{plan.stage.name}`", plan.manifest
    if model.vocab_size < manifest.vocab_size:
        raise UsageError(
            f"{where}: model.vocab_size {model.vocab_size} is smaller than the shards' "
            f"{manifest.vocab_size}; leave it out to use theirs"
        )
    if plan.row_length > model.max_position_embeddings:
        raise UsageError(
            f"{where}: rows have up to {plan.row_length} tokens, the model's context is "
            f"{model.max_position_embeddings}. Raise model.max_position_embeddings, pack shorter "
            f"rows, or crop them with train.max_length={model.max_position_embeddings} (the tokens "
            "cut off are counted)."
        )
