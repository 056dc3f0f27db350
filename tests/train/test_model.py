from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.flops import parameter_count, training_flops
from codeflow.train.hf import load_model
from codeflow.train.loss import cross_entropy
from codeflow.train.model import LoopCoder, Rope, rope_table, rotate

GOLDEN = Path(__file__).parents[1] / "data" / "loopcoder"
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
LOOPS = pytest.mark.parametrize("loops", [1, 2, 3])


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
    for loop in range(c.loop_num):
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
                gate = (q * weights[at + "gate_projection.weight"][:, None]).sum(-1)
                g = torch.sigmoid(gate + weights[at + "gate_projection.bias"][:, None])[..., None]
                o = g * attend(q, *first[i], n) + (1 - g) * attend(q, k, v, c.loop_window_size)
            x = x + o.transpose(0, 1).flatten(1) @ weights[at + "self_attn.o_proj.weight"].T
            h = norm(x, at + "post_attention_layernorm.weight")
            up = F.silu(h @ weights[at + "mlp.gate_proj.weight"].T)
            up = up * (h @ weights[at + "mlp.up_proj.weight"].T)
            x = x + up @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


@LOOPS
@pytest.mark.parametrize("n", [1, W, 13])
def test_is_the_specification(loops: int, n: int) -> None:
    model, ids = make(replace(SMALL, loop_num=loops)), tokens(n)
    torch.testing.assert_close(logits(model, ids), reference(model, ids), atol=1e-4, rtol=1e-4)


def test_one_loop_does_not_read_the_gates() -> None:
    model, ids = make(replace(SMALL, loop_num=1)), tokens(9)
    before = logits(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.gate_projection.bias += 3
    assert torch.equal(logits(model, ids), before)


@LOOPS
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_the_future_does_not_reach_the_past(loops: int, backend: str) -> None:
    model, ids = make(replace(SMALL, loop_num=loops), backend=backend), tokens(14)
    before = logits(model, ids)
    for t in range(14):
        changed = ids.clone()
        changed[t] = (ids[t] + 1) % 61
        after = logits(model, changed)
        assert torch.equal(after[:t], before[:t])
        assert not torch.equal(after[t], before[t])


def test_receptive_field_of_the_local_branch() -> None:
    """Gates shut and values of loop 1 unused: one layer sees W tokens, itself included."""
    model = make(replace(SMALL, num_hidden_layers=1))
    layer, n = model.model.layers[0], 12
    with torch.no_grad():
        layer.gate_projection.weight.zero_()
        layer.gate_projection.bias.fill_(-200.0)
    x = torch.randn(n, 24, requires_grad=True)
    docs = Documents.of([n])
    rope = rope_table(docs.positions, 6, 5e5, torch.float32)
    _, memory, _ = layer(x.detach(), rope, docs)
    out, _, gate = layer(x, rope, docs, memory)
    assert gate.max() == 0.0
    for i in range(n):
        (grad,) = torch.autograd.grad(out[i].sum(), x, retain_graph=True)
        seen = grad.abs().sum(-1).nonzero().flatten().tolist()
        assert seen == list(range(max(0, i - W + 1), i + 1))


@LOOPS
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_packed_documents_are_documents_alone(loops: int, backend: str) -> None:
    lengths = [1, W - 1, W, W + 1, 9, 1, 2 * W]
    model, ids = make(replace(SMALL, loop_num=loops), backend=backend), tokens(sum(lengths))
    labels = tokens(sum(lengths), 1)
    packed = cross_entropy(model(ids, Documents.of(lengths)).hidden, model.head_weight, labels)
    torch.autograd.backward(packed)
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.zeros(())
    parts = zip(ids.split(lengths), labels.split(lengths), strict=True)
    for doc, target in parts:
        hidden = model(doc, Documents.of([len(doc)])).hidden
        loss = cross_entropy(hidden, model.head_weight, target)
        torch.autograd.backward(loss)
        alone += loss.detach()
    torch.testing.assert_close(packed.detach(), alone, atol=1e-3, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(together[name], p.grad, atol=1e-3, rtol=1e-3)
    pieces = torch.cat([logits(model, doc) for doc in ids.split(lengths)])
    torch.testing.assert_close(logits(model, ids, lengths), pieces, atol=1e-4, rtol=1e-4)


def test_positions_matter_with_loops_and_only_then() -> None:
    """The reason for resetting positions: shifted, a looped model is another function."""
    ids = tokens(10)
    for loops, shifted_is_equal in ((1, True), (2, False)):
        model, docs = make(replace(SMALL, loop_num=loops), backend="sdpa"), Documents.of([10])
        moved = replace(docs, positions=docs.positions + 100)
        with torch.no_grad():
            difference = (model(ids, docs).hidden - model(ids, moved).hidden).abs().max()
        assert (difference < 1e-3) == shifted_is_equal


def test_initial_weights() -> None:
    model, again = LoopCoder(SMALL, seed=3), LoopCoder(SMALL, seed=3)
    other = LoopCoder(SMALL, seed=4)
    for (name, p), q, r in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if "gate_projection" in name:
            assert not p.any()
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert p.std().item() == pytest.approx(0.2, rel=0.15)
            assert not torch.equal(p, r)
    gates = model(tokens(8), Documents.of([8])).gate_means
    assert gates.shape == (1, 2, 4)
    assert torch.equal(gates, torch.full_like(gates, 0.5))


def test_zero_gates_learn() -> None:
    model, ids = LoopCoder(SMALL), tokens(12)
    hidden = model(ids, Documents.of([12])).hidden
    torch.autograd.backward(cross_entropy(hidden, model.head_weight, ids.roll(-1)))
    for layer in model.model.layers:
        assert layer.gate_projection.weight.grad.abs().max() > 0
        assert layer.gate_projection.bias.grad.abs().max() > 0


def test_tied_embeddings_share_one_matrix() -> None:
    model = make(replace(SMALL, tie_word_embeddings=True))
    assert model.head_weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in model.state_dict()


def test_rope_stays_float32_in_a_bfloat16_model() -> None:
    model = LoopCoder(SMALL).to(torch.bfloat16)
    assert list(model.buffers()) == []
    far = torch.tensor([131071])
    angle = far.double() / 5e5 ** (torch.arange(0, 6, 2).double() / 6)
    wide = rope_table(far, 6, 5e5, torch.float32)
    cos = torch.cat([angle.cos()] * 2, -1)
    torch.testing.assert_close(wide.cos[0, 0].double(), cos, atol=1e-2, rtol=0)
    narrow = rope_table(far, 6, 5e5, torch.bfloat16)
    assert torch.equal(narrow.cos, wide.cos.bfloat16())


@pytest.mark.parametrize("how", ["activations", "whole model"])
def test_bfloat16_is_near_float32(how: str) -> None:
    model, ids = load_model(GOLDEN / "base"), tokens(48)
    want = logits(model, ids)
    model.dtype = torch.bfloat16
    if how == "whole model":
        model.to(torch.bfloat16)
    have = logits(model, ids)
    assert have.dtype == torch.bfloat16
    assert (have.float() - want).norm() / want.norm() < 2.5e-2


def test_bfloat16_activations_leave_float32_gradients() -> None:
    model, ids = make(dtype=torch.bfloat16), tokens(9)
    hidden = model(ids, Documents.of([9])).hidden
    torch.autograd.backward(cross_entropy(hidden, model.head_weight, ids))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@given(st.integers(0, 1000))
def test_rotation_keeps_lengths_and_relative_angles(offset: int) -> None:
    g = torch.Generator().manual_seed(offset)
    q, k = torch.randn(5, 2, 6, generator=g), torch.randn(5, 2, 6, generator=g)

    def scores(start: int) -> Tensor:
        rope: Rope = rope_table(torch.arange(5) + start, 6, 5e5, torch.float32)
        return torch.einsum("ihd,jhd->hij", rotate(q, rope), rotate(k, rope))

    torch.testing.assert_close(scores(0), scores(offset), atol=1e-3, rtol=1e-3)
    rope = rope_table(torch.arange(5) + offset, 6, 5e5, torch.float32)
    torch.testing.assert_close(rotate(q, rope).norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameter_count(tied: bool, bias: bool) -> None:
    c = replace(SMALL, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = LoopCoder(c)
    assert parameter_count(c) == sum(p.numel() for p in model.parameters())
    body = [p for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n]
    assert parameter_count(c, embeddings=False) == sum(p.numel() for p in body)


@LOOPS
def test_flops_are_what_torch_counts(loops: int) -> None:
    """The oracle does the counted work, and that of all pairs which it then masks."""
    c = replace(SMALL, loop_num=loops)
    model = LoopCoder(c, backend="dense")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens(6), Documents.of([6])).hidden)
    pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    masked = pair * (loops * (36 - 21) + (loops - 1) * (36 - 18))
    assert training_flops(c, [6]) == 3 * (counter.get_total_flops() - masked)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=4))
def test_flops_add_up_token_by_token(lengths: list[int]) -> None:
    width, layers = 24, 2
    one = training_flops(SMALL, [1]) // 3 - 4 * layers * width * 3  # without attention
    total = 0
    for n in lengths:
        for p in range(n):
            total += one + 4 * layers * width * (2 * (p + 1) + min(p + 1, W))
    assert training_flops(SMALL, lengths) == 3 * total
