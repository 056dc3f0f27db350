"""Exported models in the real transformers, 4 and 5, each in its own process.

`make tools` installs both beside the virtual environment's packages. The environment variables
CODEFLOW_TRANSFORMERS_4 and CODEFLOW_TRANSFORMERS_5 name other folders that hold them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.hf import export, load_model, read_hf_config
from codeflow.train.hf_weights import hf_name
from codeflow.train.loss import IGNORE
from codeflow.train.model import LoopCoder

pytestmark = pytest.mark.slow  # starting transformers takes about five seconds a version

SCRIPT = Path(__file__).with_name("run_in_transformers.py")
LOOPED = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, loop_num=3, loop_window_size=5,
)  # fmt: skip
CONFIGS = {
    "looped": LOOPED,
    "second": replace(
        LOOPED,
        loop_num=2,
        plt_emb_scale=0.7,
        plt_hidden_scale=0.3,
        plt_normalize_per_loop=True,
        plt_gate_use_hidden_states=True,
    ),
    "tied": replace(
        LOOPED,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        head_dim=6,
        loop_window_size=1,
    ),
    "llama": replace(LOOPED, loop_num=1),
}
LOOPS = ["looped", "second", "tied"]
IDS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Run:
    """What a version of transformers made of the exported models.

    Attributes:
        folder: Of the exported models, and of what transformers saved.
        models: What was exported.
        tensors: By name, as the script wrote them.
        facts: The same for what is not a tensor.
    """

    folder: Path
    models: dict[str, LoopCoder]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def packages(version: str) -> Path:
    """The folder that holds a version of transformers."""
    given = os.environ.get(f"CODEFLOW_TRANSFORMERS_{version}")
    folder = Path(given) if given else Path(sys.prefix) / f"transformers-{version}"
    if not (folder / "transformers").is_dir():
        pytest.skip(f"transformers {version} is not in {folder}; `make tools` puts it there")
    return folder


def random_model(config: ModelConfig) -> LoopCoder:
    """Large weights, so that a mistake shows in the logits."""
    model = LoopCoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25 * torch.randn(p.shape, generator=generator))
    return model


def write_inputs(folder: Path) -> dict[str, LoopCoder]:
    built = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens(["<|endoftext|>"])
    built.save(str(folder / "tokenizer.json"))
    made = {name: random_model(config) for name, config in CONFIGS.items()}
    for name in LOOPS:
        export(made[name], folder / name, tokenizer=folder / "tokenizer.json", shard_bytes=9000)
    export(made["llama"], folder / "llama", target="llama")
    export(made["looped"], folder / "gateless")
    weights = load_file(folder / "gateless" / "model.safetensors")
    dense = {n: t for n, t in weights.items() if "gate_projections" not in n}
    save_file(dense, folder / "gateless" / "model.safetensors", metadata={"format": "pt"})
    save_file({"ids": IDS}, folder / "ids.safetensors")
    return made


@pytest.fixture(scope="module", params=["4", "5"], ids=["transformers-4", "transformers-5"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = packages(request.param)
    folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
    made = write_inputs(folder)
    environment = os.environ | {
        "PYTHONPATH": str(path),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads((folder / "results.json").read_text())
    assert facts["version"].startswith(f"{request.param}.")
    return Run(folder, made, load_file(folder / "results.safetensors"), facts)


def logits(model: LoopCoder, *lengths: int, ids: Tensor = IDS) -> Tensor:
    """The trainer's, (rows, T, V); documents of these lengths, by default one a row."""
    rows, columns = ids.shape
    docs = Documents.of(lengths or [columns] * rows)
    with torch.no_grad():
        return model.logits(model(ids.flatten(), docs).hidden).view(rows, columns, -1)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("name", LOOPS)
def test_logits(run: Run, name: str) -> None:
    expected = logits(run.models[name])
    assert expected.std() > 0.5
    assert_close(run.tensors[f"{name}/logits"], expected)
    assert_close(run.tensors[f"{name}/last"], expected[:, -2:])


@pytest.mark.parametrize("name", LOOPS)
def test_loss_and_gradients(run: Run, name: str) -> None:
    model = run.models[name]
    labels = IDS.clone()
    labels[0, :5] = IGNORE
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    total = model(IDS.flatten(), Documents.of([24, 24]), shifted).loss
    targets = int((shifted != IGNORE).sum())
    assert_close(run.tensors[f"{name}/loss"], total.detach() / targets, 1e-5)
    assert_close(run.tensors[f"{name}/loss of 10 items"], total.detach() / 10, 1e-4)
    model.zero_grad()
    (total / targets).backward()
    for own, p in model.named_parameters():
        theirs = run.tensors[f"{name}/grad/{hf_name(own, model.config)}"]
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        assert_close(theirs, p.grad)
    assert run.facts[f"{name}/cache in training"] is False


@pytest.mark.parametrize("name", LOOPS)
def test_decoding_with_the_cache_is_the_full_forward_pass(run: Run, name: str) -> None:
    assert run.facts[f"{name}/cache"] == "LoopCache"
    assert_close(run.tensors[f"{name}/decoded"], run.tensors[f"{name}/logits"])
    # The window less one, and everything; transformers does not shorten windows of one.
    window = CONFIGS[name].loop_window_size
    assert run.facts[f"{name}/kept"] == ([window - 1, 24] if window > 1 else [24])


@pytest.mark.parametrize("name", LOOPS)
def test_generation(run: Run, name: str) -> None:
    by_hand = run.tensors[f"{name}/by hand"]
    assert len(by_hand.unique()) > 3
    assert torch.equal(run.tensors[f"{name}/generated"], by_hand)
    assert run.facts[f"{name}/read"] == [9] + 11 * [1]  # the cache was used
    assert torch.equal(run.tensors[f"{name}/generated after padding"], by_hand)
    beams = run.tensors[f"{name}/beams"]
    assert torch.equal(beams, run.tensors[f"{name}/beams without cache"])
    # And it is what the trainer would say.
    ours = logits(run.models[name], ids=by_hand)[:, 8:-1].argmax(-1)
    assert torch.equal(ours, by_hand[:, 9:])


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", LOOPS)
def test_padding_changes_nothing(run: Run, name: str, side: str) -> None:
    expected = logits(run.models[name], ids=IDS[:, :9])
    assert_close(run.tensors[f"{name}/padded/{side}"], expected)


@pytest.mark.parametrize("name", LOOPS)
def test_packed_rows_are_kept_apart(run: Run, name: str) -> None:
    assert_close(run.tensors[f"{name}/packed"], logits(run.models[name], 10, 14, ids=IDS[:1]))


@pytest.mark.parametrize("name", LOOPS)
def test_saved_by_transformers_and_read_back(run: Run, name: str) -> None:
    saved = run.folder / f"saved-{name}"
    assert read_hf_config(saved) == CONFIGS[name]
    again = load_model(saved).state_dict()
    for parameter, tensor in run.models[name].state_dict().items():
        assert torch.equal(again.pop(parameter), tensor), parameter
    assert not again
    saved_logits = run.tensors[f"{name}/logits after saving"]
    assert torch.equal(saved_logits, run.tensors[f"{name}/logits"])
    assert run.facts[f"{name}/buffers"] == []


def test_bfloat16_stays_near(run: Run) -> None:
    exact = logits(run.models["looped"])
    assert (run.tensors["bfloat16"] - exact).norm() / exact.norm() < 5e-2


def test_missing_gates_become_zero(run: Run) -> None:
    found = [t for name, t in run.tensors.items() if name.startswith("gateless/")]
    assert len(found) == 4
    for tensor in found:
        assert tensor.eq(0).all()


def test_a_dense_model_is_a_llama(run: Run) -> None:
    assert run.facts["llama"] == "LlamaForCausalLM"
    assert_close(run.tensors["llama"], logits(run.models["llama"]))


def test_a_llama_of_theirs_in_shards(run: Run) -> None:
    assert len(list((run.folder / "dense").glob("*.safetensors"))) > 1
    model = load_model(run.folder / "dense")
    assert model.config.loop_num == 1
    assert_close(logits(model), run.tensors["dense"])


def test_the_tokenizer_is_found(run: Run) -> None:
    assert run.facts["tokenizer"] == [0, 1, 2]
    assert run.facts["eos"] == 2


def test_what_it_cannot_do_is_said(run: Run) -> None:
    attentions, mask = run.facts["refusals"]
    assert "neither attentions" in attentions
    assert "attention_mask must be" in mask
