from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shard_factory import stdlib_texts, text_rows, write_shards
from small_runs import SMALL, assert_same_end, killed_at, lines, losses, small

from codeflow.errors import UsageError
from codeflow.train import trainer
from codeflow.train.trainer import run

STAGES = """
[train]
batch_rows = 2
micro_rows = 2
holdout = 0.1
evaluate_every = 5

[[stage]]
name = "pretrain"
shards = "short"
steps = 7
schedule = "constant"
learning_rate = 4e-3

[[stage]]
name = "anneal"
shards = "short"
steps = 4
schedule = "linear"
min_learning_rate = 0

[[stage]]
name = "sft"
shards = "long"
steps = 5
batch_rows = 4
learning_rate = 1e-3
reset_optimizer = true
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for name, length in (("short", 64), ("long", 128)):
        write_shards(folder / name, text_rows(stdlib_texts(), length, 24), length=length)
    (folder / "stages.toml").write_text(STAGES)
    return folder / "stages.toml"


def test_stages_run_one_after_another(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = small(None, tmp_path, None, config=recipe)
    found = lines(tmp_path)
    assert result.steps == 16
    assert [m["stage"] for m in found] == ["pretrain"] * 7 + ["anneal"] * 4 + ["sft"] * 5
    rates = [m["learning_rate"] for m in found]
    assert rates[:7] == pytest.approx([2e-3, *[4e-3] * 6])
    assert rates[7:11] == pytest.approx([1.5e-3, 3e-3, 1.5e-3, 0.0])  # warm-up in every stage
    assert rates[11:13] == pytest.approx([5e-4, 1e-3])
    tokens = [b["tokens"] - a["tokens"] for a, b in pairwise(found)]
    assert max(tokens[:10]) <= 2 * 64 < min(tokens[10:])
    printed = capsys.readouterr().err
    assert "stage sft: 5 steps of 4 rows" in printed
    assert "step 16/16 sft" in printed


# In the middle of the first stage; right after its end, which is where the second one begins; in
# the last one.
@pytest.mark.parametrize("step", [6, 8, 15])
def test_resume_continues_inside_the_right_stage(recipe: Path, tmp_path: Path, step: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small(None, whole, None, config=recipe)
    killed_at(step, None, cut, None, config=recipe)
    small(None, cut, None, config=recipe, resume=True)
    assert_same_end(whole, cut, 16)
    assert [m["stage"] for m in lines(whole)] == [m["stage"] for m in lines(cut)]


def test_every_stage_starts_its_data_anew(recipe: Path, tmp_path: Path) -> None:
    """With a learning rate of zero, the same rows have the same losses."""
    still = ("train.learning_rate=0", "stage.pretrain.learning_rate=0")
    small(None, tmp_path, None, *still, "stage.sft.learning_rate=0", config=recipe)
    assert losses(tmp_path)[7:11] == losses(tmp_path)[:4]


def test_moments_are_forgotten_only_where_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    real = trainer.forget_moments

    def forget(optimizers: list[torch.optim.Optimizer]) -> None:
        steps.append(next(iter(optimizers[0].state.values()))["step"].item())
        real(optimizers)
        assert not optimizers[0].state

    monkeypatch.setattr(trainer, "forget_moments", forget)
    small(None, tmp_path, None, config=recipe)
    assert steps == [11]


def test_finished_stages_cannot_change(recipe: Path, tmp_path: Path) -> None:
    small(None, tmp_path, None, config=recipe)
    with pytest.raises(UsageError, match=r"stage `sft`, which began after step 11.*`sft` \(13 to"):
        small(None, tmp_path, None, "stage.anneal.steps=5", config=recipe, resume=True)
    longer = small(None, tmp_path, None, "stage.sft.steps=7", config=recipe, resume=True)
    assert longer.steps == 18
    assert [m["step"] for m in lines(tmp_path)] == list(range(1, 19))


def test_everything_is_checked_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    broken = recipe.with_name("broken.toml")
    broken.write_text(STAGES.replace("reset_optimizer", "reset_optimiser"))
    with pytest.raises(UsageError, match=r"stage\[2\]\.reset_optimizer"):
        run(None, tmp_path / "out", config=broken, overrides=SMALL)
    with pytest.raises(UsageError, match="stage `sft`: rows have up to 128"):
        small(None, tmp_path / "out", None, "model.max_position_embeddings=64", config=recipe)
    assert not (tmp_path / "out").exists()
