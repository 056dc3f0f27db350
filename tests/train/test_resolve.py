from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from shard_factory import random_rows, write_shards

from codeflow.errors import RecipeError, ShardError, UsageError
from codeflow.load import read_manifest
from codeflow.settings import build, to_mapping
from codeflow.train.config import SIZES, ModelConfig
from codeflow.train.hf import to_hf
from codeflow.train.recipe import RunConfig, Stage
from codeflow.train.resolve import Run, resolve

STAGES = """
[model]
hidden_size = 64

[train]
learning_rate = 1e-3
batch_rows = 2
holdout = 0.25

[[stage]]
name = "pretrain"
shards = "long"
steps = 30
schedule = "wsd"

[[stage]]
name = "sft"
shards = "short"
tokens = 3000
batch_tokens = 160
learning_rate = 1e-5
reset_optimizer = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of exactly 60 and 40 tokens, and a recipe beside them."""
    folder = tmp_path_factory.mktemp("resolve")
    for name, length, vocabulary in (("long", 60, 300), ("short", 40, 257)):
        rows = [r for r in random_rows(200, length) if len(r.ids) == length][:4] * 3
        write_shards(folder / name, rows, length=length, vocab_size=vocabulary)
    (folder / "stages.toml").write_text(STAGES)
    return folder


def recipe(folder: Path, *overrides: str, text: str = STAGES, **options: object) -> Run:
    file = folder / "changed.toml"
    file.write_text(text)
    shards = options.pop("shards", None)
    return resolve(shards, config=file, overrides=overrides, **options)  # type: ignore[arg-type]


def test_settings_by_strength(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[model]\nhidden_size = 256\nhead_dim = 16\n[train]\nsteps = 7\nseed = 3\n")
    s = resolve(
        folder / "short",
        size="small",
        config=file,
        overrides=["model.head_dim=8", "train.steps=8"],
        steps=9,
    )
    assert (s.model.num_hidden_layers, s.model.hidden_size, s.model.head_dim) == (8, 256, 8)
    assert (s.steps, s.train.seed) == (9, 3)
    assert s.model.vocab_size == 257
    larger = resolve(read_manifest(folder / "short"), overrides=["model.vocab_size=300"])
    assert larger.model.vocab_size == 300


def test_without_stages_there_is_one(folder: Path) -> None:
    run = resolve(folder / "short", overrides=["train.batch_rows=4", "train.warmup_steps=3"])
    (plan,) = run.stages
    assert (plan.stage.name, plan.first, plan.steps, plan.batch_rows) == ("train", 0, 200, 4)
    assert plan.stage.warmup_steps == 3
    assert plan.row_length == 40
    assert plan.tokens == 200 * 4 * 40
    assert plan.epochs == pytest.approx(200 * 4 / 12)


def test_stages_follow_each_other_and_take_the_rest_from_train(folder: Path) -> None:
    run = resolve(None, config=folder / "stages.toml")
    pretrain, sft = run.stages
    assert (pretrain.first, pretrain.end, sft.first) == (0, 30, 30)
    assert (pretrain.stage.learning_rate, sft.stage.learning_rate) == (1e-3, 1e-5)
    assert (pretrain.stage.schedule, sft.stage.schedule) == ("wsd", "cosine")
    assert (pretrain.stage.reset_optimizer, sft.stage.reset_optimizer) == (False, True)
    assert pretrain.batch_rows == 2
    assert sft.batch_rows == 4  # 160 tokens of 40
    assert sft.steps == round(3000 / 160)
    assert run.steps == 30 + sft.steps
    assert [plan.stage.holdout for plan in run.stages] == [0.25, 0.25]
    assert pretrain.epochs == pytest.approx(30 * 2 / 9)
    assert run.model.vocab_size == 300  # the largest of the data
    assert run.model.hidden_size == 64


def test_a_stage_is_set_by_its_name(folder: Path) -> None:
    """The stronger source wins, also when it says the same thing in another unit."""
    run = recipe(folder, "stage.sft.steps=5", "stage.pretrain.batch_tokens=60")
    assert [plan.steps for plan in run.stages] == [30, 5]
    assert [plan.batch_rows for plan in run.stages] == [1, 4]
    assert recipe(folder, "train.learning_rate=0.5").stages[0].stage.learning_rate == 0.5
    assert recipe(folder, "train.learning_rate=0.5").stages[1].stage.learning_rate == 1e-5
    tokens = recipe(folder, text="[train]\ntokens = 400", steps=7, shards=folder / "short")
    assert tokens.steps == 7


def test_lengths_and_batches_in_tokens(folder: Path) -> None:
    run = resolve(folder / "short", overrides=["train.tokens=4000", "train.batch_tokens=170"])
    assert (run.stages[0].batch_rows, run.steps) == (4, 25)
    # Rows are shared out evenly, so they are a multiple of the number of processes.
    overrides = ["train.tokens=4000", "train.batch_tokens=170"]
    run = resolve(folder / "short", overrides=overrides, world_size=3)
    assert (run.stages[0].batch_rows, run.steps) == (3, 33)
    cropped = resolve(folder / "short", overrides=["train.tokens=4000", "train.max_length=20"])
    assert (cropped.steps, cropped.stages[0].row_length) == (200, 20)


def test_unsaid_every_process_takes_one_pass(folder: Path) -> None:
    run = resolve(folder / "short", overrides=["train.micro_rows=2"], world_size=3)
    assert run.stages[0].batch_rows == 6


def test_a_dense_source_gives_the_shape(folder: Path, tmp_path: Path) -> None:
    dense = ModelConfig(vocab_size=290, hidden_size=48, num_hidden_layers=6, loop_num=1)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(dense)))
    (tmp_path / "c.toml").write_text('[train]\ninitialise_from = "."\n')
    run = resolve(folder / "short", config=tmp_path / "c.toml")
    assert (run.model.hidden_size, run.model.num_hidden_layers, run.model.loop_num) == (48, 6, 2)
    assert run.model.vocab_size == 290
    assert Path(run.train.initialise_from or "") == tmp_path
    assert resolve(folder / "long", config=tmp_path / "c.toml").model.vocab_size == 300
    fold = resolve(folder / "short", config=tmp_path / "c.toml", overrides=["train.fold=true"])
    assert fold.model.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "tyni"}, "Did you mean `tiny`"),
        ({"overrides": ["model.hiden_size=1"]}, r"model\.hidden_size"),
        ({"overrides": ["train.schedule=cosin"]}, "cosine"),
        ({"overrides": ["train.batch_rows=3", "train.micro_rows=2"]}, "multiple"),
        ({"overrides": ["train.batch_rows=3"], "world_size": 2}, "number of processes"),
        ({"overrides": ["train.steps=3", "train.tokens=4"]}, "`steps` or `tokens`, not both"),
        ({"overrides": ["model.vocab_size=256"]}, "smaller than the shards'"),
        ({"overrides": ["model=3"]}, "section"),
        ({"overrides": ["train=3"]}, "section"),
        ({"overrides": ["stage.sft.steps=3"]}, r"no \[\[stage\]\] tables"),
        ({"overrides": ["stage=3"]}, r"stage\.NAME\.key=value"),
        ({"overrides": ["train.initialise_from=nowhere"]}, "nowhere"),
        ({"steps": 0}, "at least 1"),
        ({"config": "absent.toml"}, "absent.toml"),
    ],
)
def test_settings_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(folder / "short", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate = 1e-5", "learning_rat = 1", r"`stage\[1\]\.learning_rat`.*learning_rate"),
        ("learning_rate = 1e-5", "seed = 1", r"unknown setting `stage\[1\]\.seed`"),
        ("tokens = 3000", "tokens = -1", r"`stage\[1\]\.tokens` must be at least 1"),
        ('schedule = "wsd"', 'schedule = "wds"', r"stage\[0\]\.schedule.*`wsd`"),
        ('name = "sft"', 'name = "pretrain"', "second stage `pretrain`"),
        ('name = "sft"', "", "has no `name`"),
        ("tokens = 3000", "", "`sft`: has no length"),
        ("tokens = 3000", "tokens = 3000\nsteps = 2", "stage `sft`: give `steps` or `tokens`"),
        ("[[stage]]", "[stage]", r"TOML|\[\[stage\]\]"),
        ("hidden_size = 64", "vocab_size = 299", "stage `pretrain`: model.vocab_size 299"),
        (
            "hidden_size = 64",
            "max_position_embeddings = 50",
            r"stage `pretrain`: rows have up to 60",
        ),
    ],
)
def test_stages_refused(folder: Path, old: str, new: str, message: str) -> None:
    assert old in STAGES
    with pytest.raises(UsageError, match=message):
        recipe(folder, text=STAGES.replace(old, new))


def test_stages_and_options_that_contradict(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--set stage\.sft\.steps=9"):
        recipe(folder, steps=9)
    with pytest.raises(UsageError, match="--shards"):
        resolve(folder / "short", config=folder / "stages.toml")
    with pytest.raises(UsageError, match=r"no such stage\. Did you mean `sft`"):
        recipe(folder, "stage.stf.steps=1")
    with pytest.raises(UsageError, match="stage `sft` has no data"):
        recipe(folder, text=STAGES.replace('shards = "short"', ""))
    with pytest.raises(UsageError, match="stage `train` has no data"):
        resolve(None)
    with pytest.raises(ShardError, match="nowhere"):
        recipe(folder, text=STAGES.replace('"short"', '"nowhere"'))


def test_a_list_of_tables_is_built_and_written_back() -> None:
    tables = [{"name": "a", "steps": 2}, {"name": "b", "learning_rate": 1}]
    settings = build(RunConfig, {"stage": tables}, "x.toml")
    assert settings.stage == (Stage(name="a", steps=2), Stage(name="b", learning_rate=1.0))
    assert build(RunConfig, to_mapping(settings), "again") == settings
    with pytest.raises(RecipeError, match=r"write \[\[stage\]\]"):
        build(RunConfig, {"stage": 3}, "x.toml")
    with pytest.raises(RecipeError, match=r"write \[\[stage\]\]"):
        build(RunConfig, {"stage": [3]}, "x.toml")


def test_every_named_size_resolves(folder: Path) -> None:
    for size in SIZES:
        assert resolve(folder / "short", size=size).model.vocab_size == 257


def test_a_little_is_held_out_of_enough_rows(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", random_rows(60, 8), length=8)
    (plan,) = resolve(data).stages
    assert plan.holdout == 0.05
    assert plan.epochs == pytest.approx(200 / 57)
    for rows, share in ((49, 0.0), (50, 0.05), (10_000, 0.05), (1_000_000, 0.0005)):
        manifest = dataclasses.replace(plan.manifest, rows=rows)
        assert dataclasses.replace(plan, manifest=manifest).holdout == share
    for said in (0.0, 0.3):
        (plan,) = resolve(data, overrides=[f"train.holdout={said}"]).stages
        assert plan.holdout == said


def test_a_recipe_for_a_dataset_is_recognised(folder: Path) -> None:
    file = Path(__file__).parents[2] / "pipelines" / "quickstart.toml"
    with pytest.raises(
        RecipeError, match=r"quickstart\.toml: is a recipe for a dataset.*\[model\]"
    ):
        resolve(folder / "long", config=file)
