"""Starting a looped model from a dense one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.errors import CheckpointError
from codeflow.train.hf import export, initialise_from, load_model, main, read_hf_config
from codeflow.train.initialise import folded_layers
from codeflow.train.model import LoopCoder, Output

DENSE = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, loop_num=1, loop_window_size=4, initializer_range=0.1,
)  # fmt: skip
IDS = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(0))
DOCS = Documents.of([12, 18])


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return export(LoopCoder(DENSE, seed=3), tmp_path / "dense", target="llama")


def started(folder: Path, config: ModelConfig, *, fold: bool = False) -> LoopCoder:
    model = LoopCoder(config, seed=9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(7.0)  # so that whatever is left of it shows
    initialise_from(model, folder, fold=fold)
    return model


def run(model: LoopCoder) -> Output:
    with torch.no_grad():
        return model(IDS, DOCS)


def logits(model: LoopCoder) -> torch.Tensor:
    return model.logits(run(model).hidden)


def test_one_loop_is_the_dense_model(dense: Path) -> None:
    assert torch.equal(logits(started(dense, DENSE)), logits(LoopCoder(DENSE, seed=3)))


def test_two_loops_begin_half_global_half_local(dense: Path) -> None:
    model = started(dense, replace(DENSE, loop_num=2))
    means = run(model).gate_means
    assert means.shape == (1, 4, 4)
    assert torch.equal(means, torch.full_like(means, 0.5))
    source = LoopCoder(DENSE, seed=3).state_dict()
    for name, p in model.state_dict().items():
        gate = "gate_projection" in name
        assert torch.equal(p, torch.zeros_like(p) if gate else source[name]), name


def test_gates_of_the_second_version_keep_their_norm(dense: Path) -> None:
    model = started(dense, replace(DENSE, loop_num=2, plt_gate_use_hidden_states=True))
    for layer in model.model.layers:
        gate = layer.gate_projection
        assert gate.gate_norm.weight.eq(1).all()
        assert gate.weight.eq(0).all()
        assert gate.bias.eq(0).all()
    assert run(model).gate_means.eq(0.5).all()


def test_a_looped_source_keeps_its_gates(tmp_path: Path) -> None:
    config = replace(DENSE, loop_num=2)
    source = LoopCoder(config, seed=3)
    with torch.no_grad():
        source.model.layers[1].gate_projection.weight.fill_(0.3)
    model = started(export(source, tmp_path / "x"), replace(config, loop_num=3))
    assert model.model.layers[1].gate_projection.weight.eq(0.3).all()


def test_which_layers_are_taken() -> None:
    assert folded_layers(8, 4) == [0, 2, 5, 7]
    assert folded_layers(12, 4) == [0, 4, 7, 11]
    assert folded_layers(6, 1) == [0]
    for target, factor in itertools.product(range(2, 41), range(2, 5)):
        layers = folded_layers(target * factor, target)
        assert layers[0] == 0
        assert layers[-1] == target * factor - 1
        gaps = {b - a for a, b in itertools.pairwise(layers)}
        assert gaps <= {min(gaps), min(gaps) + 1}
        assert min(gaps) >= factor - 1


def test_folding(dense: Path) -> None:
    model = started(dense, replace(DENSE, num_hidden_layers=2, loop_num=2), fold=True)
    source = LoopCoder(DENSE, seed=3).model.layers
    for mine, theirs in zip(model.model.layers, (source[0], source[3]), strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert torch.equal(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    assert run(model).gate_means.eq(0.5).all()


def test_new_tokens_are_the_mean_of_the_old(dense: Path) -> None:
    model = started(dense, replace(DENSE, vocab_size=43))
    source = LoopCoder(DENSE, seed=3)
    for mine, theirs in (
        (model.model.embed_tokens.weight, source.model.embed_tokens.weight),
        (model.head_weight, source.head_weight),
    ):
        assert torch.equal(mine[:40], theirs)
        assert torch.equal(mine[40:], theirs.mean(0).expand(3, -1))
    assert torch.equal(logits(model)[:, :40], logits(source))


def test_an_untied_model_from_a_tied_one(tmp_path: Path) -> None:
    tied = replace(DENSE, tie_word_embeddings=True)
    folder = export(LoopCoder(tied, seed=3), tmp_path / "tied", target="llama")
    model = started(folder, DENSE)
    assert torch.equal(model.head_weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(model), logits(LoopCoder(tied, seed=3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, "model.hidden_size is 16, there 32"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"vocab_size": 39}, "may only grow"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_hidden_layers": 2}, "has 4 layers, the model has 2; fold it"),
        ({"num_hidden_layers": 3}, "has 4 layers, the model has 3$"),
    ],
)
def test_another_model_is_refused(dense: Path, change: dict[str, object], message: str) -> None:
    model = LoopCoder(replace(DENSE, **change), seed=9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        initialise_from(model, dense)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_does_not_fold(dense: Path, tmp_path: Path) -> None:
    for layers in (3, 4):
        with pytest.raises(CheckpointError, match=f"4 layers do not fold into {layers}"):
            started(dense, replace(DENSE, num_hidden_layers=layers), fold=True)
    looped = export(LoopCoder(replace(DENSE, loop_num=2)), tmp_path / "looped")
    with pytest.raises(CheckpointError, match="only dense models fold"):
        started(looped, replace(DENSE, num_hidden_layers=2), fold=True)


def test_names_are_strict(dense: Path) -> None:
    content = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(content | {"mlp_bias": True}))
    with pytest.raises(CheckpointError, match=r"down_proj\.bias is missing"):
        started(dense, replace(DENSE, mlp_bias=True))


def test_main_imports(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "looped"
    arguments = ["import", str(dense), str(out), "--window", "6", "--vocab-size", "48"]
    assert main([*arguments, "--fold", "--loops", "2"]) == 0
    first, _, then = capsys.readouterr().out.splitlines()
    assert first == str(out)
    assert then.endswith(f"train.initialise_from={out}")
    config = read_hf_config(out)
    assert config == replace(
        DENSE, num_hidden_layers=2, loop_num=2, loop_window_size=6, vocab_size=48
    )
    assert run(load_model(out)).gate_means.eq(0.5).all()


def test_main_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "0"], "at least 1"),
        (["--fold", "--loops", "3"], "4 layers do not fold into 3"),
        (["--fold", "--loops", "1"], "do not fold"),
        (["--vocab-size", "3"], "may only grow"),
        (["--window", "0"], "`loop_window_size` must be at least 1"),
    ],
)
def test_main_says_what_cannot_be_imported(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["import", str(dense), str(tmp_path / "out"), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
