from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shard_factory import END, byte_tokenizer
from torch import Tensor

from codeflow.errors import UsageError
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.generate import Generation, choose, generate, generate_batch, main
from codeflow.train.hf import to_hf
from codeflow.train.model import LoopCoder

W = 5
SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    loop_window_size=W,
    initializer_range=0.3,
    max_position_embeddings=64,
)
SECOND_VERSION = replace(
    SMALL,
    plt_emb_scale=0.7,
    plt_hidden_scale=0.2,
    plt_normalize_per_loop=True,
    plt_gate_use_hidden_states=True,
)
CONFIGS = {
    "one loop": replace(SMALL, loop_num=1),
    "two loops": SMALL,
    "three loops": replace(SMALL, loop_num=3),
    "second version": SECOND_VERSION,
    "second version, three loops": replace(SECOND_VERSION, loop_num=3),
    "biases, tied": replace(SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
}
EVERY_CONFIG = pytest.mark.parametrize("name", CONFIGS)


def make(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LoopCoder:
    """A model in which nothing is zero: gates, norms and biases are random, too."""
    model = LoopCoder(config, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate_projection" in name or "norm" in name or "bias" in name:
                p += 0.5 * torch.randn(p.shape, generator=g)
    return model


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 61, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def log_probs_in_full(model: LoopCoder, ids: list[int]) -> Tensor:
    """(T, V): the training forward pass over everything at once."""
    hidden = model(torch.tensor(ids), Documents.of([len(ids)])).hidden
    return model.logits(hidden).float().log_softmax(-1)


def require_equal_to_full(
    model: LoopCoder, prompt: list[int], sample: Generation, tolerance: float = 1e-4
) -> None:
    whole = log_probs_in_full(model, [*prompt, *sample.tokens])[len(prompt) - 1 : -1]
    wanted = whole.gather(-1, torch.tensor(sample.tokens)[:, None]).squeeze(-1)
    assert torch.tensor(sample.log_probs).sub(wanted).abs().max() < tolerance


@EVERY_CONFIG
@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 3 * W + 2])
def test_decoding_equals_the_full_forward_pass(name: str, length: int) -> None:
    """Prompts shorter than, as long as and longer than the window; always decodes beyond it."""
    model, prompt = make(CONFIGS[name]), tokens(length)
    (greedy,) = generate(model, prompt, max_new_tokens=2 * W + 3, temperature=0)
    require_equal_to_full(model, prompt, greedy)
    whole = log_probs_in_full(model, [*prompt, *greedy.tokens])[length - 1 : -1]
    assert list(greedy.tokens) == whole.argmax(-1).tolist()
    for sample in generate(model, prompt, max_new_tokens=2 * W + 3, n=3):
        require_equal_to_full(model, prompt, sample)


@pytest.mark.parametrize("window", [1, 2, 64])
def test_other_windows(window: int) -> None:
    model = make(replace(SMALL, loop_window_size=window, loop_num=3))
    (sample,) = generate(model, tokens(4), max_new_tokens=8)
    require_equal_to_full(model, tokens(4), sample)


def test_the_window_matters() -> None:
    """Guards the tests above: another window gives other numbers."""
    model = make(SMALL)
    ids = tokens(3 * W)
    before = log_probs_in_full(model, ids)
    for layer in model.model.layers:
        layer.window += 1  # type: ignore[operator]
    assert (log_probs_in_full(model, ids) - before).abs().max() > 1e-2


@EVERY_CONFIG
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 3 * W), min_size=2, max_size=4), n=st.integers(1, 3))
def test_prompts_of_different_lengths_do_not_see_each_other(
    name: str, lengths: list[int], n: int
) -> None:
    model = make(CONFIGS[name])
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    found = generate_batch(model, prompts, max_new_tokens=W + 2, n=n)
    assert [len(samples) for samples in found] == [n] * len(prompts)
    for prompt, samples in zip(prompts, found, strict=True):
        for sample in samples:
            # Three loops of random gates and norms make 5e-5 of one unit in the last place of the
            # embeddings, so chance prompts need more room than the fixed ones above.
            require_equal_to_full(model, prompt, sample, tolerance=1e-3)


def test_samples_that_stop_leave_the_others_alone() -> None:
    """With a sixth of the vocabulary as stop tokens the batch shrinks again and again."""
    model, prompts = make(SMALL), [tokens(4), tokens(9, 1)]
    stop = range(0, 61, 6)
    found = generate_batch(model, prompts, max_new_tokens=20, n=16, stop_ids=stop)
    lengths = set()
    for prompt, samples in zip(prompts, found, strict=True):
        for sample in samples:
            require_equal_to_full(model, prompt, sample)
            ends = [token in stop for token in sample.tokens]
            assert not any(ends[:-1])
            assert ends[-1] == sample.stopped
            assert sample.stopped or len(ends) == 20
            lengths.add(len(ends))
    assert len(lengths) > 5


def test_bfloat16() -> None:
    model, prompt = make(SMALL, torch.bfloat16), tokens(2 * W)
    (sample,) = generate(model, prompt, max_new_tokens=2 * W, temperature=0)
    require_equal_to_full(model, prompt, sample, tolerance=0.15)
    (cast,) = generate(model.to(torch.bfloat16), prompt, max_new_tokens=2 * W, temperature=0)
    require_equal_to_full(model, prompt, cast, tolerance=0.15)


def test_one_candidate_is_greedy() -> None:
    model, prompt = make(SMALL), tokens(7)
    (greedy,) = generate(model, prompt, max_new_tokens=12, temperature=0)
    options: list[dict[str, float]] = [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]
    for option in options:
        samples = generate(model, prompt, max_new_tokens=12, n=2, **option)  # type: ignore[arg-type]
        assert [sample.tokens for sample in samples] == [greedy.tokens] * 2


def test_a_seed_means_the_same_tokens() -> None:
    model, prompt = make(SMALL), tokens(7)
    first, again, other = (
        generate(model, prompt, max_new_tokens=12, n=4, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len({sample.tokens for sample in first}) == 4


def test_a_generator_goes_on() -> None:
    model, prompt = make(SMALL), tokens(7)
    generator = torch.Generator().manual_seed(3)
    first, second = (
        generate(model, prompt, max_new_tokens=12, generator=generator) for _ in range(2)
    )
    assert first == generate(model, prompt, max_new_tokens=12, seed=3)
    assert first != second


P = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, 1.0, P),
        (0.5, None, 1.0, P**2),
        (2.0, None, 1.0, P**0.5),
        (1.0, 2, 1.0, P * (P > 0.2)),
        (1.0, 99, 1.0, P),
        (1.0, None, 0.69, P * (P > 0.2)),
        (1.0, None, 0.71, P * (P > 0.12)),
        (2.0, 3, 0.8, (P * (P > 0.12)) ** 0.5),
        (0.5, 3, 0.8, (P * (P > 0.2)) ** 2),
    ],
)
def test_sampled_frequencies(
    temperature: float, top_k: int | None, top_p: float, expected: Tensor
) -> None:
    logits = (P.log() + 3.0).expand(20_000, 5)
    drawn = choose(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = expected / expected.sum()
    assert (found - expected).abs().max() < 0.015
    assert (found[expected == 0] == 0).all()


def test_zero_temperature_takes_the_most_probable() -> None:
    assert choose(P.log()[None], 0.0, 3, 0.5, torch.Generator()).tolist() == [0]


def test_log_probs_ignore_temperature_and_truncation() -> None:
    model, prompt = make(SMALL), tokens(7)
    (sample,) = generate(model, prompt, max_new_tokens=9, temperature=0.3, top_k=5, top_p=0.9)
    require_equal_to_full(model, prompt, sample)


def test_room_up_to_the_context_and_no_further() -> None:
    model = make(SMALL)
    (sample,) = generate(model, tokens(60), max_new_tokens=4)
    assert len(sample.tokens) == 4
    with pytest.raises(UsageError, match="60 tokens and 5 new ones do not fit"):
        generate(model, tokens(60), max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"prompt_ids": []}, "at least one token"),
        ({"prompt_ids": [3, 61]}, "has token 61, the model has tokens 0 to 60"),
        ({"prompt_ids": [3, -1]}, "has token -1"),
    ],
)
def test_impossible_requests(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(make(SMALL), **({"prompt_ids": [1], "max_new_tokens": 1} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    model = make(replace(SMALL, vocab_size=END + 1))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(model.config)))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def test_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint), "--prompt", "def f(", "--max-new-tokens", "5"]
    arguments += ["--device", "cpu", "--samples", "2", "--temperature", "1"]
    assert main([*arguments, "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)
    assert [len(sample["tokens"]) for sample in samples] == [5, 5]
    kept = [bytes(t for t in sample["tokens"] if t != END) for sample in samples]
    assert [sample["text"] for sample in samples] == [b.decode(errors="replace") for b in kept]
    assert main(arguments) == 0
    assert "--- sample 2 of 2" in capsys.readouterr().out


def test_command_line_stops_and_reads_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, run = tmp_path / "prompt.py", tmp_path / "run"
    prompt.write_text("import os\n")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000007").symlink_to(checkpoint)
    arguments = [str(run), "--prompt-file", str(prompt), "--device", "cpu", "--json"]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    (free,) = json.loads(capsys.readouterr().out)
    assert not free["stopped"]
    model = make(replace(SMALL, vocab_size=END + 1))
    (wanted,) = generate(model, list(b"import os\n"), max_new_tokens=3, temperature=0)
    assert free["tokens"] == list(wanted.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stop", "<|endoftxt|>"], "Did you mean `<|endoftext|>`?"),
        (["--tokenizer", "nothing.json"], "nothing.json: cannot be read as a tokenizer.json"),
        (["--device", "abacus"], "--device abacus: not usable here"),
        (["--max-new-tokens", "999"], "do not fit the model's context of 64"),
    ],
)
def test_command_line_errors(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(checkpoint), "--prompt", "x", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_command_line_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path), "--prompt", "x"]) == 1
    assert "no complete checkpoint yet" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "none: no such folder" in capsys.readouterr().err
