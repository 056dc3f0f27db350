"""LoopCoder for transformers (4.57 or newer, and 5): inference, generation and fine-tuning.

The first loop is plain causal attention. In each later loop every layer attends twice, globally to
the keys and values of the first loop and locally (a window) to its own, and mixes the two per head
and token with a gate. Nothing is kept in buffers: rotary tables are computed in float32 in every
forward pass, so they survive `.to(bfloat16)` and loading by way of the meta device.

The model reads positions (a gate reads the query after RoPE), so they must start at 0 in every
text. They do: left padding is skipped when positions are derived from the attention mask, and rows
packed with `position_ids` that restart at 0 are kept apart (without a cache). The weights belong on
one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_loopcoder import IQuestLoopCoderConfig

Pair = tuple[Tensor, Tensor]  # cosines and sines, or keys and values


class LoopCache(Cache):
    """Keys (after RoPE) and values: all tokens of the first loop, a window of each later one.

    Entry `loop * num_hidden_layers + layer` belongs to that loop and layer.
    """

    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        layers, later = config.num_hidden_layers, config.loop_num - 1
        window = config.loop_window_size
        super().__init__(
            layers=[DynamicLayer() for _ in range(layers)]
            + [DynamicSlidingWindowLayer(window) for _ in range(layers * later)]
        )


class Sight:
    """Which keys each query sees.

    Args:
        queries: Tokens of this call; they follow `past` cached ones.
        padding: (B, past + queries), 0 at padded tokens, or None.
        documents: (B, queries), the document of each token of a packed row, or None.
    """

    def __init__(
        self,
        queries: int,
        past: int,
        padding: Tensor | None,
        documents: Tensor | None,
        device: torch.device,
    ) -> None:
        self.queries, self.past, self.device = queries, past, device
        self.padding, self.documents = padding, documents
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, keys: int, window: int | None = None) -> Tensor | None:
        """Mask (B or 1, 1, queries, keys) over the last `keys` tokens; None is plain causal."""
        plain = self.padding is None and self.documents is None and window is None
        if plain and (self.past == 0 or self.queries == 1):
            return None
        if (keys, window) not in self.masks:
            self.masks[keys, window] = self._mask(keys, window)
        return self.masks[keys, window]

    def _mask(self, keys: int, window: int | None) -> Tensor:
        token = torch.arange(self.past + self.queries, device=self.device)
        distance = token[self.past :, None] - token[None, -keys:]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        seen = seen[None]
        if self.padding is not None:
            seen = seen & self.padding[:, None, -keys:].bool()
        if self.documents is not None:
            seen = seen & (self.documents[:, :, None] == self.documents[:, None, :])
        # A padded token sees itself: softmax over no key at all is NaN on some back ends.
        return (seen | (distance == 0))[:, None]


class RMSNorm(nn.Module):
    """Statistics in float32, cast, then scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Gate(nn.Module):
    """Share of global attention per head and token, (B, H, T, 1) float32.

    It reads the query of its head or, in LoopCoder-V2, the normed residual stream.
    """

    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__()
        self.gate_norm = None
        width = config.head_dim
        if config.plt_gate_use_hidden_states:
            width = config.hidden_size
            self.gate_norm = RMSNorm(width, config.rms_norm_eps)
        self.weight = nn.Parameter(torch.zeros(config.num_attention_heads, width))
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """From the residual stream before the layer's norm (B, T, h) and the query (B, H, T, D)."""
        if self.gate_norm is None:
            logits = torch.einsum("bhtd,hd->bht", q.float(), self.weight.float())
        else:
            logits = F.linear(self.gate_norm(x), self.weight).float().transpose(1, 2)
        return torch.sigmoid(logits + self.bias.float()[:, None])[..., None]


class LoopCoderMLP(nn.Module):
    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__()
        h, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(h, i, bias=bias)
        self.up_proj = nn.Linear(h, i, bias=bias)
        self.down_proj = nn.Linear(i, h, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LoopCoderAttention(nn.Module):
    """The projections, and the gate where it reads the residual stream."""

    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__()
        h, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = d
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=bias)
        if config.plt_gate_use_hidden_states:
            self.plt_gate = Gate(config)

    def qkv(self, x: Tensor, rope: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, hidden) to three (B, heads, T, D), queries and keys rotated."""
        shape = (*x.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in projections)
        return rotate(q, rope), rotate(k, rope), v


class LoopCoderLayer(nn.Module):
    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__()
        self.window = config.loop_window_size
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LoopCoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LoopCoderMLP(config)

    def forward(
        self,
        x: Tensor,
        rope: Pair,
        sight: Sight,
        remember: Callable[[Tensor, Tensor], Pair],
        gate: nn.Module,
        memory: Pair | None = None,
    ) -> tuple[Tensor, Pair]:
        """One pass; without `memory` the first loop.

        Args:
            x: (B, T, hidden), the residual stream.
            rope: Rotary tables.
            sight: Which keys the queries see.
            remember: `(k, v) -> (k, v)`: puts them behind those of earlier calls.
            gate: The layer's `Gate`, which the first loop does not use.
            memory: Keys and values of the first loop.
        """
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), rope)
        k, v = remember(k, v)
        if memory is None:
            memory = (k, v)
            mixed = attend(q, k, v, sight(k.shape[2]))
        else:
            share = gate(x, q).to(x.dtype)
            far = attend(q, *memory, sight(memory[0].shape[2]))
            near = attend(q, k, v, sight(k.shape[2], self.window))
            mixed = near + share * (far - near)
        x = x + self.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x)), memory


class LoopCoderModel(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LoopCoderLayer(config) for _ in range(config.num_hidden_layers))
        if not config.plt_gate_use_hidden_states:
            self.gate_projections = nn.ModuleList(Gate(config) for _ in self.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def gates(self) -> Sequence[nn.Module]:
        if self.config.plt_gate_use_hidden_states:
            return [layer.get_submodule("self_attn.plt_gate") for layer in self.layers]
        return list(self.gate_projections)

    def forward(self, x: Tensor, rope: Pair, sight: Sight, cache: LoopCache | None) -> Tensor:
        """(B, T, hidden) embeddings to (B, T, hidden), normed."""
        embedded = x
        memories: list[Pair | None] = [None] * len(self.layers)
        for loop in range(self.config.loop_num):
            if loop:
                x = self.next_loop(x, embedded)
            for i, (layer, gate) in enumerate(zip(self.layers, self.gates(), strict=True)):
                remember = remember_in(cache, loop * len(self.layers) + i)
                x, memories[i] = layer(x, rope, sight, remember, gate, memories[i])
        out: Tensor = self.norm(x)
        return out

    def next_loop(self, x: Tensor, embedded: Tensor) -> Tensor:
        """What a later loop starts from: the result of the loop before it, plain or mixed."""
        if self.config.plt_normalize_per_loop:
            x = self.norm(x)
        if self.config.plt_hidden_scale != 1.0:
            x = self.config.plt_hidden_scale * x
        if self.config.plt_emb_scale != 0.0:
            x = x + self.config.plt_emb_scale * embedded
        return x


class IQuestLoopCoderForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = IQuestLoopCoderConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: IQuestLoopCoderConfig) -> None:
        super().__init__(config)
        self.model = LoopCoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # By way of nn.init, which transformers 5 keeps from touching weights that were loaded.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, Gate):
            nn.init.zeros_(module.weight)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` would make one that knows only the first loop

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with labels their loss.

        Args:
            input_ids: (B, T), the tokens after those in the cache.
            attention_mask: (B, cached + T), 0 at padded tokens, which may be left or right.
            position_ids: (B, T); from the mask when not given. Without a cache, a row whose
                positions restart at 0 is several texts that do not see each other.
            past_key_values: The `LoopCache` of an earlier call.
            inputs_embeds: (B, T, hidden) in place of `input_ids`.
            labels: (B, T), not shifted, -100 where there is no target.
            use_cache: Return a cache; by default where the configuration says so, and not while
                training.
            logits_to_keep: Form logits of the last so many tokens only, 0 for all, or of a tensor
                of indices.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("LoopCoder returns neither attentions nor hidden states of layers")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (batch, cached + new tokens), 0 at padding")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        documents = None
        if position_ids is None:
            position_ids = positions(attention_mask, past, x.shape[1], x.device)
        elif past == 0 and attention_mask is None:
            documents = (position_ids == 0).cumsum(-1)
        rope = rope_table(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        sight = Sight(x.shape[1], past, attention_mask, documents, x.device)
        hidden = self.model(x, rope, sight, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        wanted = return_dict if return_dict is not None else self.config.return_dict
        return output if wanted else output.to_tuple()

    def _cache(self, given: Cache | None, use_cache: bool) -> LoopCache | None:
        if isinstance(given, LoopCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(f"LoopCoder continues from a LoopCache, not a {type(given).__name__}")
        return LoopCache(self.config) if use_cache else None


def remember_in(cache: LoopCache | None, entry: int) -> Callable[[Tensor, Tensor], Pair]:
    """The `remember` of a layer: append to an entry of the cache, or to nothing without one."""
    if cache is None:
        return lambda k, v: (k, v)
    return lambda k, v: cache.update(k, v, entry)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, T, D) queries to (B, heads, T, D); without a mask plain causal."""
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def positions(mask: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor:
    """Positions of the last `tokens` tokens, (B or 1, tokens), from 0 at the first not padded."""
    if mask is None:
        return torch.arange(past, past + tokens, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def rope_table(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Pair:
    """Cosines and sines (B, 1, T, D), half-split layout, computed in float32 and then cast."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[..., None] * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: Pair) -> Tensor:
    """Turn (B, heads, T, D) by its positions; dimension i pairs with i + D/2."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
