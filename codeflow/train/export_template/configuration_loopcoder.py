"""Configuration of a LoopCoder for transformers (4.57 or newer, and 5)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class IQuestLoopCoderConfig(PretrainedConfig):
    """Shape of a LoopCoder: a Llama whose layers run `loop_num` times with the same weights.

    Args:
        loop_num: How often the layers run; 1 is a Llama.
        loop_window_size: Tokens seen by the local attention of later loops, itself included.
        plt_emb_scale: Share of the embedding in what each later loop starts from.
        plt_hidden_scale: Share of the previous loop in what a later loop starts from.
        plt_normalize_per_loop: Apply the final norm after every loop, not only the last.
        plt_gate_use_hidden_states: Gates read the residual stream instead of the query.

    The other arguments mean what they mean for a Llama. RoPE has no scaling; its base is
    `rope_theta` or, as transformers 5 writes it, `rope_parameters["rope_theta"]`.
    """

    model_type = "iquestloopcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, the library's convention

    def __init__(
        self,
        vocab_size: int = 76800,
        hidden_size: int = 5120,
        intermediate_size: int = 27648,
        num_hidden_layers: int = 80,
        num_attention_heads: int = 40,
        num_key_value_heads: int = 8,
        head_dim: int | None = None,
        max_position_embeddings: int = 131072,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 5e5,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        hidden_act: str = "silu",
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        loop_num: int = 2,
        loop_window_size: int = 64,
        plt_emb_scale: float = 0.0,
        plt_hidden_scale: float = 1.0,
        plt_normalize_per_loop: bool = False,
        plt_gate_use_hidden_states: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        rope = {"rope_type": "default", "rope_theta": rope_theta, **(rope_parameters or {})}
        if rope["rope_type"] != "default" or rope_scaling:
            raise ValueError(f"LoopCoder has no scaled RoPE: {rope_scaling or rope}")
        if hidden_act != "silu" or attention_dropout:
            raise ValueError("LoopCoder has hidden_act 'silu' and no attention_dropout")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope
        self.rope_theta = rope["rope_theta"]
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self.loop_num = loop_num
        self.loop_window_size = loop_window_size
        self.plt_emb_scale = plt_emb_scale
        self.plt_hidden_scale = plt_hidden_scale
        self.plt_normalize_per_loop = plt_normalize_per_loop
        self.plt_gate_use_hidden_states = plt_gate_use_hidden_states
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
