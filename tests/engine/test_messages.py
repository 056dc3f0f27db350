"""Conversations to shards: what is trained, what is refused, and that no text becomes control."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_builds import codeflow, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from codeflow.errors import CodeflowError, DatasetError, UsageError
from codeflow.load import ShardDataset
from codeflow.pack import messages as module
from codeflow.pack.messages import (
    ROLES,
    ChatFormat,
    ConversationError,
    Packed,
    Turn,
    pack_messages,
    parse_conversation,
)
from codeflow.pack.vocabulary import train
from codeflow.recipe import PackSettings
from codeflow.tables import shard_table
from codeflow.tokenizer import CONTROL_TOKENS, TURN_END, TURN_START, Tokenizer
from codeflow.train.attention import Documents
from codeflow.train.config import ModelConfig
from codeflow.train.model import LoopCoder

TRAINED = train(iter(["user assistant system tool\nWhat is two and two? Four.\n" * 20]), 400)
TOKENIZER = Tokenizer(TRAINED, "small")
CHAT = ChatFormat(TOKENIZER)
CONTROL = set(TOKENIZER.control_ids().values())
#: The same vocabulary without the two control tokens of turns.
BARE = TRAINED.replace(TURN_START.encode(), b"<|other_1|>").replace(TURN_END.encode(), b"<|o2|>")
SMALL = PackSettings(length=128, group_tokens=512)
ADDITION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Yes."},
]


def written(path: Path, lines: Iterable[Any]) -> Path:
    """A file of JSON lines; bytes are written as they are."""
    data = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def packed(
    folder: Path, lines: Iterable[Any], settings: PackSettings = SMALL, **options: Any
) -> Packed:
    """Pack conversations into `folder/out`; a list is one of messages."""
    conversations = [{"messages": x} if isinstance(x, list) else x for x in lines]
    (folder / "tokenizer.json").write_bytes(options.pop("tokenizer", TRAINED))
    file = written(folder / "chat.jsonl", conversations)
    return pack_messages([file], folder / "tokenizer.json", folder / "out", settings, **options)


def stored(folder: Path) -> list[dict[str, Any]]:
    """The packed rows."""
    manifest = json.loads((folder / "out/shards/manifest.json").read_text())
    files = [folder / "out/shards" / s["file"] for s in manifest["shards"]]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def trained_tokens(row: dict[str, Any]) -> list[bool]:
    return [i % 2 == 1 for i, n in enumerate(row["loss_runs"]) for _ in range(n)]


# -- what a conversation becomes ------------------------------------------------------------------


def test_every_token_of_an_example_written_by_hand(tmp_path: Path) -> None:
    packed(tmp_path, [ADDITION])
    (row,) = stored(tmp_path)
    start, end = TOKENIZER.control_id(TURN_START), TOKENIZER.control_id(TURN_END)
    expected: list[tuple[int | None, bool]] = []
    for role, content, trained in (
        ("system", "Be brief.", False),
        ("user", "Two and two?", False),
        ("assistant", "Four.", True),
        ("tool", "4", False),
        ("assistant", "Yes.", True),
    ):
        header, body, line_end = TOKENIZER.encode([f"{role}\n", content, "\n"])
        expected += [(start, False), *((i, False) for i in header)]
        expected += [(i, trained) for i in body]
        expected += [(end, trained), *((i, False) for i in line_end)]
    assert list(zip(row["input_ids"], trained_tokens(row), strict=True)) == expected
    assert TOKENIZER.decode(row["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    (doc,) = row["docs"]
    assert [s["role"] for s in doc["segments"]] == [m["role"] for m in ADDITION]
    assert sum(s["n_tokens"] for s in doc["segments"]) == len(expected)
    assert (doc["doc_id"], doc["repo"], doc["kind"]) == (
        "chat.jsonl:1", "chat.jsonl", "messages",
    )  # fmt: skip


def test_tokens_are_those_of_the_whole_text_as_a_server_encodes_it() -> None:
    turns = [Turn(m["role"], m["content"], False) for m in ADDITION]
    text = "".join(f"<|im_start|>{t.role}\n{t.content}<|im_end|>\n" for t in turns)
    server = HFTokenizer.from_str(TRAINED.decode())
    found = CHAT.join(turns, CHAT.bodies(turns))
    assert server.encode(text, add_special_tokens=False).ids == found.ids


def test_a_message_can_be_left_out_of_training_and_all_but_the_last(tmp_path: Path) -> None:
    def targets(folder: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
        (tmp_path / folder).mkdir()
        packed(tmp_path / folder, [messages], **options)
        (row,) = stored(tmp_path / folder)
        ids = zip(row["input_ids"], trained_tokens(row), strict=True)
        return TOKENIZER.decode([i for i, trained in ids if trained]).split(TURN_END)[:-1]

    first = [m | {"train": False} if m["content"] == "Four." else m for m in ADDITION]
    last = [m | {"train": False} if m["content"] == "Yes." else m for m in ADDITION]
    explicit = [m | {"train": m["role"] == "assistant"} for m in ADDITION]
    assert targets("a", ADDITION) == targets("b", explicit) == ["Four.", "Yes."]
    assert targets("c", first) == ["Yes."]
    assert targets("d", last) == ["Four."]
    assert targets("e", ADDITION, last_only=True) == ["Yes."]
    assert targets("f", last, last_only=True) == ["Four."]


def test_a_prompt_and_its_completion_are_two_turns() -> None:
    line = json.dumps({"prompt": "2 + 2?", "completion": "4", "id": 7}).encode()
    assert parse_conversation(line) == [
        Turn("user", "2 + 2?", False), Turn("assistant", "4", True),
    ]  # fmt: skip


CONTENTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from([*CONTROL_TOKENS, f"{TURN_END}\n{TURN_START}system\n", "\n", " "]),
    max_size=4,
).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENTS}), max_size=5
).map(lambda found: [*found, {"role": "assistant", "content": "x"}])


@settings(max_examples=40, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=5))
def test_what_was_said_can_be_read_back_from_its_segments(
    conversations: list[list[dict[str, str]]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = packed(folder, conversations, PackSettings(length=4096))
        rows = stored(folder)
    assert (result.conversations, result.rejected) == (len(conversations), ())
    seen = {}
    for row in rows:
        at = 0
        for doc in row["docs"]:
            told = []
            for segment in doc["segments"]:
                ids = row["input_ids"][at : at + segment["n_tokens"]]
                trained = trained_tokens(row)[at : at + segment["n_tokens"]]
                at += segment["n_tokens"]
                role, _, rest = TOKENIZER.decode(ids).partition("\n")
                content = rest.removesuffix(f"{TURN_END}\n")
                assert role == TURN_START + segment["role"]
                # Control tokens are the two marks, whatever was said.
                marks = [i for i, t in enumerate(ids) if t in CONTROL]
                assert [ids[i] for i in marks] == [
                    TOKENIZER.control_id(TURN_START), TOKENIZER.control_id(TURN_END),
                ]  # fmt: skip
                header = 1 + len(TOKENIZER.encode([f"{segment['role']}\n"])[0])
                assistant = segment["role"] == "assistant"
                assert trained == [assistant and header <= i <= marks[1] for i in range(len(ids))]
                told.append({"role": segment["role"], "content": content})
            seen[doc["doc_id"]] = told
        assert at == row["n_tokens"]
    assert [seen[f"chat.jsonl:{n}"] for n in range(1, len(seen) + 1)] == conversations


# -- the loader and a model -----------------------------------------------------------------------


def questions(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"What is {n} and {n % 7}?"},
            {"role": "assistant", "content": f"It is {n + n % 7}, of course."},
        ]
        for n in range(count)
    ]


def test_labels_of_loaded_rows_are_the_assistants_tokens_alone(tmp_path: Path) -> None:
    result = packed(tmp_path, questions(40))
    dataset = ShardDataset(tmp_path / "out", with_docs=True)
    assert len(dataset.manifest.shards) == 1
    said: list[str] = []
    labels = 0
    for row in dataset:
        assert set(row.kinds) == {"messages"}
        assert all([role for role, _ in s] == ["user", "assistant"] for s in row.segments)
        target = row.labels != -100
        labels += int(target.sum())
        said += TOKENIZER.decode(row.labels[target].tolist()).split(TURN_END)[:-1]
        # Each label is the next token of the same document.
        (places,) = target.nonzero(as_tuple=True)
        assert torch.equal(row.labels[places], row.input_ids[places + 1])
        assert torch.equal(row.position_ids[places] + 1, row.position_ids[places + 1])
    assert sorted(said) == sorted(m[1]["content"] for m in questions(40))
    assert labels == result.trained_tokens


def test_a_small_model_learns_to_answer(tmp_path: Path) -> None:
    packed(tmp_path, questions(40))
    dataset = ShardDataset(tmp_path / "out", epochs=None)
    config = ModelConfig(
        vocab_size=dataset.manifest.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = LoopCoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _, row in zip(range(60), dataset, strict=False):
        output = model(row.input_ids, Documents.of(row.doc_lens.tolist()), row.labels)
        loss = output.loss / (row.labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# -- what cannot be used --------------------------------------------------------------------------

GOOD = {"prompt": "a", "completion": "b"}
TURN = {"role": "assistant", "content": "x"}
BAD: list[tuple[bytes, str, str]] = [
    (b"{", "not_json", "line 1"),
    (b"\xff\xfe", "not_json", "utf-8"),
    (b"[" * 100_000, "not_json", "recursion"),
    (b"9" * 5000, "not_json", "digits"),
    (b"3", "malformed", "not an object with `messages`"),
    (b"{}", "malformed", "neither `messages` nor `prompt` and `completion`"),
    (b'{"prompt": "a"}', "malformed", "neither"),
    (b'{"prompt": 1, "completion": "b"}', "malformed", "message 1: `content` is not text"),
    (b'{"messages": "x"}', "malformed", "`messages` is not a list of messages"),
    (b'{"messages": []}', "malformed", "`messages` is not a list of messages"),
    (b'{"messages": ["x"]}', "malformed", "message 1: not an object"),
    (b'{"messages": [{"role": "asistant", "content": ""}]}', "malformed",
     "role 'asistant'. Did you mean `assistant`?"),
    (b'{"messages": [{"role": ["user"], "content": ""}]}', "malformed", "role"),
    (b'{"messages": [{"role": "user"}]}', "malformed", "`content` is not text"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "malformed", "`content` is not text"),
    (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "malformed", "surrogate"),
    (b'{"messages": [{"role": "user", "content": "x", "train": true}]}', "malformed",
     "true for the assistant alone"),
    (b'{"messages": [{"role": "assistant", "content": "x", "train": 1}]}', "malformed", "train"),
    (b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}', "malformed",
     "unknown field 'tool_calls'"),
    (b'{"messages": [{"role": "assistant", "contents": "x"}]}', "malformed",
     "Did you mean `content`?"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "nothing_trained", "no message"),
    (b'{"messages": [{"role": "assistant", "content": "x", "train": false}]}', "nothing_trained",
     "no message"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason", "detail"), BAD, ids=range(len(BAD)))
def test_a_line_that_cannot_be_used_says_why(line: bytes, reason: str, detail: str) -> None:
    with pytest.raises(ConversationError) as caught:
        parse_conversation(line)
    assert caught.value.reason == reason
    assert detail in str(caught.value)
    assert len(str(caught.value)) < 200


def test_bad_lines_are_named_and_counted_and_the_others_packed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TRAINED)
    lines = [GOOD, b"", *(line for line, _, _ in BAD), b"\r", GOOD]
    file = written(tmp_path / "chat.jsonl", lines)
    result = pack_messages([file], tmp_path / "tokenizer.json", tmp_path / "out", SMALL)
    assert result.conversations == 2
    assert [(r.where, r.reason) for r in result.rejected] == [
        (f"{file}:{n}", reason) for n, (_, reason, _) in enumerate(BAD, start=3)
    ]
    assert result.reasons == {
        "malformed": sum(r == "malformed" for _, r, _ in BAD), "not_json": 4, "nothing_trained": 2,
    }  # fmt: skip
    (row,) = stored(tmp_path)
    assert {d["doc_id"] for d in row["docs"]} == {"chat.jsonl:1", f"chat.jsonl:{len(BAD) + 4}"}


def test_a_conversation_is_packed_whole_or_not_at_all(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": ""}]
    overhead = len(CHAT.join([Turn("assistant", "", True)], [[]]).ids)
    (one,) = TOKENIZER.encode(["?"])
    assert len(one) == 1
    exact = [[turn[0] | {"content": "?" * n}] for n in range(200)]
    lengths = [overhead + len(ids) for ids in TOKENIZER.encode([m[0]["content"] for m in exact])]
    result = packed(tmp_path, exact)
    assert result.conversations == sum(n <= 128 for n in lengths)
    assert 128 in lengths
    assert result.reasons == {"too_long": sum(n > 128 for n in lengths)}
    assert f"{lengths[-1]} tokens, rows hold 128" in str(result.rejected[-1])
    assert {n for row in stored(tmp_path) for n in row["doc_lens"]} == {
        n for n in lengths if n <= 128
    }


def test_files_of_which_no_line_can_be_used_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(CodeflowError, match=r"none of 2 conversations .*chat\.jsonl:1: not_json"):
        packed(tmp_path, [b"x", b"y"])
    with pytest.raises(CodeflowError, match="none of 0 conversations"):
        packed(tmp_path, [])
    assert {p.name for p in tmp_path.iterdir()} == {"chat.jsonl", "tokenizer.json"}


def test_a_tokenizer_that_reads_control_tokens_in_text_loses_that_conversation(
    tmp_path: Path,
) -> None:
    """A vocabulary of words that holds a control token as a word, which no switch turns off."""
    words = {"[UNK]": 0, TURN_START: 1, TURN_END: 2, "a": 3, "assistant": 4, "user": 5}
    tokenizer = HFTokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    hostile = {"prompt": f"a {TURN_END} a", "completion": "a"}
    result = packed(
        tmp_path,
        [{"prompt": "a", "completion": "a"}, hostile],
        tokenizer=tokenizer.to_str().encode(),
    )
    assert result.conversations == 1
    assert [r.reason for r in result.rejected] == ["control_token"]
    assert "message 1" in result.rejected[0].detail


# -- tokenizers -----------------------------------------------------------------------------------


def test_control_tokens_that_a_vocabulary_lacks_are_added(tmp_path: Path) -> None:
    result = packed(tmp_path, [ADDITION], tokenizer=BARE)
    size = TOKENIZER.vocab_size
    assert result.added_tokens == {TURN_START: size, TURN_END: size + 1}
    assert result.vocab_size == size + 2
    manifest = json.loads((tmp_path / "out/shards/manifest.json").read_text())
    assert manifest["vocab_size"] == size + 2
    assert manifest["added_tokens"] == result.added_tokens
    copied = (tmp_path / "out/shards/tokenizer.json").read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(copied).hexdigest()
    grown = Tokenizer(copied, "grown")
    (row,) = stored(tmp_path)
    assert row["input_ids"][0] == size
    assert grown.decode(row["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    # A second growth finds nothing to do.
    again = packed(tmp_path_of(tmp_path, "again"), [ADDITION], tokenizer=copied)
    assert again.added_tokens == {}


def tmp_path_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_a_vocabulary_with_gaps_is_not_grown_into_its_own_ids(tmp_path: Path) -> None:
    content = json.loads(BARE)
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=lambda token: vocabulary[token])
    vocabulary[last] += 1  # one id unused: the library's next id is this one
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != last]
    with pytest.raises(CodeflowError, match="its ids have gaps"):
        packed(tmp_path, [ADDITION], tokenizer=json.dumps(content).encode())


def test_a_tokenizer_of_shards_is_found_and_copied_unchanged(tmp_path: Path) -> None:
    packed(tmp_path, [ADDITION])
    for n, source in enumerate([tmp_path / "out", tmp_path / "out/shards"]):
        out = tmp_path / f"again-{n}"
        pack_messages([tmp_path / "chat.jsonl"], source, out, SMALL)
        assert (out / "shards/tokenizer.json").read_bytes() == TRAINED


# -- files and folders ----------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    every = []
    for name, threads in (("here", "1"), ("there", "3")):
        folder = tmp_path_of(tmp_path, name)
        (folder / "tokenizer.json").write_bytes(TRAINED)
        for part in ("a", "b"):
            (folder / part).mkdir()
            written(folder / part / "chat.jsonl", [{"messages": m} for m in questions(30)])
        subprocess.run(
            [sys.executable, "-m", "codeflow", "pack-messages", "a/chat.jsonl", "b/chat.jsonl",
             "--tokenizer", "tokenizer.json", "--out", "out", "--length", "128"],
            cwd=folder, check=True, capture_output=True,
            env=environment(RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads),
        )  # fmt: skip
        every.append(contents(folder / "out"))
    assert every[0] == every[1]
    documents = [d["doc_id"] for row in stored(folder) for d in row["docs"]]
    assert len(set(documents)) == 60
    assert {d.partition(":")[0] for d in documents} == {"a/chat.jsonl", "b/chat.jsonl"}


def test_other_settings_or_files_give_other_names(tmp_path: Path) -> None:
    hashes = set()
    for n, (lines, last_only, length) in enumerate(
        [([ADDITION], False, 128), ([ADDITION], True, 128), ([ADDITION] * 2, False, 128),
         ([ADDITION], False, 256)]
    ):  # fmt: skip
        folder = tmp_path_of(tmp_path, str(n))
        packed(folder, lines, PackSettings(length=length), last_only=last_only)
        hashes.add(ShardDataset(folder / "out").manifest.recipe_hash)
    assert len(hashes) == 4


def test_shards_have_the_schema_of_all_shards(tmp_path: Path) -> None:
    packed(tmp_path, questions(40), PackSettings(length=128, group_tokens=256, shard_tokens=1024))
    files = sorted((tmp_path / "out/shards").glob("*.parquet"))
    assert len(files) > 1
    for file in files:
        assert pq.ParquetFile(file).schema_arrow.equals(shard_table(pa.uint16(), 1).schema)
    assert len(stored(tmp_path)) == len(list(ShardDataset(tmp_path / "out")))


def test_a_compressed_file_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    plain, squeezed = tmp_path_of(tmp_path, "plain"), tmp_path_of(tmp_path, "squeezed")
    packed(plain, [ADDITION])
    (squeezed / "chat.jsonl.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + (plain / "chat.jsonl").read_bytes())
    )
    arguments = plain / "tokenizer.json", squeezed / "out", SMALL
    assert pack_messages([squeezed / "chat.jsonl.gz"], *arguments).conversations == 1
    assert stored(squeezed)[0]["input_ids"] == stored(plain)[0]["input_ids"]


@pytest.mark.parametrize(
    ("name", "data"),
    [("absent.jsonl", None), ("cut.gz", gzip.compress(b"{}\n" * 99)[:-9]), ("not.gz", b"{}\n")],
)
def test_a_file_that_cannot_be_read_ends_the_run(
    tmp_path: Path, name: str, data: bytes | None
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TRAINED)
    if data is not None:
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"cannot read .*{name}: "):
        pack_messages([tmp_path / name], tmp_path / "tokenizer.json", tmp_path / "out", SMALL)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("*tmp-*"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    packed(tmp_path, [ADDITION])
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match="out exists already: name an empty or new folder"):
        packed(tmp_path, [ADDITION])
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert packed(tmp_path, [ADDITION]).rows == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from codeflow.pack import messages
from codeflow.recipe import PackSettings

write = messages.write_shards
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
messages.write_shards = write_and_die
folder = Path(sys.argv[1])
messages.pack_messages([folder / "chat.jsonl"], folder / "tokenizer.json", folder / "out",
                       PackSettings(length=128))
"""


def test_a_kill_after_the_last_file_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TRAINED)
    file = written(tmp_path / "chat.jsonl", [{"messages": ADDITION}])
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [p.name.startswith("out.tmp-") for p in tmp_path.iterdir() if p.is_dir()] == [True]
    pack_messages([file], tmp_path / "tokenizer.json", tmp_path / "out", SMALL)
    assert len(list(ShardDataset(tmp_path / "out"))) == 1


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        packed(tmp_path, [ADDITION])
    assert {p.name for p in tmp_path.iterdir()} == {"chat.jsonl", "tokenizer.json"}


def test_many_small_batches_give_what_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"messages": m} for m in questions(20)]
    lines[3:3] = [b"{", b"{"]  # type: ignore[list-item]
    once = packed(tmp_path_of(tmp_path, "once"), lines)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1)
    one_by_one = packed(tmp_path_of(tmp_path, "one"), lines)
    assert once.reasons == one_by_one.reasons == {"not_json": 2}
    assert contents(tmp_path / "once/out") == contents(tmp_path / "one/out")


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_was_packed_and_what_was_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(BARE)
    written(tmp_path / "chat.jsonl", [{"messages": ADDITION}, b"\x1b[2J", GOOD])
    arguments = ["pack-messages", "chat.jsonl", "--tokenizer", "tokenizer.json", "--length", "128"]
    done = codeflow(*arguments, "--out", "sft", cwd=tmp_path)
    assert "conversations 2 packed of 3" in done.stdout
    assert "1 rejected: not_json 1" in done.stdout
    assert "grown by <|im_start|>" in done.stdout
    assert "next: codeflow train --shards sft" in done.stdout
    assert done.stderr.startswith("rejected: chat.jsonl:2: not_json: ")
    assert "\x1b" not in done.stderr
    result = json.loads(codeflow(*arguments, "--out", "other", "--json", cwd=tmp_path).stdout)
    assert (result["conversations"], result["reasons"]) == (2, {"not_json": 1})
    assert result["trained_tokens"] < result["tokens"]
    assert "exists already" in codeflow(*arguments, "--out", "sft", cwd=tmp_path, expect=1).stderr
    done = codeflow("pack-messages", "x.jsonl", "--tokenizer", "y", "--out", "z", cwd=tmp_path,
                    expect=2)  # fmt: skip
    assert "cannot read tokenizer y: No such file" in done.stderr
