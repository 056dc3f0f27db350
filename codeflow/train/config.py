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
    plt_emb_scale: float = setting(
        0.0, "Share of the embedding in what each later loop starts from.", source="LoopCoder-V2"
    )
    plt_hidden_scale: float = setting(
        1.0, "Share of the previous loop in what a later loop starts from.", source="LoopCoder-V2"
    )
    plt_normalize_per_loop: bool = setting(
        False, "Apply the final norm after every loop, not only the last.", source="LoopCoder-V2"
    )
    plt_gate_use_hidden_states: bool = setting(
        False, "Gates read the residual stream instead of the query.", source="LoopCoder-V2"
    )

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise RecipeError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise RecipeError(f"model.head_dim ({self.head_dim}) must be even: RoPE turns pairs")


def _shape(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, head_dim: int = 128
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _shape(128, 4, 4, 2, 384, head_dim=32),
    "small": _shape(512, 8, 8, 2, 1408, head_dim=64),
    "0.6b": _shape(1280, 20, 10, 2, 4608),
    "1.2b": _shape(2048, 16, 16, 4, 7168),
    "3.4b": _shape(3072, 24, 24, 8, 10752),
    "7.6b": _shape(4096, 32, 32, 8, 14336),
    "7b-v2": {
        **_shape(5120, 14, 40, 8, 27648),
        "plt_emb_scale": 0.707,
        "plt_hidden_scale": 0.053,
        "plt_normalize_per_loop": True,
        "plt_gate_use_hidden_states": True,
    },
    "40b": _shape(5120, 80, 40, 8, 27648),
}
"""Named sizes; the vocabulary is the data's, and 76,800 where there are none.

tiny has 0.8 M parameters without embeddings (a CPU demo), small 22.6 M; the others are named after
all their parameters. 40b is the released IQuest-Coder-V1 40B-Loop, 7b-v2 the shape of LoopCoder-V2
7B, whose window of 64 is counted here with the token itself.
"""
