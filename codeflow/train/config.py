"""What a model is and how it is trained, as settings; also the HF `config.json` of a model.

Field names are those of HF configurations, so that a `config.json` needs no translation table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeflow.errors import RecipeError, UsageError
from codeflow.settings import build, setting


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LoopCoder; `loop_num=1` is a dense Llama."""

    vocab_size: int = setting(76800, "Rows of the embedding; at least the tokenizer's.", minimum=1)
    hidden_size: int = setting(128, "Width of the residual stream.", minimum=1)
    intermediate_size: int = setting(384, "Width of the gated MLP.", minimum=1)
    num_hidden_layers: int = setting(4, "Layers; all of them run in each loop.", minimum=1)
    num_attention_heads: int = setting(4, "Query heads.", minimum=1)
    num_key_value_heads: int = setting(2, "Key and value heads, shared by query heads.", minimum=1)
    head_dim: int = setting(32, "Width of a head; even, for RoPE.", minimum=2)
    max_position_embeddings: int = setting(131072, "Context of the model.", unit="tokens")
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights.")
    rms_norm_eps: float = setting(1e-5, "Added to the mean square in RMSNorm.")
    rope_theta: float = setting(5e5, "Base of the rotary embedding.")
    tie_word_embeddings: bool = setting(False, "Use the embedding as the output layer.")
    attention_bias: bool = setting(False, "Biases in the q, k, v and o projections.")
    mlp_bias: bool = setting(False, "Biases in the MLP.")
    loop_num: int = setting(2, "How often the layers run.", source="LoopCoder paper", minimum=1)
    loop_window_size: int = setting(
        64, "Tokens seen by local attention, itself included.", unit="tokens", minimum=1
    )

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise RecipeError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise RecipeError(f"model.head_dim ({self.head_dim}) must be even: RoPE turns pairs")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
"""Named sizes without embeddings: tiny 0.8 M parameters (a CPU demo), small 22.6 M."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step is one optimizer update on `batch_rows` packed rows."""

    steps: int = setting(200, "Optimizer updates.", minimum=1)
    batch_rows: int = setting(1, "Packed rows of one step.", unit="rows", minimum=1)
    micro_rows: int = setting(
        1, "Rows in one forward pass; more memory, fewer launches.", unit="rows", minimum=1
    )
    max_length: int | None = setting(
        None, "Crop rows to this length, and count what is lost; unset: never.", minimum=2
    )
    learning_rate: float = setting(3e-3, "Peak of the schedule.", minimum=0)
    min_learning_rate: float = setting(0.1, "End of the decay, as a share of the peak.", minimum=0)
    warmup_steps: int = setting(20, "Steps of linear warm-up.", minimum=0)
    schedule: str = setting(
        "cosine", "Decay after warm-up.", choices=("constant", "linear", "cosine")
    )
    clip_norm: float = setting(1.0, "Largest global norm of the gradient.", minimum=0)
    weight_decay: float = setting(0.1, "Of matrices other than embeddings and gates.", minimum=0)
    beta1: float = setting(0.9, "AdamW.", minimum=0, maximum=1)
    beta2: float = setting(0.95, "AdamW.", minimum=0, maximum=1)
    epsilon: float = setting(1e-8, "AdamW.", minimum=0)
    seed: int = setting(0, "Of the initial weights and the order of rows.", minimum=0)
    device: str = setting("auto", "`cuda`, `cpu`, …; `auto`: cuda when there is one.")
    dtype: str = setting(
        "float32",
        "Of activations; weights stay float32.",
        choices=("float32", "bfloat16"),
    )
    backend: str = setting("sdpa", "How attention is computed.", choices=("sdpa", "dense"))
    log_every: int = setting(10, "Between progress lines.", unit="steps", minimum=1)
    checkpoint_every: int = setting(100, "Between checkpoints.", unit="steps", minimum=1)
    keep_checkpoints: int = setting(2, "Older checkpoints are deleted.", minimum=1)

    def __post_init__(self) -> None:
        if self.batch_rows % self.micro_rows:
            raise RecipeError(
                f"train.batch_rows ({self.batch_rows}) must be a multiple of "
                f"train.micro_rows ({self.micro_rows})"
            )


@dataclass(frozen=True)
class RunConfig:
    """The two sections of a training configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


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
