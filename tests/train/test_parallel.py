from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_worker import CASES, Case, Run, launch

from codeflow.errors import UsageError
from codeflow.train import parallel
from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World

ALONE = World(0, 1, 0, torch.device("cpu"))
TINY = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("equal_training", tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two_ranks: list[Any], name: str) -> None:
    case = CASES[name]
    tolerance = 1e-5 if case.dtype == torch.float32 else 0.1
    run = Run(case, ALONE)
    steps, weights = run.train(3), run.weights()
    for rank in two_ranks:
        # loss and gradient norm: a sum over ranks, not a mean
        assert torch.tensor(rank[name][0]).sub(torch.tensor(steps)).abs().max() < tolerance
        for parameter, value in weights.items():
            assert (rank[name][1][parameter] - value).abs().max() < tolerance, parameter
    assert two_ranks[0][name][0] == two_ranks[1][name][0]


@pytest.mark.slow
def test_auto_replicates_on_cpus(two_ranks: list[Any]) -> None:
    assert [rank["auto"] for rank in two_ranks] == ["DistributedDataParallel"] * 2


def test_auto_replicates_what_leaves_half_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1000, 1000, bias=False)
    gpu = SimpleNamespace(total_memory=32_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert parallel._fits(model, torch.device("cuda"))
    gpu.total_memory -= 2
    assert not parallel._fits(model, torch.device("cuda"))


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
def test_alone_the_model_is_the_module(strategy: str) -> None:
    model = LoopCoder(TINY)
    assert parallel.distribute(model, ALONE, strategy=strategy) is model
    value = torch.ones(2)
    assert torch.equal(parallel.total(value, ALONE), value)
    assert parallel.from_rank_0("a", ALONE) == "a"
    assert parallel.from_all_ranks("a", ALONE) == ["a"]
    parallel.stop(ALONE)


def test_a_model_without_values_gets_them_after_it_is_distributed() -> None:
    with torch.device("meta"):
        model = LoopCoder(TINY)
    parallel.distribute(model, ALONE)
    model.initialise(3)
    for p, q in zip(model.parameters(), LoopCoder(TINY, seed=3).parameters(), strict=True):
        assert torch.equal(p, q)


def test_gates_are_frozen_where_they_take_no_part() -> None:
    for loops, trained in ((1, False), (2, True)):
        run = Run(Case("auto", loops=loops), ALONE)
        gate = run.model.model.layers[0].gate_projection
        run.train(1)
        assert (gate.weight.grad is not None) is trained


def test_clipping_gives_the_norm_before() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert parallel.clip_gradients(model, 1.0, ALONE).item() == pytest.approx(5.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert parallel.clip_gradients(model, 9.0, ALONE).item() == pytest.approx(1.0, abs=1e-5)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.start("cpu") == ALONE
    with pytest.raises(UsageError, match=r"train\.device=cuda:99"):
        parallel.start("cuda:99")
    with pytest.raises(UsageError, match=r"train\.device=abacus"):
        parallel.start("abacus")


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"RANK": None}, "cpu", "not as torchrun sets them"),
        ({"LOCAL_RANK": "first"}, "cpu", "not as torchrun sets them"),
        ({}, "cuda:1", "each takes the GPU of its local rank"),
        ({}, "cpu", "cannot reach the other 1 processes"),
    ],
)
def test_a_start_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str | None],
    device: str,
    message: str,
) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for key, value in {**torchrun, "MASTER_ADDR": None, **environment}.items():
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=message):
        parallel.start(device)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", (0, 0), torch.float32),
        ("cuda", (7, 5), torch.float32),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (12, 0), torch.bfloat16),
    ],
)
def test_auto_computes_in_bfloat16_where_the_gpu_does(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert parallel.activation_dtype("auto", torch.device(device)) == dtype
    assert parallel.activation_dtype("float32", torch.device(device)) == torch.float32
    assert parallel.activation_dtype("bfloat16", torch.device(device)) == torch.bfloat16


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean `fsdp`"):
        parallel.distribute(LoopCoder(TINY), ALONE, strategy="fsdp2")


def test_a_rank_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="KeyError"):
        launch("no such scenario", tmp_path, world_size=1)
