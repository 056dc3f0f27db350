"""Models in the format of the Hugging Face hub: `config.json` and `*.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.settings import build
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.model import LoopCoder

_LEGACY_GATE = re.compile(r"model\.gate_projections\.(\d+)\.(weight|bias)")
_GATE = re.compile(r"model\.layers\.\d+\.gate_projection\.(weight|bias)")


def load_model(
    folder: str | Path, *, backend: str = "sdpa", dtype: torch.dtype = torch.float32
) -> LoopCoder:
    """A model from an HF folder: `config.json` and one or more `*.safetensors` with weights.

    Raises:
        UsageError: `config.json` is unusable.
        CheckpointError: The weights are.
    """
    config: ModelConfig = read_hf_config(folder)
    model = LoopCoder(config, backend=backend, dtype=dtype)
    load_weights(model, Path(folder))
    return model


def load_weights(model: LoopCoder, folder: Path) -> None:
    """Fill a model from a folder; every name and shape must match.

    Gates may have their old names (`model.gate_projections.N.*`). Weights of a dense Llama have
    no gates: then, and only then, all gates become zero, which means half global, half local.

    Raises:
        CheckpointError: No weights there, or names or shapes that do not fit.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: cannot be read: {e}") from e
    tensors = {
        _LEGACY_GATE.sub(r"model.layers.\1.gate_projection.\2", n): t for n, t in tensors.items()
    }
    own = model.state_dict()
    if not any(_GATE.fullmatch(name) for name in tensors):
        tensors |= {n: torch.zeros_like(t) for n, t in own.items() if _GATE.fullmatch(n)}
    problems = [f"{n} is missing" for n in own.keys() - tensors.keys()]
    problems += [f"{n} is not part of the model" for n in tensors.keys() - own.keys()]
    problems += [
        f"{n} is {list(tensors[n].shape)}, the model has {list(own[n].shape)}"
        for n in own.keys() & tensors.keys()
        if own[n].shape != tensors[n].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise CheckpointError(
            f"{folder}: weights do not fit its config.json ({len(problems)} differences): {shown}"
        )
    model.load_state_dict(tensors)


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The model of an HF `config.json`.

    Raises:
        UsageError: No readable `config.json`, a field missing, or one that asks for mathematics
            that this model does not have.
    """
    file = Path(folder) / "config.json"
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{file}: cannot be read as a model configuration: {e}") from e
    _refuse_other_mathematics(content, file)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    rope = content.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta
    known = {k: v for k, v in (rope | content).items() if k in names and v is not None}
    required = names - {"head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"}
    required -= {"loop_num", "loop_window_size", "initializer_range"}
    if missing := sorted(required - known.keys()):
        raise UsageError(f"{file}: lacks {', '.join(missing)}")
    known.setdefault("loop_num", 1)  # a Llama, not the default of our own recipes
    config = build(ModelConfig, known, str(file))
    if "head_dim" in known:
        return config
    return dataclasses.replace(config, head_dim=config.hidden_size // config.num_attention_heads)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, with the names that other tools know it by."""
    return {
        "architectures": ["IQuestLoopCoderForCausalLM"],
        "model_type": "iquestloopcoder",
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        **dataclasses.asdict(config),
    }


def _refuse_other_mathematics(content: Mapping[str, Any], file: Path) -> None:
    if not isinstance(content, dict):
        raise UsageError(f"{file}: is not a JSON object")
    expected = {"hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0}
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise UsageError(f"{file}: {key} {content[key]!r} is not supported, only {value!r}")
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UsageError(f"{file}: rope_parameters {rope!r}: only the default RoPE is supported")
    if variant := sorted(key for key in content if key.startswith("plt_")):
        raise UsageError(f"{file}: {', '.join(variant)}: this loop variant is not supported")
