"""LoopCoder: a Llama whose layers run `loop_num` times with the same weights.

The first loop is plain causal attention. In each later loop every layer attends twice, globally to
the keys and values of the *first* loop and locally (a window) to its own, and mixes the two per
head and token with a gate that reads the query after RoPE. Because of that gate the model is not
invariant to shifted positions: positions must restart in every packed document.

Parameters are float32 and cast where they are used, so activations may be bfloat16 without
autocast. All tensors run on one flat token axis; a batch is its documents laid one after another.

Source: the IQuest-Coder-V1 report (LoopCoder) and Touvron et al. 2023 (Llama).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeflow.train.attention import BACKENDS, Attention, Documents
from codeflow.train.config import ModelConfig
from codeflow.train.loss import cross_entropy


class Rope(NamedTuple):
    """Rotary tables of a batch, (T, 1, D), in the dtype of the activations."""

    cos: Tensor
    sin: Tensor


class Memory(NamedTuple):
    """Keys (after RoPE) and values of a layer in the first loop, (T, Hk, D)."""

    k: Tensor
    v: Tensor


class Output(NamedTuple):
    """What the model says about a batch.

    Attributes:
        hidden: (T, hidden_size), normed: the input of the output layer.
        gate_means: (loop_num - 1, layers, heads) float32, mean over tokens, without gradient; the
            share of global attention.
        loss: float32 scalar, the sum over targets; zero when no labels were given.
    """

    hidden: Tensor
    gate_means: Tensor
    loss: Tensor


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """Statistics in float32, cast, then scaled (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class Gate(nn.Module):
    """The share of global attention per token and head, (T, H, D) -> (T, H) float32.

    Zero weights give 0.5 everywhere; its gradient is not zero there.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, q: Tensor) -> Tensor:
        logits = torch.einsum("thd,hd->th", q.float(), self.weight.float())
        return torch.sigmoid(logits + self.bias.float())


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(h, i, bias)
        self.up_proj = Linear(h, i, bias)
        self.down_proj = Linear(i, h, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SelfAttention(nn.Module):
    """The projections; which tokens attend to which is the layer's business."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = d
        self.q_proj = Linear(h, config.num_attention_heads * d, bias)
        self.k_proj = Linear(h, config.num_key_value_heads * d, bias)
        self.v_proj = Linear(h, config.num_key_value_heads * d, bias)
        self.o_proj = Linear(config.num_attention_heads * d, h, bias)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).view(x.shape[0], -1, self.head_dim) for p in projections)
        return rotate(q, rope), rotate(k, rope), v


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention, self.window = attention, config.loop_window_size
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        # Present but unused when loop_num is 1: a dense checkpoint becomes a looped one unchanged.
        self.gate_projection = Gate(config.num_attention_heads, config.head_dim)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: Rope, docs: Documents, memory: Memory | None = None
    ) -> tuple[Tensor, Memory, Tensor | None]:
        """One pass; without `memory` the first loop, with the first loop's memory a later one.

        Returns:
            The residual stream, the memory, and the gate (T, H) of a later loop.
        """
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), rope)
        gate = None
        if memory is None:
            memory = Memory(k, v)
            mixed = self.attention.global_attention(q, k, v, docs)
        else:
            gate = self.gate_projection(q)
            far = self.attention.global_attention(q, memory.k, memory.v, docs)
            near = self.attention.local_attention(q, k, v, docs, self.window)
            mixed = near + gate[..., None].to(x.dtype) * (far - near)
        x = x + self.self_attn.o_proj(mixed.flatten(1))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, memory, gate


class Backbone(nn.Module):
    """Everything but the output layer; exists so that parameters have their HF names."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, attention) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LoopCoder(nn.Module):
    """The model.

    Args:
        config: Its shape.
        backend: How attention is computed, a key of `attention.BACKENDS`.
        dtype: Of the activations.
        seed: Of the initial weights: N(0, initializer_range), norms 1, biases and gates 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Backbone(config, BACKENDS[backend])
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # Always drawn on the CPU, so that a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output layer, (vocab_size, hidden_size)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, input_ids: Tensor, docs: Documents, labels: Tensor | None = None) -> Output:
        """Hidden states of a flat batch and, with labels, their loss.

        The loss is formed in here, and not by the caller, because a sharded model has its output
        layer whole only during this call.

        Args:
            input_ids: int64 (T,).
            docs: Its documents.
            labels: int64 (T,), already shifted, -100 where there is no target.
        """
        x = self.model.embed_tokens(input_ids).to(self.dtype)
        rope = rope_table(docs.positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        memories: list[Memory] = []
        for layer in self.model.layers:
            x, memory, _ = layer(x, rope, docs)
            memories.append(memory)
        gates: list[Tensor] = []
        for _ in range(self.config.loop_num - 1):
            for layer, memory in zip(self.model.layers, memories, strict=True):
                x, _, gate = layer(x, rope, docs, memory)
                gates.append(gate.detach().mean(0))
        shape = (self.config.loop_num - 1, self.config.num_hidden_layers, -1)
        means = torch.stack(gates).view(shape) if gates else x.new_zeros((0, 0, 0))
        hidden = self.model.norm(x)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if labels is not None:
            loss = cross_entropy(hidden, self.head_weight, labels)
        return Output(hidden, means, loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, hidden_size) to (T, vocab_size); training never forms this tensor."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Rotary tables (Su et al. 2021), half-split layout, computed in float32 and then cast.

    Computed from positions and never kept in the module: a table that follows the model into
    bfloat16 is off by radians from a thousand tokens on.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = torch.outer(positions.float(), 1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return Rope(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn (T, H, D) by its positions; dimension i pairs with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat([-second, first], dim=-1) * rope.sin
