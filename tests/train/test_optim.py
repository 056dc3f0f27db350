from __future__ import annotations

import pytest
import torch

from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.optim import decays, forget_moments, make_optimizers, set_learning_rate
from codeflow.train.recipe import TrainConfig


def test_only_matrices_decay() -> None:
    config = ModelConfig(vocab_size=32, attention_bias=True, mlp_bias=True)
    model = LoopCoder(config)
    decayed = {n for n, p in model.named_parameters() if decays(n, p)}
    ends = {name.removeprefix("model.layers.0.") for name in decayed if "layers.1" not in name}
    assert {e for e in ends if not e.startswith("model.layers")} == {
        "lm_head.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_optimizers_hold_every_parameter_once(optimizer: str, tied: bool) -> None:
    model = LoopCoder(ModelConfig(vocab_size=32, tie_word_embeddings=tied))
    optimizers = make_optimizers(model, TrainConfig(weight_decay=0.3, optimizer=optimizer))
    groups = [group for o in optimizers for group in o.param_groups]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert sorted(g["weight_decay"] for g in groups) == [0.0, *[0.3] * (len(groups) - 1)]
    set_learning_rate(optimizers, 0.125)
    assert {g["lr"] for g in groups} == {0.125}


def test_frozen_parameters_are_left_out() -> None:
    model = LoopCoder(ModelConfig(vocab_size=32))
    for layer in model.model.layers:
        layer.gate_projection.requires_grad_(False)
    (optimizer,) = make_optimizers(model, TrainConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_muon_takes_the_matrices_of_the_layers() -> None:
    model = LoopCoder(ModelConfig(vocab_size=32))
    muon, adamw = make_optimizers(model, TrainConfig(optimizer="muon"))
    taken = {id(p) for p in muon.param_groups[0]["params"]}
    names = {n.split(".", 3)[-1] for n, p in model.named_parameters() if id(p) in taken}
    assert names == {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)


def test_muons_updates_are_as_large_as_adamws() -> None:
    """Root mean square about 0.2 of the learning rate, whatever the shape of the matrix."""
    torch.manual_seed(0)
    model = LoopCoder(ModelConfig(vocab_size=32))
    config = TrainConfig(optimizer="muon", learning_rate=0.1, weight_decay=0)
    muon, _ = make_optimizers(model, config)
    matrices = muon.param_groups[0]["params"]
    before = [p.detach().clone() for p in matrices]
    for p in matrices:
        p.grad = torch.randn_like(p)
    muon.step()
    for p, old in zip(matrices, before, strict=True):
        assert 0.1 < (p.detach() - old).square().mean().sqrt() / 0.1 < 0.3


def test_decay_acts_where_it_should() -> None:
    model = LoopCoder(ModelConfig(vocab_size=32))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (optimizer,) = make_optimizers(model, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if decays(name, p) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_forgotten_moments_are_those_of_a_new_optimizer() -> None:
    def updated(forget: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        model = torch.nn.ParameterDict({"w": weight})
        optimizers = make_optimizers(model, TrainConfig(weight_decay=0))
        for gradient in (5.0, 0.1):
            if gradient == 0.1 and forget:
                forget_moments(optimizers)
                weight.data.fill_(1.0)
            weight.grad = torch.full_like(weight, gradient)
            optimizers[0].step()
        return weight.detach()

    # The first step of Adam has the size of the learning rate, whatever the gradient.
    torch.testing.assert_close(updated(forget=True), torch.full((2, 2), 1 - 3e-3))
    assert not torch.allclose(updated(forget=False), torch.full((2, 2), 1 - 2 * 3e-3), atol=1e-5)
