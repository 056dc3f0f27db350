"""The specification of the model, written a second time with plain matrices, and a small model.

x_1 = E and x_r = emb_scale E + hidden_scale H_{r-1}, where H may be normed first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder

W = 4
SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    loop_num=2,
    loop_window_size=W,
    initializer_range=0.2,
)


def make(config: ModelConfig = SMALL, **options: object) -> LoopCoder:
    """A model whose gates are not zero."""
    model = LoopCoder(config, **options)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate_projection" in name or "norm" in name:
                p += 0.5 * torch.randn(p.shape, generator=g)
    return model


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: LoopCoder, ids: Tensor, lengths: list[int] | None = None) -> Tensor:
    return model.logits(model(ids, Documents.of(lengths or [len(ids)])).hidden)


def reference(model: LoopCoder, ids: Tensor) -> Tensor:
    """The specification on one document, written a second time with plain matrices."""
    c, weights, n = model.config, dict(model.named_parameters()), len(ids)
    group = c.num_attention_heads // c.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weights[name]

    def turn(x: Tensor) -> Tensor:
        half = c.head_dim // 2
        angle = torch.arange(n)[:, None] / c.rope_theta ** (torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(n, half), angle)
        return torch.cat([z.real, z.imag], -1)

    def attend(q: Tensor, k: Tensor, v: Tensor, reach: int) -> Tensor:
        i = torch.arange(n)
        hidden = (i[:, None] < i) | (i[:, None] - i >= reach)
        scores = (q @ k.transpose(1, 2) / math.sqrt(c.head_dim)).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ v

    x, first = weights["model.embed_tokens.weight"][ids], {}
    embedded = x
    for loop in range(c.loop_num):
        if loop:
            h = norm(x, "model.norm.weight") if c.plt_normalize_per_loop else x
            x = c.plt_emb_scale * embedded + c.plt_hidden_scale * h
        for i in range(c.num_hidden_layers):
            at = f"model.layers.{i}."
            h = norm(x, at + "input_layernorm.weight")
            q, k, v = (
                (h @ weights[f"{at}self_attn.{p}_proj.weight"].T)
                .unflatten(1, (-1, c.head_dim))
                .transpose(0, 1)
                for p in "qkv"
            )
            q, k = turn(q), turn(k)
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            if loop == 0:
                first[i] = (k, v)
                o = attend(q, k, v, n)
            else:
                w = weights[at + "gate_projection.weight"]
                if c.plt_gate_use_hidden_states:
                    gate = w @ norm(x, at + "gate_projection.gate_norm.weight").T
                else:
                    gate = (q * w[:, None]).sum(-1)
                g = torch.sigmoid(gate + weights[at + "gate_projection.bias"][:, None])[..., None]
                o = g * attend(q, *first[i], n) + (1 - g) * attend(q, k, v, c.loop_window_size)
            x = x + o.transpose(0, 1).flatten(1) @ weights[at + "self_attn.o_proj.weight"].T
            h = norm(x, at + "post_attention_layernorm.weight")
            up = F.silu(h @ weights[at + "mlp.gate_proj.weight"].T)
            up = up * (h @ weights[at + "mlp.up_proj.weight"].T)
            x = x + up @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T
