from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_factory import Row, random_rows, stdlib_texts, text_rows, write_shards
from small_runs import (
    assert_same_end,
    evaluations,
    killed_at,
    lines,
    losses,
    small,
)

from codeflow.errors import ShardError, UsageError
from codeflow.train import model
from codeflow.train.__main__ import summary
from codeflow.train.errors import CheckpointError, TrainingError
from codeflow.train.hf import load_model
from codeflow.train.trainer import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = text_rows(stdlib_texts(), 256, 30)
    return write_shards(tmp_path_factory.mktemp("train") / "data", rows, length=256)


def test_same_seed_same_losses_other_seed_others(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small(data, tmp_path / name, 5, f"train.seed={seed}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_resumed_is_uninterrupted(data: Path, tmp_path: Path) -> None:
    """Killed in step 7 with checkpoints every 4: steps 5 and 6 are done again, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small(data, whole, 34, "train.batch_rows=2")  # 68 rows: into the third epoch
    killed_at(7, data, cut, 34, "train.batch_rows=2")
    assert [m["step"] for m in lines(cut)] == [1, 2, 3, 4, 5, 6]
    result = small(data, cut, 34, "train.batch_rows=2", resume=True)
    assert_same_end(whole, cut, 34)
    assert [m["tokens"] for m in lines(cut)] == [m["tokens"] for m in lines(whole)]
    assert result.first_loss == losses(whole)[0]


def test_how_a_step_is_cut_does_not_matter(tmp_path: Path) -> None:
    """Rows of very unequal target counts: a mean of means would differ."""
    rows = [
        Row(r.ids, r.doc_lens, [0, len(r.ids)] if i % 2 else [len(r.ids) - 2, 2])
        for i, r in enumerate(random_rows(12, 60))
    ]
    data = write_shards(tmp_path / "data", rows, length=60)
    for micro in (1, 2, 4):
        small(data, tmp_path / str(micro), 3, "train.batch_rows=4", f"train.micro_rows={micro}")
    for micro in ("2", "4"):
        assert losses(tmp_path / micro) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        norms = [[m["grad_norm"] for m in lines(tmp_path / x)] for x in (micro, "1")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_overfits_one_row(tmp_path: Path) -> None:
    row = Row(list(range(1, 61)), [20, 40], [0, 60])
    data = write_shards(tmp_path / "data", [row], length=60)
    more = ("train.learning_rate=0.01", "train.weight_decay=0", "train.log_every=50")
    result = small(data, tmp_path / "out", 120, *more, "train.checkpoint_every=1000")
    assert result.first_loss > 5
    assert result.last_loss < 0.05


def test_learns_real_text(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path / "out", 60, "train.checkpoint_every=1000")
    assert result.first_losses_mean - result.last_losses_mean > 1.0
    assert result.tokens == sum(len(r.ids) for r in text_rows(stdlib_texts(), 256, 30)) * 2


def test_metrics_and_result_agree(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path, 5)
    found = lines(tmp_path)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5]
    assert (result.first_loss, result.last_loss) == (found[0]["loss"], found[-1]["loss"])
    assert result.first_losses_mean == pytest.approx(sum(m["loss"] for m in found) / 5)
    assert result.tokens == found[-1]["tokens"]
    assert found[0]["gate_mean"] == [0.5, 0.5]
    assert found[0]["gate_std"] == [0.0, 0.0]
    assert len(found[0]["residual_rms"]) == 2
    assert found[0]["learning_rate"] == pytest.approx(0.0015)
    assert all(m["tokens_per_second"] > 0 and m["flops_per_second"] > 0 for m in found)
    assert all(m["mfu"] is None and m["memory_bytes"] > 1e6 for m in found)
    assert Path(result.checkpoint).name == "step-00000005"
    assert result.parameters == sum(p.numel() for p in load_model(result.checkpoint).parameters())


def test_bfloat16_trains(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path, 12, "train.dtype=bfloat16")
    assert result.last_loss < result.first_loss - 0.5


def test_an_explosion_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.cross_entropy
    monkeypatch.setattr(model, "cross_entropy", lambda *a, **k: real(*a, **k) * float("nan"))
    message = r"step 3: loss nan.*3 steps in a row.*learning_rate.*Rows .*\[\d+\]"
    with pytest.raises(TrainingError, match=message):
        small(data, tmp_path, 9, "train.skip_limit=3")
    assert not (tmp_path / "checkpoints").exists()
    assert [m["loss"] for m in lines(tmp_path)] == [None, None]
    assert lines(tmp_path)[-1]["skipped"] == 2


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 5 of 8 explodes: weights stay as they were after step 4, and the run goes on."""
    real, calls = model.cross_entropy, 0

    def cross_entropy(*arguments: torch.Tensor, z_loss: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*arguments, z_loss=z_loss) * (float("nan") if calls == 5 else 1.0)

    monkeypatch.setattr(model, "cross_entropy", cross_entropy)
    more = ("train.checkpoint_every=1", "train.keep_checkpoints=9")
    result = small(data, tmp_path, 8, *more)
    assert (result.steps, result.skipped) == (8, 1)
    assert "1 without an update" in summary(result)
    assert "step 5: loss nan" in capsys.readouterr().err
    weights = {
        step: dict(load_model(tmp_path / "checkpoints" / f"step-{step:08d}").named_parameters())
        for step in (3, 4, 5, 6)
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[4][name], weights[5][name])
    assert not torch.equal(weights[3][name], weights[4][name])
    assert not torch.equal(weights[5][name], weights[6][name])
    assert [m["skipped"] for m in lines(tmp_path)] == [0] * 4 + [1] * 4


def test_an_outlier_is_skipped_and_the_history_survives_a_resume(tmp_path: Path) -> None:
    """One row of noise among constant ones, after the history has filled."""
    rows = [Row([7] * 20, [20], [0, 20])] * 40
    data = write_shards(tmp_path / "data", rows, length=20)
    more = ("train.learning_rate=0", "train.checkpoint_every=70", "train.skip_sigmas=6")
    small(data, tmp_path / "a", 70, *more)
    real = model.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "cross_entropy", lambda *a, **k: real(*a, **k) * 1.5)
        assert small(data, tmp_path / "a", 71, *more, resume=True).skipped == 1
    assert small(data, tmp_path / "b", 70, *more).skipped == 0


def test_heldout_rows_are_scored_and_never_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("train.holdout=0.2", "train.evaluate_every=5", "train.evaluate_rows=4")
    result = small(data, tmp_path, 24, *more, "train.checkpoint_every=100")
    scored = evaluations(tmp_path)
    assert [e["step"] for e in scored] == [5, 10, 15, 20, 24]
    assert scored[0]["eval/loss"] > scored[-1]["eval/loss"] == result.heldout_loss
    assert scored[-1]["stage"] == "train"
    assert lines(tmp_path)[-1]["epoch"] == 0  # 24 rows of 30 are one epoch
    assert "held out: loss" in capsys.readouterr().err
    assert "held out" in summary(result)


def test_muon_trains_and_resumes(data: Path, tmp_path: Path) -> None:
    more = ("train.optimizer=muon", "train.learning_rate=0.01")
    small(data, tmp_path / "whole", 10, *more)
    killed_at(7, data, tmp_path / "cut", 10, *more)
    small(data, tmp_path / "cut", 10, *more, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut", 10)
    assert losses(tmp_path / "cut")[-1] < losses(tmp_path / "cut")[0] - 0.3


def test_a_dense_model_trains(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path, 12, "model.loop_num=1")
    assert result.last_loss < result.first_loss - 0.5
    assert lines(tmp_path)[-1]["gate_mean"] == []
    assert small(data, tmp_path, 14, "model.loop_num=1", resume=True).steps == 14


def test_checkpointing_changes_no_bit(data: Path, tmp_path: Path) -> None:
    for policy in ("auto", "none", "full"):
        small(data, tmp_path / policy, 4, f"train.checkpointing={policy}")
    assert_same_end(tmp_path / "none", tmp_path / "full", 4)
    assert_same_end(tmp_path / "none", tmp_path / "auto", 4)


def test_a_dense_model_starts_a_looped_one(data: Path, tmp_path: Path) -> None:
    """The shape comes from the folder; folded, the looped model has half the layers."""
    dense = small(data, tmp_path / "dense", 30, "model.loop_num=1").checkpoint
    plain = ["train.log_every=1", "train.device=cpu", f"train.initialise_from={dense}"]
    looped = run(data, tmp_path / "looped", steps=2, overrides=plain)
    folded = run(data, tmp_path / "folded", steps=2, overrides=[*plain, "train.fold=true"])
    assert load_model(looped.checkpoint).config.loop_num == 2
    assert load_model(looped.checkpoint).config.num_hidden_layers == 2
    assert load_model(folded.checkpoint).config.num_hidden_layers == 1
    random = losses(tmp_path / "dense")[0]
    assert looped.first_loss < random - 0.5
    # A resumed run keeps its own weights.
    again = run(data, tmp_path / "looped", steps=3, overrides=plain, resume=True)
    assert again.first_loss == looped.first_loss


def test_crop_is_loud_and_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = small(data, tmp_path, 4, "train.max_length=100")
    assert result.tokens == 400
    assert result.tokens_cropped > 0
    assert "cropped to 100" in capsys.readouterr().err
    assert f"{result.tokens_cropped:,} cropped" in summary(result)
    lengths = [len(row.ids) for row in text_rows(stdlib_texts(), 256, 30)]
    assert min(lengths) > 100
    assert lines(tmp_path)[-1]["tokens_cropped"] == result.tokens_cropped


def test_rows_longer_than_the_context_name_the_fix(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.max_length=128"):
        small(data, tmp_path, 1, "model.max_position_embeddings=128")
    fits = ("model.max_position_embeddings=128", "train.max_length=128")
    assert small(data, tmp_path, 1, *fits).tokens == 128


def test_a_run_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    small(data, tmp_path, 2)
    with pytest.raises(UsageError, match="--resume"):
        small(data, tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"model\.hidden_size was 32, is 64"):
        small(data, tmp_path, 3, "model.hidden_size=64", resume=True)
    with pytest.raises(ShardError, match="seed"):
        small(data, tmp_path, 3, "train.seed=1", resume=True)
    assert small(data, tmp_path, 2, resume=True).steps == 2
    with pytest.raises(UsageError, match="saved at step 2 in stage `train`"):
        small(data, tmp_path, 1, resume=True)


def test_unknown_device(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.device=abacus"):
        small(data, tmp_path, 1, "train.device=abacus")


def test_needs_only_what_a_gpu_box_has() -> None:
    """Run where click, pygit2, rich and tokenizers cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('click', 'pygit2', 'rich', 'tokenizers', 'tree_sitter'):\n"
        "    sys.modules[name] = None\n"
        "import codeflow\n"
        "assert 'torch' not in sys.modules\n"
        "import codeflow.load, codeflow.train.parity, codeflow.train.__main__\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_example_learns(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("x", ROOT / "examples" / "train_on_shards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    last = module.main(str(data), steps=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert last < float(lines[0].split()[-1]) - 1


def test_a_checkpoint_has_the_tokenizer_of_its_data(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path, 1)
    copied = Path(result.checkpoint) / "tokenizer.json"
    assert copied.read_bytes() == (data / "shards" / "tokenizer.json").read_bytes()


def test_z_loss_is_part_of_the_training_loss(data: Path, tmp_path: Path) -> None:
    plain, held = (
        small(data, tmp_path / name, 1, f"train.z_loss={z}")
        for name, z in (("a", 0.0), ("b", 0.01))
    )
    # At the start all logits are near 0, so that logsumexp is near the log of the vocabulary.
    expected = 0.01 * math.log(257) ** 2
    assert held.first_loss - plain.first_loss == pytest.approx(expected, rel=0.1)
