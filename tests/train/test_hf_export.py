"""Folders written for other tools, as files; `test_hf_transformers.py` loads them there."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from codeflow.errors import UsageError
from codeflow.train import hf_export
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import export, load_model, main, read_hf_config
from codeflow.train.model import LoopCoder

SMALL = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, loop_window_size=4,
)  # fmt: skip
SHAPES = {
    "looped": SMALL,
    "three loops": replace(SMALL, loop_num=3),
    "tied, biases, narrow heads": replace(
        SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=4
    ),
    "second version": replace(
        SMALL,
        plt_emb_scale=0.7,
        plt_hidden_scale=0.05,
        plt_normalize_per_loop=True,
        plt_gate_use_hidden_states=True,
    ),
    "dense": replace(SMALL, loop_num=1),
}


def random_model(config: ModelConfig) -> LoopCoder:
    """All parameters are random, those too that start as zeros or ones."""
    model = LoopCoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def tokenizer(folder: Path, *tokens: str) -> Path:
    vocabulary = {token: i for i, token in enumerate(("a", "b", *tokens))}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens(list(tokens))
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_round_trip_is_exact(tmp_path: Path, config: ModelConfig) -> None:
    model = random_model(config)
    out = export(model, tmp_path / "out")
    again = load_model(out)
    assert again.config == config
    assert_same(again, model)
    assert_same(load_model(export(out, tmp_path / "again")), model)


@pytest.mark.parametrize("shard_bytes", [1, 5000, 20000])
def test_shards(tmp_path: Path, shard_bytes: int) -> None:
    model = random_model(SMALL)
    out = export(model, tmp_path / "out", shard_bytes=shard_bytes)
    index = read(out / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    held = {file: load_file(out / file) for file in files}
    for tensors in held.values():
        size = sum(t.numel() * 4 for t in tensors.values())
        assert size <= shard_bytes or len(tensors) == 1
    assert index["weight_map"] == {n: file for file, tensors in held.items() for n in tensors}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert_same(load_model(out), model)


def test_names_and_config_for_other_tools(tmp_path: Path) -> None:
    out = export(random_model(SMALL), tmp_path / "out", target="vllm")
    assert {file.name for file in out.iterdir()} == {
        "config.json", "configuration_loopcoder.py", "modeling_loopcoder.py", "model.safetensors",
    }  # fmt: skip
    names = load_file(out / "model.safetensors").keys()
    gates = {n for n in names if "gate_projection" in n}
    assert gates == {
        f"model.gate_projections.{i}.{part}" for i in range(2) for part in ("weight", "bias")
    }
    config = read(out / "config.json")
    assert config["architectures"] == ["IQuestLoopCoderForCausalLM"]
    assert config["model_type"] == "iquestloopcoder"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert (config["loop_num"], config["loop_window_size"]) == (2, 4)
    assert not [key for key in config if key.startswith("plt_")]
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}(" in (out / f"{module}.py").read_text()
    mode = stat.S_IMODE(out.stat().st_mode)
    assert mode == 0o755
    assert all(file.stat().st_mode & stat.S_IRGRP for file in out.iterdir())


def test_the_second_version_for_vllm(tmp_path: Path) -> None:
    out = export(random_model(SHAPES["second version"]), tmp_path / "out", target="vllm")
    gates = {n for n in load_file(out / "model.safetensors") if "gate" in n and "_proj" not in n}
    parts = ("weight", "bias", "gate_norm.weight")
    assert gates == {f"model.layers.{i}.self_attn.plt_gate.{p}" for i in range(2) for p in parts}
    config = read(out / "config.json")
    assert config["plt_num_loops"] == config["loop_num"] == 2
    assert config["plt_gate_use_hidden_states"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 4}, "head_dim 4 times num_attention_heads 4 is not hidden_size 32"),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(LoopCoder(replace(SMALL, **change)), tmp_path / "out", target="vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_as_a_llama(tmp_path: Path) -> None:
    model = random_model(SHAPES["dense"])
    out = export(model, tmp_path / "out", target="llama")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    config = read(out / "config.json")
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert not [key for key in config if key.startswith(("loop_", "plt_", "auto_map"))]
    names = load_file(out / "model.safetensors").keys()
    assert names == {n for n in model.state_dict() if "gate_projection" not in n}
    again = load_model(out)
    assert again.config == replace(model.config, loop_window_size=64)
    ids, docs = torch.arange(20), Documents.of([20])
    with torch.no_grad():
        assert torch.equal(again(ids, docs).hidden, model(ids, docs).hidden)
    with pytest.raises(UsageError, match="runs 2 loops"):
        export(LoopCoder(SMALL), tmp_path / "looped", target="llama")


def test_bfloat16(tmp_path: Path) -> None:
    model = random_model(SMALL)
    out = export(model, tmp_path / "out", dtype=torch.bfloat16)
    assert read(out / "config.json")["torch_dtype"] == "bfloat16"
    for name, tensor in load_model(out).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


def test_a_tokenizer_file_gets_its_settings(tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "tokenizer", "<|endoftext|>")
    out = export(LoopCoder(SMALL), tmp_path / "out", tokenizer=file)
    assert (out / "tokenizer.json").read_bytes() == file.read_bytes()
    settings = read(out / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == "<|endoftext|>"
    assert read(out / "generation_config.json") == {"eos_token_id": 2, "pad_token_id": 2}
    assert read(out / "config.json")["eos_token_id"] == 2
    assert read_hf_config(out) == SMALL


def test_a_tokenizer_of_packed_conversations_brings_their_template(tmp_path: Path) -> None:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    file = tokenizer(tmp_path / "tokenizer", *special)
    out = export(LoopCoder(SMALL), tmp_path / "out", tokenizer=file)
    assert read(out / "generation_config.json") == {"eos_token_id": [2, 4], "pad_token_id": 2}
    template = jinja2.Template(read(out / "tokenizer_config.json")["chat_template"])
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    asked = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages=turns[:1], add_generation_prompt=True) == asked
    assert template.render(messages=turns) == asked + "That.<|im_end|>\n"


def test_a_tokenizer_folder_keeps_its_settings(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tokenizer", "</s>", "<pad>").parent
    settings = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "unrelated.bin").write_text("")
    out = export(LoopCoder(SMALL), tmp_path / "out", tokenizer=folder)
    assert read(out / "tokenizer_config.json") == settings
    assert read(out / "generation_config.json") == {"eos_token_id": 2, "pad_token_id": 3}
    assert not (out / "unrelated.bin").exists()


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    out = export(LoopCoder(SMALL), tmp_path / "out", tokenizer=tokenizer(tmp_path / "tokenizer"))
    assert "eos_token" not in read(out / "tokenizer_config.json")
    assert not (out / "generation_config.json").exists()
    assert "eos_token_id" not in read(out / "config.json")


def test_unusable_tokenizers(tmp_path: Path) -> None:
    large = tokenizer(tmp_path / "large", *(f"<{i}>" for i in range(39)))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for file, message in (
        (large, "has token id 40, the model's vocabulary 40"),
        (broken, r"broken\.json: cannot be read"),
        (tmp_path / "absent.json", r"absent\.json: cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            export(LoopCoder(SMALL), tmp_path / "out", tokenizer=file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.json", "large"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        export(LoopCoder(SMALL), tmp_path)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(hf_export, "write_weights", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        export(LoopCoder(SMALL), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean `vllm`"):
        export(LoopCoder(SMALL), tmp_path / "out", target="vlm")  # type: ignore[arg-type]


def test_main_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = export(random_model(SMALL), tmp_path / "source")
    out = tmp_path / "deep" / "out"
    arguments = ["export", str(source), str(out), "--target", "vllm", "--dtype", "bfloat16"]
    assert main([*arguments, "--shard-bytes", "9000"]) == 0
    first, files, then = capsys.readouterr().out.splitlines()
    assert first == str(out)
    assert "MB in config.json, configuration_loopcoder.py" in files
    assert then == f"next: vllm serve {out} --trust-remote-code"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "x")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_main_exports_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    for step in (3, 12):
        model = random_model(replace(SMALL, max_position_embeddings=1000 + step))
        export(model, tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert load_model(tmp_path / "out").config.max_position_embeddings == 1012
