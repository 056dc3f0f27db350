from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codeflow.train.hf import load_model
from codeflow.train.parity import Batch, Difference, compare, main

GOLDEN = Path(__file__).parents[1] / "data" / "loopcoder"
FOLDERS = sorted(p for p in GOLDEN.iterdir() if p.is_dir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "golden"
    shutil.copytree(GOLDEN / "base", copy)
    return copy


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(file) | changes
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, file)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("golden", FOLDERS, ids=lambda p: p.name)
def test_golden_numbers(golden: Path, backend: str) -> None:
    found = compare(golden, backend)
    assert [d for d in found if not d.passed] == []
    recorded = load_file(golden / "expected.safetensors")
    compared = {d.name for d in found if d.value is not None}
    assert recorded.keys() <= compared


def test_everything_a_folder_can_hold_is_in_the_goldens() -> None:
    keys = {d.name for g in FOLDERS for d in compare(g) if d.value is not None}
    for key in ("gate_mean_per_head", "packed_logits", "adamw_losses", "logits_bf16_model"):
        assert key in keys


def test_a_packed_row_without_position_reset_fails() -> None:
    """Masking alone is not enough: the gate reads the rotated query."""
    inputs = load_file(GOLDEN / "base" / "inputs.safetensors")
    expected = load_file(GOLDEN / "base" / "expected.safetensors")["packed_logits"][0]
    batch = Batch.of_packed(inputs["packed_input_ids"], inputs["packed_cu_seqlens"])
    assert batch.docs.positions.tolist() == inputs["packed_position_ids"][0].tolist()
    model = load_model(GOLDEN / "base")
    with torch.no_grad():
        right = model.logits(model(batch.input_ids, batch.docs).hidden)
        # The dense back end masks by positions, so shift a later document as a whole instead.
        start, end = (int(n) for n in batch.docs.cu_seqlens[1:3])
        batch.docs.positions[start:end] += start
        wrong = model.logits(model(batch.input_ids, batch.docs).hidden)
    assert (right - expected).abs().max() < 1e-4
    assert (wrong - expected)[start:end].abs().max() > 0.1


def test_main_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("packed_loss ") and line.endswith("ok") for line in lines)
    assert lines[-1].endswith("0 failed, 0 absent")


def test_a_wrong_weight_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.gate_projection.bias"
    weights = load_file(folder / "model.safetensors")
    edit(folder / "model.safetensors", **{name: weights[name] + 0.05})
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gate_mean ") and line.endswith("FAILED") for line in lines)


def test_the_window_counts_the_token_itself(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"loop_window_size": 9}))
    assert not all(d.passed for d in compare(folder))


def test_absent_and_unknown_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "expected.safetensors", adamw_losses=None, mystery=torch.zeros(1))
    edit(folder / "inputs.safetensors", packed_input_ids=None)
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert "absent" in said["adamw_losses"]
    assert "absent" in said["packed_input_ids"]
    assert "not compared" in said["packed_logits"]
    assert "not compared" in said["mystery"]


@pytest.mark.parametrize("damage", ["missing", "not safetensors", "other shape", "empty config"])
def test_unusable_input(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = folder / "expected.safetensors"
    if damage == "missing":
        expected.unlink()
    elif damage == "not safetensors":
        expected.write_text("hello")
    elif damage == "other shape":
        edit(expected, logits=torch.zeros(3))
    else:
        (folder / "config.json").write_text("{}")
    assert main([str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


def test_nan_does_not_pass() -> None:
    assert not Difference("x", float("nan"), 1.0, "").passed
    assert Difference("x", 1.0, 1.0, "").passed
    assert not Difference("x", 1.1, 1.0, "").passed
