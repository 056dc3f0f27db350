"""LoopCoder: a Llama whose layers run `loop_num` times with the same weights.

The first loop is plain causal attention. In each later loop every layer attends twice, globally to
the keys and values of the *first* loop and locally (a window) to its own, and mixes the two per
head and token with a gate that reads the query after RoPE. Because of that gate the model is not
invariant to shifted positions: positions must restart in every packed document.

LoopCoder-V2 differs in four settings (`plt_*` of `ModelConfig`): a later loop starts from a mix of
the embedding and the previous loop's result, which may be normed first, and gates may read the
residual stream. Its gates do not see the query, yet its positions restart with the documents, too.

Parameters are float32 and cast where they are used, so activations may be bfloat16 without
autocast. All tensors run on one flat token axis; a batch is its documents laid one after another.

Source: the IQuest-Coder-V1 report (LoopCoder) and Touvron et al. 2023 (Llama).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from codeflow.train import recompute
from codeflow.train.attention import Attention, Documents
from codeflow.train.backends import backend_named
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
        gate_means: (loop_num - 1, layers, heads) float32, mean over tokens of the share of global
            attention. Like the other statistics without gradient, and on the device: reading them
            is up to the caller.
        loss: float32 scalar, the sum over targets; zero when no labels were given.
        gate_stds: As `gate_means`, the standard deviation over tokens.
        residual_rms: (loop_num,) float32, root mean square of the residual stream after each loop.
    """

    hidden: Tensor
    gate_means: Tensor
    loss: Tensor
    gate_stds: Tensor
    residual_rms: Tensor


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
    """The share of global attention per token and head, (T, H) float32.

    It reads the query of its head or, in LoopCoder-V2, the normed residual stream. Zero weights
    give 0.5 everywhere; their gradient is not zero there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.gate_norm = None
        width = config.head_dim
        if config.plt_gate_use_hidden_states:
            width = config.hidden_size
            self.gate_norm = RMSNorm(width, config.rms_norm_eps)
        self.weight = nn.Parameter(torch.zeros(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """From the residual stream before the layer's norm (T, h) and the query (T, H, D)."""
        if self.gate_norm is None:
            logits = torch.einsum("thd,hd->th", q.float(), self.weight.float())
        else:
            logits = F.linear(self.gate_norm(x), self.weight.to(x.dtype)).float()
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
    """Norm, attention, norm, MLP; what lies around attention are parts that can be compiled."""

    def __init__(self, config: ModelConfig, attention: Attention, checkpointing: str) -> None:
        super().__init__()
        self.attention, self.window = attention, config.loop_window_size
        self.checkpointing = checkpointing
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        # Present when loop_num is 1: a dense checkpoint becomes a looped one unchanged. But frozen:
        # what takes no part has no gradient that DDP could wait for.
        self.gate_projection = Gate(config).requires_grad_(config.loop_num > 1)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: Rope, docs: Documents, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None, Tensor | None]:
        """One pass; without `memory` the first loop, with the first loop's memory a later one.

        Returns:
            The residual stream, the memory that the first loop made, and the gate (T, H) of a
            later loop.
        """
        # Inside the layer, so that what wraps a layer (FSDP) sees one call and not the second.
        return recompute.call(self.checkpointing, self._pass, x, rope, docs, memory)

    def _pass(
        self, x: Tensor, rope: Rope, docs: Documents, memory: Memory | None
    ) -> tuple[Tensor, Memory | None, Tensor | None]:
        q, k, v = self.before_attention(x, rope)
        if memory is None:
            memory = Memory(k, v.clone())  # what wraps a layer (FSDP) must not return a view
            far = self.attention.global_attention(q, *memory, docs)
            return self.after_attention(x, far), memory, None
        far = self.attention.global_attention(q, *memory, docs)
        near = self.attention.local_attention(q, k, v, docs, self.window)
        x, gate = self.after_both_attentions(x, q, far, near)
        return x, None, gate

    def before_attention(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(1))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def after_both_attentions(
        self, x: Tensor, q: Tensor, far: Tensor, near: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate = self.gate_projection(x, q)
        mixed = torch.lerp(near, far, gate[..., None].to(x.dtype))
        return self.after_attention(x, mixed), gate

    def compile_parts(self, backend: str) -> None:
        """Compile what lies around attention, for every number of tokens at once."""
        for name in ("before_attention", "after_attention", "after_both_attentions"):
            part = torch.compile(getattr(self, name), fullgraph=True, dynamic=True, backend=backend)
            setattr(self, name, part)


class Backbone(nn.Module):
    """Everything but the output layer; exists so that parameters have their HF names."""

    def __init__(self, config: ModelConfig, attention: Attention, checkpointing: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, attention, checkpointing) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LoopCoder(nn.Module):
    """The model.

    Built inside `with torch.device("meta")` it has no weights: give it memory with
    `to_empty(device=...)`, sharded or not, and then call `initialise`.

    Args:
        config: Its shape.
        backend: How attention is computed, a name of `backends.BACKENDS`.
        dtype: Of the activations.
        seed: Of the initial weights: N(0, initializer_range), norms 1, biases and gates 0.
        checkpointing: What the backward pass computes again, one of `recompute.POLICIES`.
        z_loss: Coefficient of logsumexp(logits)^2 in the loss; see `loss.cross_entropy`.

    Raises:
        UsageError: A back end or policy that does not exist, or a back end that cannot run here.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        checkpointing: str = "none",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.z_loss = config, dtype, z_loss
        policy = recompute.require_policy(checkpointing)
        self.model = Backbone(config, backend_named(backend), policy)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.head_weight.is_meta:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set all weights in place; a seed means the same weights on every device and sharding."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                drawn = torch.empty(module.weight.shape, device="cpu")
                drawn.normal_(0.0, self.config.initializer_range, generator=generator)
                _assign(module.weight, drawn)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Gate):
                module.weight.zero_()
                module.bias.zero_()
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def compile_layers(self, *, backend: str = "inductor") -> None:
        """Compile the parts of each layer in place, with a back end of `torch.compile`.

        Attention stays outside: it depends on where documents lie, so a compiled layer would be
        compiled again for new layouts. Call it before or after sharding, on the final device.
        """
        # The parts are small already; splitting them further for DDP would only trace them inside
        # the bookkeeping of `save_attention`, which fails.
        torch._dynamo.config.optimize_ddp = False
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.compile_parts(backend)

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
        embedded = self.model.embed_tokens(input_ids).to(self.dtype)
        rope = rope_table(docs.positions, self.config.head_dim, self.config.rope_theta, self.dtype)
        x, memories = embedded, []
        for layer in self.model.layers:
            x, memory, _ = layer(x, rope, docs)
            if self.config.loop_num > 1:
                memories.append(memory)
        rms, gates = [_rms(x)], []
        for _ in range(self.config.loop_num - 1):
            x = self.next_loop(x, embedded)
            for layer, memory in zip(self.model.layers, memories, strict=True):
                x, _, gate = layer(x, rope, docs, memory)
                gates.append(torch.stack(torch.std_mean(gate.detach(), 0, correction=0)))
            rms.append(_rms(x))
        stds, means = x.new_zeros((2, 0, 0, 0), dtype=torch.float32)
        if gates:
            shape = (self.config.loop_num - 1, self.config.num_hidden_layers, -1)
            stds, means = (s.view(shape) for s in torch.stack(gates, 1))
        hidden = self.model.norm(x)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if labels is not None:
            loss = cross_entropy(hidden, self.head_weight, labels, z_loss=self.z_loss)
        return Output(hidden, means, loss, stds, torch.stack(rms))

    def next_loop(self, x: Tensor, embedded: Tensor) -> Tensor:
        """What a later loop starts from: the result of the loop before it, (T, hidden_size).

        LoopCoder-V2 may norm it and mix it with the embedding.
        """
        c = self.config
        if c.plt_normalize_per_loop:
            x = self.model.norm(x)
        if c.plt_hidden_scale != 1.0:
            x = c.plt_hidden_scale * x
        if c.plt_emb_scale != 0.0:
            x = x + c.plt_emb_scale * embedded
        return x

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


def _rms(x: Tensor) -> Tensor:
    """Root mean square in float32, without a float32 copy of `x`."""
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float32)
    return norm / math.sqrt(x.numel())


def _assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor from the CPU into a parameter, or each rank's share of it."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every rank drew the same value, so nothing needs to be sent.
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)
