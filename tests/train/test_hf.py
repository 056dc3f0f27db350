"""Reading `config.json` and weights of the Hugging Face format."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import load_model, read_hf_config, to_hf

BASE = Path(__file__).parents[1] / "data" / "loopcoder" / "base"
INDEX = "model.safetensors.index.json"
TINY = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
SECOND = replace(TINY, plt_emb_scale=0.5, plt_gate_use_hidden_states=True)


def write_config(folder: Path, content: dict[str, Any], *removed: str) -> Path:
    kept = {k: v for k, v in content.items() if k not in removed}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The base model's configuration with other weights."""
    folder.mkdir()
    shutil.copy(BASE / "config.json", folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, parts: list[dict[str, Tensor]]) -> Path:
    """The base model's configuration with weights in files of any name, and their index."""
    folder.mkdir()
    shutil.copy(BASE / "config.json", folder)
    weight_map = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return load_file(BASE / "model.safetensors")


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    state = load_model(folder).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("config", [TINY, SECOND, replace(TINY, loop_num=3, mlp_bias=True)])
def test_config_round_trip(tmp_path: Path, config: ModelConfig) -> None:
    assert read_hf_config(write_config(tmp_path, to_hf(config))) == config


def test_the_first_version_has_no_keys_of_the_second() -> None:
    assert not [key for key in to_hf(TINY) if key.startswith("plt_")]
    assert to_hf(SECOND)["plt_num_loops"] == SECOND.loop_num


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "disagree"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2"}, "qwen2.*biases"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_theta": None, "rope_parameters": None}, "lacks rope_theta"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"plt_num_loops": 2}, "lacks plt_emb_scale"),
        ({"plt_surprise": 1}, "plt_surprise"),
    ],
)
def test_other_mathematics_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_hf_config(write_config(tmp_path, to_hf(TINY) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plt_num_loops": 3}, "one number"),
        ({"loop_window_size": None, "plt_window_size": [64, 0]}, "add loop_window_size"),
        ({"plt_hidden_scale": None, "plt_shift": True}, "plt_shift"),
    ],
)
def test_unclear_second_versions_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_hf_config(write_config(tmp_path, to_hf(SECOND) | change))


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_the_second_version_may_name_its_loops_alone(tmp_path: Path) -> None:
    folder = write_config(tmp_path, to_hf(replace(SECOND, loop_num=3)), "loop_num")
    assert read_hf_config(folder).loop_num == 3


def test_a_llama_has_one_loop_and_derived_fields(tmp_path: Path) -> None:
    absent = ("loop_num", "loop_window_size", "head_dim", "rope_theta", "rope_parameters")
    content = to_hf(TINY) | {"model_type": "llama"}
    config = read_hf_config(write_config(tmp_path, content, *absent, "num_key_value_heads"))
    assert (config.loop_num, config.head_dim) == (1, 4)
    assert (config.rope_theta, config.num_key_value_heads) == (1e4, 2)  # early Llamas' defaults


def test_a_sliding_window_that_is_switched_off(tmp_path: Path) -> None:
    off = {"use_sliding_window": False, "sliding_window": 4096}
    assert read_hf_config(write_config(tmp_path, to_hf(TINY) | off)) == TINY


def test_rope_theta_as_transformers_5_writes_it(tmp_path: Path) -> None:
    content = to_hf(TINY) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read_hf_config(write_config(tmp_path, content, "rope_theta")).rope_theta == 1e6


@pytest.mark.parametrize(
    "naming",
    [
        "model.gate_projections.{}.{}",
        "model.layers.{}.self_attn.plt_gate.{}",
        "model.layers.{}.self_attn.loop_gate_proj.{}",
    ],
)
def test_every_gate_naming_is_the_same_model(
    tmp_path: Path, base: dict[str, Tensor], naming: str
) -> None:
    renamed = {
        naming.format(n.split(".")[2], n.split(".")[-1]) if "gate_projection" in n else n: t
        for n, t in base.items()
    }
    assert renamed.keys() != base.keys()
    assert_same(write_weights(tmp_path / "x", renamed), base)


def test_gates_are_zero_only_where_there_are_none(tmp_path: Path, base: dict[str, Tensor]) -> None:
    dense = {n: t for n, t in base.items() if "gate_projection" not in n}
    zero = {n: torch.zeros_like(t) for n, t in base.items() if "gate_projection" in n}
    assert_same(write_weights(tmp_path / "dense", dense), dense | zero)
    one = "model.layers.1.gate_projection.bias"
    part = {n: t for n, t in base.items() if n != one}
    with pytest.raises(CheckpointError, match=f"{one} is missing"):
        load_model(write_weights(tmp_path / "part", part))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_becomes_float32(
    tmp_path: Path, base: dict[str, Tensor], dtype: torch.dtype
) -> None:
    narrow = {n: t.to(dtype) for n, t in base.items()}
    folder = write_weights(tmp_path / "x", narrow)
    assert_same(folder, {n: t.float() for n, t in narrow.items()})


def test_quantised_weights_are_refused(tmp_path: Path, base: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_weights(tmp_path / "x", base | {name: base[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match=f"{name} is I8"):
        load_model(folder)


def test_old_rotary_tables_are_ignored_and_nothing_else(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
    }
    assert_same(write_weights(tmp_path / "x", base | tables), base)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.freq is not part"):
        load_model(write_weights(tmp_path / "y", base | {"rotary_emb.freq": torch.ones(8)}))


def test_a_tensor_under_two_names_is_refused(tmp_path: Path, base: dict[str, Tensor]) -> None:
    twice = {"model.gate_projections.0.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match="twice"):
        load_model(write_weights(tmp_path / "x", base | twice))


def test_an_output_layer_in_a_tied_model_must_be_the_embedding(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    embedding = base["model.embed_tokens.weight"]
    same = write_weights(tmp_path / "same", base | {"lm_head.weight": embedding.clone()})
    other = write_weights(tmp_path / "other", base)
    for folder in (same, other):
        content = json.loads((folder / "config.json").read_text())
        write_config(folder, content | {"tie_word_embeddings": True})
    assert_same(same, {n: t for n, t in base.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="not the embedding"):
        load_model(other)


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{n: tensors[n] for n in part} for part in (names[::2], names[1::2])]


def test_shards_by_their_index(tmp_path: Path, base: dict[str, Tensor]) -> None:
    folder = write_shards(tmp_path / "x", halves(base))
    stray = {"model.norm.weight": torch.zeros(64)}
    save_file(stray, folder / "model-stray.safetensors")  # not in the index: not read
    assert_same(folder, base)


def test_missing_shards_are_named(tmp_path: Path, base: dict[str, Tensor]) -> None:
    folder = write_shards(tmp_path / "x", halves(base))
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files .* missing: part-1\.safetensors"):
        load_model(folder)


def test_a_damaged_shard_is_named(tmp_path: Path, base: dict[str, Tensor]) -> None:
    folder = write_shards(tmp_path / "x", halves(base))
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "not an index"),
        ("nonsense", "not an index"),
        ('{"weight_map": {"a": 3}}', "not the name of a file"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "not the name of a file"),
        ('{"weight_map": {"a.weight": "part-0.safetensors"}}', r"lacks a\.weight"),
    ],
)
def test_a_bad_index(tmp_path: Path, base: dict[str, Tensor], index: str, message: str) -> None:
    folder = write_shards(tmp_path / "x", halves(base))
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
