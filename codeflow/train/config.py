"""The shape of a model, as settings, and its named sizes.

Field names are those of HF configurations, so that a `config.json` needs no translation table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codeflow.errors import RecipeError
from codeflow.settings import setting


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
