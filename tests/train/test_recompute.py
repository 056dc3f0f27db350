from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loopcoder_oracle import SMALL, make, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codeflow.errors import UsageError
from codeflow.train.attention import Documents
from codeflow.train.model import LoopCoder
from codeflow.train.recompute import POLICIES

LENGTHS = [9, 1, 30]


def backward(model: LoopCoder) -> dict[str, Tensor]:
    ids = tokens(sum(LENGTHS))
    torch.autograd.backward(model(ids, Documents.of(LENGTHS), ids.roll(-1)).loss)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_last_bit(
    backend: str, loops: int, dtype: torch.dtype
) -> None:
    c = replace(SMALL, loop_num=loops)
    plain = backward(make(c, backend=backend, dtype=dtype))
    for policy in ("full", "save_attention"):
        found = backward(make(c, backend=backend, dtype=dtype, checkpointing=policy))
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


class CountAttention(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(op)
        self.calls += "scaled_dot_product" in name and "backward" not in name
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("full", 1), ("save_attention", 0)])
def test_kernels_that_run_in_the_backward_pass(policy: str, again: int) -> None:
    model, ids = make(backend="sdpa", checkpointing=policy), tokens(12)
    with CountAttention() as forward:
        loss = model(ids, Documents.of([12]), ids).loss
    with CountAttention() as in_backward:
        torch.autograd.backward(loss)
    assert forward.calls == 2 * 3  # layers x (first loop, far, near)
    assert in_backward.calls == again * forward.calls


def test_keeps_less() -> None:
    kept = {}
    for policy in POLICIES:
        model, ids = LoopCoder(SMALL, checkpointing=policy), tokens(200)
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(ids, Documents.of([200]))
        kept[policy] = sum(sizes.values())
        del out
    assert kept["full"] < kept["none"] / 4


def test_evaluation_keeps_nothing_and_is_the_same() -> None:
    ids = tokens(20)
    with torch.no_grad():
        outs = [make(checkpointing=p)(ids, Documents.of([20])).hidden for p in POLICIES]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_an_unknown_policy() -> None:
    with pytest.raises(UsageError, match="Did you mean `save_attention`"):
        LoopCoder(SMALL, checkpointing="save-attention")
