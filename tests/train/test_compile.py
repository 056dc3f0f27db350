"""The parts of a layer are compiled once for all layouts of documents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from loopcoder_oracle import SMALL, make, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from codeflow.train.attention import Documents

LAYOUTS = ([5, 7], [30], [1, 1, 9], [2] * 20, [40, 3, 1])
PARTS = 3  # before attention, after the first loop's, after a later loop's


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["none", "full", "save_attention"])
def test_no_layout_compiles_again(policy: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled, plain = make(checkpointing=policy), make()
    compiled.compile_layers(backend=counter)
    for lengths in LAYOUTS:
        ids, docs = tokens(sum(lengths)), Documents.of(lengths)
        outs = [model(ids, docs, ids.roll(-1)) for model in (compiled, plain)]
        for model, out in zip((compiled, plain), outs, strict=True):
            model.zero_grad()
            torch.autograd.backward(out.loss)
        torch.testing.assert_close(outs[0].hidden, outs[1].hidden)
        for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == PARTS


def test_evaluation_compiles_once_more() -> None:
    counter = CompileCounterWithBackend("eager")
    model = make()
    model.compile_layers(backend=counter)
    for _ in range(2):
        for lengths in LAYOUTS:
            ids = tokens(sum(lengths))
            with torch.no_grad():
                model(ids, Documents.of(lengths))
            model(ids, Documents.of(lengths))
    assert counter.frame_count <= 2 * PARTS


def test_names_of_the_weights_stay() -> None:
    model = make()
    names = list(model.state_dict())
    model.compile_layers(backend="eager")
    assert list(model.state_dict()) == names
    assert SMALL.num_hidden_layers == len(model.model.layers)
