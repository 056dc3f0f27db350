from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codeflow.errors import RecipeError, UsageError
from codeflow.train import checkpoint
from codeflow.train.checkpoint import load_state, save
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import load_model, read_hf_config, to_hf
from codeflow.train.model import LoopCoder

GOLDEN = Path(__file__).parents[1] / "data" / "loopcoder"
TINY = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    model = LoopCoder(TINY, seed=5)
    state = {"optimizer": {"m": torch.arange(3.0)}, "step": 7, "text": ["a"]}
    folder = save(tmp_path, 7, model, state, keep=1)
    assert checkpoint.latest(tmp_path) == folder
    again = load_model(folder)
    assert again.config == TINY
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    loaded = load_state(folder)
    assert torch.equal(loaded.pop("optimizer")["m"], torch.arange(3.0))
    assert loaded == {"step": 7, "text": ["a"]}


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 50, 500, 1000):
        save(tmp_path, step, LoopCoder(TINY), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000500", "step-00001000"]


@pytest.mark.parametrize("moment", ["save", "fsync", "rename"])
def test_a_failure_while_saving_leaves_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first = save(tmp_path, 1, LoopCoder(TINY, seed=1), {"step": 1}, keep=1)

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    target = {
        "save": (torch, "save"),
        "fsync": (checkpoint.os, "fsync"),
        "rename": (Path, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[moment], fail)
        with pytest.raises(CheckpointError, match="disk is full"):
            save(tmp_path, 2, LoopCoder(TINY, seed=2), {"step": 2}, keep=1)
    assert checkpoint.latest(tmp_path) == first
    assert load_state(first) == {"step": 1}
    save(tmp_path, 2, LoopCoder(TINY, seed=2), {"step": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, LoopCoder(TINY), {"try": 1}, keep=1)
    assert load_state(save(tmp_path, 1, LoopCoder(TINY), {"try": 2}, keep=1)) == {"try": 2}


def test_damaged_state_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, LoopCoder(TINY), {}, keep=1)
    (folder / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model"):
        load_model(folder)


def change(source: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors") | tensors
    kept = {n: t.contiguous() for n, t in content.items() if t is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_both_gate_namings_are_the_same_model(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    gates = {n: t for n, t in base.items() if "gate_projection" in n}
    legacy = {
        f"model.gate_projections.{n.split('.')[2]}.{n.split('.')[-1]}": t for n, t in gates.items()
    }
    folder = change(GOLDEN / "base", tmp_path / "legacy", **dict.fromkeys(gates), **legacy)
    for p, q in zip(
        load_model(folder).parameters(), load_model(GOLDEN / "base").parameters(), strict=True
    ):
        assert torch.equal(p, q)


def test_a_dense_checkpoint_gets_zero_gates(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    gates = {n: None for n in base if "gate_projection" in n}
    model = load_model(change(GOLDEN / "base", tmp_path / "dense", **gates))
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.zeros_like(p) if name in gates else base[name])


def test_weights_in_several_files(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    names = sorted(base)
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({n: base[n] for n in part}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    assert torch.equal(load_model(tmp_path).lm_head.weight, base["lm_head.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight is not part of the model"),
        ({"model.norm.weight": torch.zeros(3)}, r"is \[3\], the model has \[64\]"),
        ({"model.layers.1.gate_projection.bias": None}, "gate_projection.bias is missing"),
    ],
)
def test_names_and_shapes_must_match(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = change(GOLDEN / "base", tmp_path / "x", **tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_config_round_trip_and_refusals(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = replace(TINY, loop_num=3, attention_bias=True, rope_theta=1e4)
    file.write_text(json.dumps(to_hf(config)))
    assert read_hf_config(tmp_path) == config
    for change_, message in (
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"plt_num_loops": 2}, "plt_num_loops"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
    ):
        file.write_text(json.dumps(to_hf(config) | change_))
        with pytest.raises(UsageError, match=message):
            read_hf_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_a_llama_has_one_loop_and_derived_head_width(tmp_path: Path) -> None:
    content = to_hf(TINY)
    for key in ("loop_num", "loop_window_size", "head_dim", "rope_theta"):
        del content[key]
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_hf_config(tmp_path)
    assert (config.loop_num, config.head_dim, config.rope_theta) == (1, 4, 1e4)


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, LoopCoder(TINY), {}, keep=1)
    checkpoint.require_config(folder, TINY)
    with pytest.raises(CheckpointError, match=r"model\.loop_num was 2, is 1"):
        checkpoint.require_config(folder, replace(TINY, loop_num=1))


def test_heads_must_divide() -> None:
    with pytest.raises(RecipeError, match="multiple"):
        replace(TINY, num_attention_heads=3, num_key_value_heads=2)
