from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_worker import CASES, Case, Run, launch, micro_batch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codeflow.errors import RecipeError, UsageError
from codeflow.train import checkpoint
from codeflow.train.checkpoint import load_state, save
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import load_model, read_hf_config, to_hf
from codeflow.train.model import LoopCoder
from codeflow.train.parallel import World

GOLDEN = Path(__file__).parents[1] / "data" / "loopcoder"
TINY = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


ALONE = World(0, 1, 0, torch.device("cpu"))


def save_tiny(out: Path, step: int, *, seed: int = 0, keep: int = 1, **state: object) -> Path:
    model = LoopCoder(TINY, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters())
    return save(out, step, model, optimizer, state, keep=keep, world=ALONE)


def test_round_trip(tmp_path: Path) -> None:
    state = {"m": torch.arange(3.0), "n": 7, "text": ["a"], "nested": {"b": None}}
    folder = save_tiny(tmp_path, 7, seed=5, **state)
    assert checkpoint.latest(tmp_path) == folder
    again = load_model(folder)
    assert again.config == TINY
    for p, q in zip(LoopCoder(TINY, seed=5).parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    loaded = load_state(folder)
    assert torch.equal(loaded.pop("m"), torch.arange(3.0))
    assert loaded == {"n": 7, "text": ["a"], "nested": {"b": None}}


def test_other_accounts_may_read_it(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, 1)
    (tmp_path / "plain").touch()
    assert {f.stat().st_mode for f in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("loops", [1, 2])
def test_resuming_alone_is_exact_to_the_bit(tmp_path: Path, loops: int) -> None:
    run = Run(Case("auto", loops=loops), ALONE)
    run.train(2)
    run.save(tmp_path)
    random, expected = torch.rand(3), run.train(2)
    again = Run(Case("auto", loops=loops), ALONE, seed=9)
    again.restore(tmp_path / "step-00000002")
    assert torch.equal(torch.rand(3), random)
    assert again.train(2) == expected
    for name, value in run.weights().items():
        assert torch.equal(again.weights()[name], value)
    states = zip(run.optimizer.state.values(), again.optimizer.state.values(), strict=True)
    for ours, theirs in states:
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_several_optimizers_share_out_the_parameters(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[LoopCoder, list[torch.optim.Optimizer]]:
        model = LoopCoder(TINY, seed=seed)
        matrices = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
        return model, [torch.optim.Muon(matrices), torch.optim.AdamW(others)]

    def train(model: LoopCoder, optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
        for step in range(2):
            ids, docs, _ = micro_batch(step, 2)
            model(ids % 16, docs, ids % 16).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return list(model.parameters())

    model, optimizers = make(1)
    train(model, optimizers)
    folder = save(tmp_path, 2, model, optimizers, {}, keep=1, world=ALONE)
    again, others = make(2)
    checkpoint.restore(folder, again, others, ALONE)
    for p, q in zip(train(model, optimizers), train(again, others), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(CheckpointError, match=r"state\.pt.*another optimizer"):
        checkpoint.restore(folder, again, torch.optim.AdamW(again.parameters()), ALONE)


def test_before_the_first_step_there_is_nothing_to_fill(tmp_path: Path) -> None:
    model = LoopCoder(TINY, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)  # as after a step that was skipped
    folder = save(tmp_path, 0, model, optimizer, {}, keep=1, world=ALONE)
    again = LoopCoder(TINY)
    optimizer = torch.optim.AdamW(again.parameters())
    checkpoint.restore(folder, again, optimizer, ALONE)
    assert torch.equal(again.head_weight, model.head_weight)
    assert not optimizer.state


@pytest.mark.slow
def test_any_number_of_processes_resumes(tmp_path: Path) -> None:
    alone = Run(CASES["fsdp-2"], ALONE)
    alone.train(2)
    one = alone.save(tmp_path / "one")
    expected = torch.tensor(alone.train(2))
    ranks = launch("resuming", tmp_path)
    for rank, found in enumerate(ranks):
        assert (torch.tensor(found["expected"]) - expected).abs().max() < 1e-5
        for source in ("one", "two"):
            for strategy in ("ddp", "fsdp"):
                losses = torch.tensor(found[f"{source}-{strategy}"])
                assert (losses - expected).abs().max() < 1e-5, (rank, source, strategy)
        for strategy in ("ddp", "fsdp"):  # as many ranks as saved: each goes on with its own
            drawn, would_be = found[f"two-{strategy}-random"]
            assert torch.equal(drawn, would_be)
    assert torch.equal(ranks[0]["one-ddp-random"][0], ranks[0]["one-fsdp-random"][0])
    assert not torch.equal(ranks[0]["one-ddp-random"][0], ranks[1]["one-ddp-random"][0])
    again = Run(CASES["fsdp-2"], ALONE, seed=9)
    again.restore(tmp_path / "two" / "step-00000002")
    assert (torch.tensor(again.train(2)) - expected).abs().max() < 1e-5
    saved = load_model(tmp_path / "two" / "step-00000002")
    for p, q in zip(saved.parameters(), load_model(one).parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5


@pytest.mark.slow
def test_every_process_hears_of_a_failure(tmp_path: Path) -> None:
    run = Run(CASES["fsdp-2"], ALONE)
    run.train(2)
    damage(run.save(tmp_path / "damaged") / "state.pt", 0.5)
    (tmp_path / "a file").touch()
    for messages in launch("failing", tmp_path):
        assert "state.pt: cannot be read" in messages["damaged"]
        assert "cannot be written" in messages["unwritable"]


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 50, 500, 1000):
        save_tiny(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000500", "step-00001000"]


@pytest.mark.parametrize("moment", ["save", "fsync", "rename"])
def test_a_failure_while_saving_leaves_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first = save_tiny(tmp_path, 1, n=1)

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    target = {
        "save": (torch, "save"),
        "fsync": (checkpoint.os, "fsync"),
        "rename": (Path, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[moment], fail)
        with pytest.raises(CheckpointError, match="disk is full"):
            save_tiny(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path) == first
    assert load_state(first) == {"n": 1}
    save_tiny(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_disk_without_room_leaves_the_previous(tmp_path: Path, share: float) -> None:
    first = Run(Case("auto"), ALONE)
    first.train(1)
    folder = first.save(tmp_path)
    # No file may grow beyond this: half of the weights, or half of what only resuming needs.
    limit = int((folder / "model.safetensors").stat().st_size * share)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    second = Run(Case("auto"), ALONE)
    second.train(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000002: cannot be written"):
            second.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    second.restore(folder)
    assert second.step == 1


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, 1, n=1)
    assert load_state(save_tiny(tmp_path, 1, n=2)) == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def damage(file: Path, share: float) -> None:
    """Cut a file to a share of its length."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    run = Run(Case("auto"), ALONE)
    run.train(1)
    folder = run.save(tmp_path)
    whole = (folder / name).read_bytes()
    remedy = rf"{re.escape(name)}: cannot be read: .*Delete the folder step-00000001 to resume"
    for share in (0.0, 0.0001, 0.01, 0.5, 0.99, 0.9999):
        damage(folder / name, share)
        with pytest.raises(CheckpointError, match=f"(?s){remedy}"):
            run.restore(folder)
        (folder / name).write_bytes(whole)
    (folder / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=f"(?s){remedy}"):
        run.restore(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"(?s){remedy}"):
        run.restore(folder)
    (folder / name).write_bytes(whole)
    run.restore(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_flipped_bit_of_the_weights_is_seen(tmp_path: Path, share: float) -> None:
    run = Run(Case("auto"), ALONE)
    run.train(1)
    file = run.save(tmp_path) / "model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[int(len(flipped) * share)] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        run.restore(file.parent)


def test_flipped_bytes_of_the_state_never_end_in_a_traceback(tmp_path: Path) -> None:
    run = Run(Case("auto"), ALONE)
    run.train(1)
    folder = run.save(tmp_path)
    whole = (folder / "state.pt").read_bytes()
    g = torch.Generator().manual_seed(0)
    pickled, directory = torch.randint(0, 9000, (100,), generator=g), torch.arange(-400, 0)
    for place in [*pickled.tolist(), *directory.tolist()]:
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        (folder / "state.pt").write_bytes(flipped)
        with contextlib.suppress(CheckpointError):  # padding may be flipped unnoticed
            load_state(folder)
    middle = whole.index(b"data/3") + 200  # a moment of a weight
    flipped = bytearray(whole)
    flipped[middle] ^= 1
    (folder / "state.pt").write_bytes(flipped)
    with pytest.raises(CheckpointError, match="checksum"):
        load_state(folder)


def test_a_file_of_another_version_or_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, 1)
    other = LoopCoder(replace(TINY, hidden_size=16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has other tensors"):
        checkpoint.restore(folder, other, torch.optim.AdamW(other.parameters()), ALONE)
    torch.save({"loader": {}}, folder / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt: was not written by this version"):
        load_state(folder)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model"):
        load_model(folder)


def change(source: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors") | tensors
    kept = {n: t.contiguous() for n, t in content.items() if t is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_both_gate_namings_are_the_same_model(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    gates = {n: t for n, t in base.items() if "gate_projection" in n}
    legacy = {
        f"model.gate_projections.{n.split('.')[2]}.{n.split('.')[-1]}": t for n, t in gates.items()
    }
    folder = change(GOLDEN / "base", tmp_path / "legacy", **dict.fromkeys(gates), **legacy)
    for p, q in zip(
        load_model(folder).parameters(), load_model(GOLDEN / "base").parameters(), strict=True
    ):
        assert torch.equal(p, q)


def test_a_dense_checkpoint_gets_zero_gates(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    gates = {n: None for n in base if "gate_projection" in n}
    model = load_model(change(GOLDEN / "base", tmp_path / "dense", **gates))
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.zeros_like(p) if name in gates else base[name])


def test_weights_in_several_files(tmp_path: Path) -> None:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    names = sorted(base)
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({n: base[n] for n in part}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    assert torch.equal(load_model(tmp_path).lm_head.weight, base["lm_head.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight is not part of the model"),
        ({"model.norm.weight": torch.zeros(3)}, r"is \[3\], the model has \[64\]"),
        ({"model.layers.1.gate_projection.bias": None}, "gate_projection.bias is missing"),
    ],
)
def test_names_and_shapes_must_match(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = change(GOLDEN / "base", tmp_path / "x", **tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_config_round_trip_and_refusals(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = replace(TINY, loop_num=3, attention_bias=True, rope_theta=1e4)
    file.write_text(json.dumps(to_hf(config)))
    assert read_hf_config(tmp_path) == config
    for change_, message in (
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"plt_num_loops": 2}, "plt_num_loops"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
    ):
        file.write_text(json.dumps(to_hf(config) | change_))
        with pytest.raises(UsageError, match=message):
            read_hf_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_a_llama_has_one_loop_and_derived_head_width(tmp_path: Path) -> None:
    content = to_hf(TINY)
    for key in ("loop_num", "loop_window_size", "head_dim", "rope_theta"):
        del content[key]
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_hf_config(tmp_path)
    assert (config.loop_num, config.head_dim, config.rope_theta) == (1, 4, 1e4)


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, 1)
    checkpoint.require_config(folder, TINY)
    with pytest.raises(CheckpointError, match=r"model\.loop_num was 2, is 1"):
        checkpoint.require_config(folder, replace(TINY, loop_num=1))


def test_heads_must_divide() -> None:
    with pytest.raises(RecipeError, match="multiple"):
        replace(TINY, num_attention_heads=3, num_key_value_heads=2)
