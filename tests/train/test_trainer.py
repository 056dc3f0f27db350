from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_factory import Row, random_rows, stdlib_texts, text_rows, write_shards

from codeflow.errors import RecipeError, ShardError, UsageError
from codeflow.load import read_manifest
from codeflow.train import model, trainer
from codeflow.train.__main__ import main, summary
from codeflow.train.checkpoint import load_state
from codeflow.train.errors import CheckpointError, TrainingError
from codeflow.train.hf import load_model
from codeflow.train.metrics import Metrics
from codeflow.train.resolve import resolve
from codeflow.train.trainer import TrainResult, run

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.head_dim=8",
    "model.loop_window_size=8",
    "train.warmup_steps=2",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = text_rows(stdlib_texts(), 256, 30)
    return write_shards(tmp_path_factory.mktemp("train") / "data", rows, length=256)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def small(data: Path, out: Path, steps: int, *more: str, resume: bool = False) -> TrainResult:
    return run(data, out, steps=steps, overrides=[*SMALL, *more], resume=resume)


def test_same_seed_same_losses_other_seed_others(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small(data, tmp_path / name, 5, f"train.seed={seed}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_resumed_is_uninterrupted(data: Path, tmp_path: Path) -> None:
    """Killed after step 6 with checkpoints every 4: steps 5 and 6 are done again, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small(data, whole, 34, "train.batch_rows=2")  # 68 rows: into the third epoch
    real = trainer._require_finite

    def killed(loss: float, norm: float, step: int, batch: object) -> None:
        if step == 6:
            raise KeyboardInterrupt
        real(loss, norm, step, batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_require_finite", killed)
        with pytest.raises(KeyboardInterrupt):
            small(data, cut, 34, "train.batch_rows=2")
    assert [m["step"] for m in metrics(cut)] == [1, 2, 3, 4, 5, 6]
    result = small(data, cut, 34, "train.batch_rows=2", resume=True)
    assert losses(cut) == losses(whole)
    assert [m["tokens"] for m in metrics(cut)] == [m["tokens"] for m in metrics(whole)]
    assert result.first_loss == losses(whole)[0]
    one, two = (load_model(d / "checkpoints" / "step-00000034") for d in (whole, cut))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    states = [load_state(d / "checkpoints" / "step-00000034") for d in (whole, cut)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["progress"] == states[1]["progress"]


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
        norms = [[m["grad_norm"] for m in metrics(tmp_path / x)] for x in (micro, "1")]
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
    lines = metrics(tmp_path)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5]
    assert (result.first_loss, result.last_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert result.first_losses_mean == pytest.approx(sum(m["loss"] for m in lines) / 5)
    assert result.tokens == lines[-1]["tokens"]
    assert lines[0]["gate_mean"] == 0.5
    assert lines[0]["learning_rate"] == pytest.approx(0.0015)
    assert all(m["tokens_per_second"] > 0 and m["flops_per_second"] > 0 for m in lines)
    assert Path(result.checkpoint).name == "step-00000005"
    assert result.parameters == sum(p.numel() for p in load_model(result.checkpoint).parameters())


def test_bfloat16_trains(data: Path, tmp_path: Path) -> None:
    result = small(data, tmp_path, 12, "train.dtype=bfloat16")
    assert result.last_loss < result.first_loss - 0.5


def test_metrics_of_a_killed_run_lose_their_tail(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Metrics(file, resumed_at=2).log({"step": 3, "new": True})
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'
    Metrics(file)
    assert file.read_text() == ""


def test_an_explosion_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.cross_entropy
    monkeypatch.setattr(model, "cross_entropy", lambda *a: real(*a) * float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*learning_rate.*Rows .*\[\d+\]"):
        small(data, tmp_path, 3)
    assert not (tmp_path / "checkpoints").exists()


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
    assert metrics(tmp_path)[-1]["tokens_cropped"] == result.tokens_cropped


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


def test_settings_by_strength(data: Path, tmp_path: Path) -> None:
    manifest = read_manifest(data)
    file = tmp_path / "c.toml"
    file.write_text("[model]\nhidden_size = 256\nhead_dim = 16\n[train]\nsteps = 7\nseed = 3\n")
    s = resolve(
        manifest,
        size="small",
        config=file,
        overrides=["model.head_dim=8", "train.steps=8"],
        steps=9,
    )
    assert (s.model.num_hidden_layers, s.model.hidden_size, s.model.head_dim) == (8, 256, 8)
    assert (s.train.steps, s.train.seed) == (9, 3)
    assert s.model.vocab_size == 257
    assert resolve(manifest, overrides=["model.vocab_size=300"]).model.vocab_size == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "tyni"}, "Did you mean `tiny`"),
        ({"overrides": ["model.hiden_size=1"]}, r"model\.hidden_size"),
        ({"overrides": ["train.schedule=cosin"]}, "cosine"),
        ({"overrides": ["train.batch_rows=3", "train.micro_rows=2"]}, "multiple"),
        ({"overrides": ["model.vocab_size=256"]}, "smaller than the shards'"),
        ({"overrides": ["model=3"]}, "section"),
        ({"steps": 0}, "at least 1"),
        ({"config": "absent.toml"}, "absent.toml"),
    ],
)
def test_settings_refused(data: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(read_manifest(data), **options)  # type: ignore[arg-type]


def test_unknown_device(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.device=abacus"):
        small(data, tmp_path, 1, "train.device=abacus")


def test_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for s in SMALL for part in ("--set", s)]
    base = ["--shards", str(data / "shards"), "--out", str(tmp_path / "out"), *settings]
    assert main([*base, "--steps", "2", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert set(result) == {f.name for f in dataclasses.fields(TrainResult)}
    assert "step 2/2" in printed.err
    assert main([*base, "--steps", "3"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main([*base, "--steps", "3", "--resume"]) == 0
    assert capsys.readouterr().out.startswith("3 steps")
    assert main(["--shards", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert main([*base, "--set", "train.stpes=1"]) == RecipeError.exit_code


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
