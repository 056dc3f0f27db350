from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loopcoder_oracle import SMALL, W, logits, make, reference, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from codeflow.train.attention import Documents
from codeflow.train.hf import load_model
from codeflow.train.loss import cross_entropy
from codeflow.train.model import LoopCoder, Rope, rope_table, rotate

GOLDEN = Path(__file__).parents[1] / "data" / "loopcoder"
LOOPS = pytest.mark.parametrize("loops", [1, 2, 3])


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


def test_a_model_without_memory_gets_the_same_weights() -> None:
    with torch.device("meta"):
        model = LoopCoder(SMALL, seed=7)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.detach().fill_(float("nan"))
    model.initialise(3)
    for p, q in zip(model.parameters(), LoopCoder(SMALL, seed=3).parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_sharded_model_gets_the_same_weights() -> None:
    with torch.device("meta"):
        model = LoopCoder(SMALL)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        model.initialise(3)
        for p, q in zip(model.parameters(), LoopCoder(SMALL, seed=3).parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert torch.equal(p.full_tensor(), q)
    finally:
        torch.distributed.destroy_process_group()


@LOOPS
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_statistics(loops: int, checkpointing: str) -> None:
    model = make(replace(SMALL, loop_num=loops), checkpointing=checkpointing)
    states: list[Tensor] = []
    gates: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: gates.append(out[2]))
    model.model.layers[-1].register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    out = model(tokens(20), Documents.of([12, 8]))
    if loops == 1:
        assert out.gate_means.numel() == out.gate_stds.numel() == 0
    else:
        seen = torch.stack([g for g in gates if g is not None]).view(loops - 1, -1, 20, 4)
        torch.testing.assert_close(out.gate_means, seen.mean(2))
        torch.testing.assert_close(out.gate_stds, seen.std(2, correction=0))
    torch.testing.assert_close(
        out.residual_rms, torch.stack([x.square().mean().sqrt() for x in states])
    )
    for statistic in (out.gate_means, out.gate_stds, out.residual_rms):
        assert not statistic.requires_grad
        assert statistic.dtype == torch.float32


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
