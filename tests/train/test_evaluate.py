from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shard_factory import END, Row, byte_tokenizer, described, random_rows, write_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from codeflow.errors import UsageError
from codeflow.load import PackedRow, ShardDataset
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.evaluate import Evaluation, Score, evaluate, main, token_bytes
from codeflow.train.hf import to_hf
from codeflow.train.model import LoopCoder

CONFIG = ModelConfig(
    vocab_size=END + 1,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    loop_window_size=4,
    initializer_range=0.3,
)
ROWS = described(random_rows(20, 48))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("evaluate") / "data", ROWS, length=48)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(LoopCoder(CONFIG).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    return folder


@pytest.fixture
def model() -> LoopCoder:
    return LoopCoder(CONFIG)


def rows_of(data: Path, **options: object) -> list[PackedRow]:
    return list(ShardDataset(data, with_docs=True, **options))  # type: ignore[arg-type]


@torch.no_grad()
def naive(model: LoopCoder, row: Row) -> dict[str, list[float]]:
    """Losses by group, document by document and token by token, from whole logits."""
    trained = [i % 2 == 1 for i, n in enumerate(row.loss_runs) for _ in range(n)]
    losses: dict[str, list[float]] = defaultdict(list)
    start = 0
    kinds, segments = row.kinds or [], row.segments or []
    for length, kind, runs in zip(row.doc_lens, kinds, segments, strict=True):
        ids = row.ids[start : start + length]
        hidden = model(torch.tensor(ids), Documents.of([length])).hidden
        log_p = model.logits(hidden).float().log_softmax(-1)
        roles = [role for role, n in runs for _ in range(n)]
        for t in range(1, length):
            if trained[start + t]:
                nats = -log_p[t - 1, ids[t]].item()
                losses["total"].append(nats)
                losses[f"kind {kind}"].append(nats)
                if roles:
                    losses[f"role {roles[t]}"].append(nats)
                if ids[t] != END:
                    losses["text"].append(nats)
        start += length
    return losses


def close(score: Score, losses: list[float]) -> bool:
    return score.targets == len(losses) and math.isclose(score.nats, sum(losses), rel_tol=1e-5)


def test_equals_the_naive_reference(model: LoopCoder, data: Path) -> None:
    wanted: dict[str, list[float]] = defaultdict(list)
    for row in ROWS:
        for name, losses in naive(model, row).items():
            wanted[name] += losses
    lengths = token_bytes(data / "shards" / "tokenizer.json", END + 1)
    found = evaluate(model, rows_of(data), "cpu", lengths)
    assert (found.rows, found.tokens) == (20, sum(len(row.ids) for row in ROWS))
    assert close(found.total, wanted["total"])
    assert close(found.text, wanted["text"])
    assert found.text_bytes == len(wanted["text"])
    groups = {f"kind {name}": score for name, score in found.by_kind.items()}
    groups |= {f"role {name}": score for name, score in found.by_role.items()}
    assert len(groups) == 5
    assert groups.keys() == wanted.keys() - {"total", "text"}
    assert all(close(score, wanted[name]) for name, score in groups.items())
    in_roles = sum(score.targets for score in found.by_role.values())
    assert 0 < in_roles < found.total.targets == sum(s.targets for s in found.by_kind.values())


def test_a_target_belongs_to_the_segment_of_the_token_to_predict(
    model: LoopCoder, tmp_path: Path
) -> None:
    row = Row([1, 2, 3, 4], [4], [0, 4], ["k"], [[("context", 2), ("patch", 2)]])
    data = write_shards(tmp_path / "data", [row], length=4)
    found = evaluate(model, rows_of(data), "cpu")
    assert {role: score.targets for role, score in found.by_role.items()} == {
        "context": 1,
        "patch": 2,
    }


def test_the_sum_of_evaluations_is_that_of_all_rows(model: LoopCoder, data: Path) -> None:
    rows = rows_of(data)
    whole = evaluate(model, rows, "cpu")
    parts = [evaluate(model, rows[rank::3], "cpu") for rank in range(3)]
    joined = sum(parts, Evaluation())
    assert joined.rows == 20
    assert joined.by_role.keys() == whole.by_role.keys()
    for name, value in joined.as_metrics().items():
        assert math.isclose(value, whole.as_metrics()[name], rel_tol=1e-9)


def test_bfloat16_is_close(data: Path) -> None:
    rows = rows_of(data)
    wide = evaluate(LoopCoder(CONFIG), rows, "cpu")
    narrow = evaluate(LoopCoder(CONFIG, dtype=torch.bfloat16), rows, "cpu")
    assert narrow.loss != wide.loss
    assert math.isclose(narrow.loss, wide.loss, rel_tol=1e-2)


def test_bits_per_byte_of_a_uniform_model(tmp_path: Path) -> None:
    """Every token costs log2 V bits; with one token of 3 bytes and one control token of none."""
    model = LoopCoder(CONFIG)
    with torch.no_grad():
        model.head_weight.zero_()
    lengths = torch.ones(END + 1, dtype=torch.int64)
    lengths[7], lengths[END] = 3, 0
    data = write_shards(tmp_path / "data", [Row([1, 7, 2, END], [4], [0, 4])], length=4)
    found = evaluate(model, rows_of(data), "cpu", lengths)
    assert found.total.targets == 3
    assert (found.text.targets, found.text_bytes) == (2, 4)
    assert found.bits_per_byte == pytest.approx(2 * math.log2(END + 1) / 4)
    assert found.loss == pytest.approx(math.log(END + 1))


def test_metrics_are_flat_and_finite(model: LoopCoder, data: Path, tmp_path: Path) -> None:
    lengths = token_bytes(data / "shards" / "tokenizer.json", END + 1)
    names = evaluate(model, rows_of(data), "cpu", lengths).as_metrics().keys()
    kinds = {"eval/kind/snapshot", "eval/kind/transition"}
    roles = {"eval/role/context", "eval/role/message", "eval/role/patch"}
    assert names == {"eval/loss", "eval/bits_per_byte"} | kinds | roles
    plain = write_shards(tmp_path / "plain", random_rows(2, 48), length=48)
    assert evaluate(model, rows_of(plain), "cpu").as_metrics().keys() == {
        "eval/loss",
        "eval/kind/test",
    }
    assert evaluate(model, ShardDataset(plain), "cpu").as_metrics().keys() == {"eval/loss"}
    assert evaluate(model, [], "cpu").as_metrics() == {}
    untrained = write_shards(tmp_path / "untrained", [Row([1, 2], [2], [2])], length=2)
    found = evaluate(model, rows_of(untrained), "cpu", lengths)
    assert found.as_metrics() == {}
    assert (found.tokens, found.total.targets, found.bits_per_byte) == (2, 0, None)


def test_bytes_of_tokens_add_up_to_those_of_the_text(tmp_path: Path) -> None:
    text = "def größe(x):\n\treturn '→' * x  # 世界\n" * 4
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lengths = token_bytes(tmp_path / "tokenizer.json", 300)
    ids = tokenizer.encode(text).ids
    assert int(lengths[ids].sum()) == len(text.encode())
    assert len(ids) < len(text.encode())
    assert lengths[0] == 0
    assert (lengths[tokenizer.get_vocab_size() :] == 0).all()
    with pytest.raises(UsageError, match=r"has token \d+; the model has 100"):
        token_bytes(tmp_path / "tokenizer.json", 100)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"decoder": null}', '{"decoder": {}}'])
def test_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read as a tokenizer"):
        token_bytes(tmp_path / "tokenizer.json", 300)
    with pytest.raises(UsageError, match="cannot be read as a tokenizer"):
        token_bytes(tmp_path / "missing.json", 300)


def test_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    content = byte_tokenizer() | {"decoder": {"type": "Metaspace", "replacement": "_"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is not byte-level"):
        token_bytes(tmp_path / "tokenizer.json", 300)


def test_command_line_evaluates_the_held_out_rows(
    checkpoint: Path, data: Path, model: LoopCoder, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--shards", str(data), "--device", "cpu", "--json"]
    lengths = token_bytes(data / "shards" / "tokenizer.json", END + 1)
    cases: list[tuple[list[str], dict[str, object], int | None]] = [
        (["--holdout", "0.05"], {"holdout": 0.05, "part": "heldout"}, None),
        (["--holdout", "0.3"], {"holdout": 0.3, "part": "heldout"}, None),
        ([], {}, None),  # which rows were held out is not known of this model
        (["--all"], {}, None),
        (["--all", "--rows", "3"], {}, 3),
    ]
    for options, part, rows in cases:
        assert main([*arguments, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        wanted = evaluate(model, islice(rows_of(data, **part), rows), "cpu", lengths)
        assert found["rows"] == wanted.rows
        assert found["loss"] == pytest.approx(wanted.loss)
        assert found["bits_per_byte"] == pytest.approx(wanted.bits_per_byte)
        assert found["by_role"].keys() == wanted.by_role.keys()
        assert found["held_out"] is None


def test_command_line_prints_a_table(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--shards", str(data), "--device", "cpu", "--all"]
    assert main(arguments) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "all rows; whether the model was trained on them is not known"
    assert "nats per target" in lines[0]
    assert "bits per byte" in lines[0]
    assert [line.split()[0] for line in lines if line] == [
        *("loss", "kind", *(line.split()[0] for line in lines[3:5])),
        *("role", *(line.split()[0] for line in lines[7:])),
    ]
    assert {line.split()[0] for line in lines[3:5]} == {"snapshot", "transition"}
    assert {line.split()[0] for line in lines[7:]} == {"context", "message", "patch"}


def test_command_line_says_what_is_not_known(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shards(tmp_path / "data", random_rows(4, 48), length=48)
    (data / "shards" / "tokenizer.json").unlink()
    assert main([str(checkpoint), "--shards", str(data), "--device", "cpu", "--all"]) == 0
    output = capsys.readouterr()
    assert "bits per byte are left out: " in output.err
    assert "bits per byte" not in output.out
    assert "by role: these shards do not say" in output.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--holdout", "0"], 1, "holds no rows out"),
        (["--holdout", "2"], 1, "share from 0 to below 1"),
        (["--device", "abacus"], 2, "--device abacus: not usable here"),
        (["--shards", "nowhere"], 1, "no manifest.json here"),
    ],
)
def test_command_line_errors(
    checkpoint: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert main([str(checkpoint), "--shards", str(data), *arguments]) == code
    assert message in capsys.readouterr().err


def test_command_line_without_targets(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shards(tmp_path / "data", [Row([1, 2], [2], [2])], length=2)
    assert main([str(checkpoint), "--shards", str(data), "--all"]) == 1
    assert "none of these rows has a token to predict" in capsys.readouterr().err


def test_command_line_with_data_of_another_vocabulary(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(CONFIG, vocab_size=100)
    save_file(LoopCoder(small).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(small)))
    assert main([str(tmp_path), "--shards", str(data), "--device", "cpu"]) == 2
    assert "packed with 257 token ids, the model has 100" in capsys.readouterr().err
