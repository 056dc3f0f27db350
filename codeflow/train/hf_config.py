"""`config.json` of the Hugging Face format, read and written.

Two versions of the looped model exist in that format. `loop_num` and `loop_window_size` describe
the first; any `plt_*` key, whatever its value, tells other tools that it is the second
(LoopCoder-V2), whose number of loops is `plt_num_loops`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codeflow.errors import UsageError
from codeflow.settings import build
from codeflow.train.config import ModelConfig

_LOOPED = "iquestloopcoder"
_DENSE = ("llama", "iquestcoder")  # the same mathematics under two names
_KNOBS = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith("plt_")}
_OPTIONAL = {
    "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "initializer_range",
    "loop_num", "loop_window_size", *_KNOBS,
}  # fmt: skip
#: Keys that change what a model computes, and the only values this one has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "clip_qkv": (None,),
    "quantization_config": (None,),
}


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The model of an HF `config.json`.

    Raises:
        UsageError: No folder, no readable `config.json`, a field missing, or one that asks for
            mathematics that this model does not have.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder")
    file = Path(folder) / "config.json"
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{file}: cannot be read as a model configuration: {e}") from e
    if not isinstance(content, dict):
        raise UsageError(f"{file}: is not a JSON object")
    _refuse_other_models(content, file)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    known = {k: v for k, v in content.items() if k in names and v is not None}
    known |= _rope_theta(content, file) | _second_version(content, file)
    if content.get("model_type") in _DENSE:
        known = _llama_defaults(content) | known | {"loop_num": 1}
    if missing := sorted(names - _OPTIONAL - known.keys()):
        raise UsageError(f"{file}: lacks {', '.join(missing)}")
    known.setdefault("loop_num", 1)  # a Llama, not the default of our own recipes
    config = build(ModelConfig, known, str(file))
    if "head_dim" in known:
        return config
    return dataclasses.replace(config, head_dim=config.hidden_size // config.num_attention_heads)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, with the names that other tools know it by."""
    fields = dataclasses.asdict(config)
    if all(fields[name] == default for name, default in _KNOBS.items()):
        fields = {name: value for name, value in fields.items() if name not in _KNOBS}
    else:
        fields["plt_num_loops"] = config.loop_num
    return {
        "architectures": ["IQuestLoopCoderForCausalLM"],
        "model_type": _LOOPED,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        **fields,
    }


def to_llama(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model with one loop, as the Llama that it is."""
    content = to_hf(config) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {k: v for k, v in content.items() if not k.startswith(("loop_", "plt_"))}


def _refuse_other_models(content: Mapping[str, Any], file: Path) -> None:
    known = (_LOOPED, *_DENSE)
    model_type = content.get("model_type")
    if model_type is not None and model_type not in known:
        reason = ", whose q, k and v have biases and o has none," if model_type == "qwen2" else ""
        raise UsageError(
            f"{file}: model_type {model_type!r}{reason} is not supported, only {', '.join(known)}"
        )
    if content.get("use_sliding_window") is False:
        content = {k: v for k, v in content.items() if k != "sliding_window"}
    for key, values in _FIXED.items():
        if content.get(key, values[0]) not in values:
            raise UsageError(f"{file}: {key} {content[key]!r} is not supported, only {values[0]!r}")


def _rope_theta(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The base of RoPE; transformers 5 keeps it in `rope_parameters`."""
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UsageError(f"{file}: rope_parameters {rope!r}: only the default RoPE is supported")
    given = {t for t in (rope.get("rope_theta"), content.get("rope_theta")) if t is not None}
    if len(given) > 1:
        raise UsageError(f"{file}: rope_theta and rope_parameters disagree: {sorted(given)}")
    return {"rope_theta": given.pop()} if given else {}


def _second_version(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The number of loops of a LoopCoder-V2; nothing for the first version."""
    given = {key for key in content if key.startswith("plt_")}
    if not given:
        return {}
    if unknown := sorted(given - _KNOBS.keys() - {"plt_num_loops", "plt_window_size"}):
        raise UsageError(f"{file}: {', '.join(unknown)}: this loop variant is not supported")
    if missing := sorted(_KNOBS.keys() - given):
        raise UsageError(f"{file}: lacks {', '.join(missing)}, which go with {min(given)}")
    # Published values such as [64, 0] do not say whether the token itself is counted.
    if "plt_window_size" in given and content.get("loop_window_size") is None:
        raise UsageError(
            f"{file}: add loop_window_size, the tokens that local attention sees with the token "
            f"itself: plt_window_size {content['plt_window_size']!r} does not say which it counts"
        )
    loops = {content[k] for k in ("loop_num", "plt_num_loops") if content.get(k) is not None}
    if len(loops) != 1:
        raise UsageError(f"{file}: loop_num and plt_num_loops must be one number: {sorted(loops)}")
    return {"loop_num": loops.pop()}


def _llama_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """What an early Llama's `config.json` leaves out."""
    defaults = {"rope_theta": 10000.0}
    if "num_attention_heads" in content:
        defaults["num_key_value_heads"] = content["num_attention_heads"]
    return defaults
