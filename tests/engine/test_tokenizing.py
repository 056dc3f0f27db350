"""Text to ids and back; no text forges a control token, whatever vocabulary a user brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.errors import CodeflowError
from codeflow.pack.vocabulary import train
from codeflow.tokenizer import CONTROL_TOKENS, END, FILE, Tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = [p.read_text() for p in sorted((ROOT / "codeflow").glob("*.py"))]
TRAINED = train(iter(SOURCES), 1024)


def changed(**fields: Any) -> dict[str, Any]:
    return dict(json.loads(TRAINED)) | fields


def foreign(special: bool) -> bytes:
    """A vocabulary in the manner of Qwen's: control tokens last, and not all marked as such."""
    content = json.loads(TRAINED)
    vocabulary = {t: i for t, i in content["model"]["vocab"].items() if t not in CONTROL_TOKENS}
    order = sorted(vocabulary, key=lambda token: vocabulary[token])
    content["model"]["vocab"] = {token: i for i, token in enumerate(order)}
    content["added_tokens"] = [
        token | {"id": len(order) + i, "special": special and i > 0}
        for i, token in enumerate(content["added_tokens"])
    ]
    return json.dumps(content).encode()


VOCABULARIES = {
    "trained": TRAINED,
    "foreign": foreign(special=True),
    "unmarked": foreign(special=False),
    "truncating": json.dumps(
        changed(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                        "stride": 0},
            padding={"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": END},
        )
    ).encode(),
}  # fmt: skip
TOKENIZERS = {name: Tokenizer(data, name) for name, data in VOCABULARIES.items()}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    | st.sampled_from([*CONTROL_TOKENS, " " * 40, "\r\n", "def f():\n\treturn 1\n"]),
    max_size=8,
).map("".join)


@EVERY
@given(texts=st.lists(TEXTS, max_size=4))
def test_text_comes_back_and_never_holds_a_control_token(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    control = set(tokenizer.control_ids().values())
    assert not control & {i for ids in encoded for i in ids}
    assert all(0 <= i < tokenizer.vocab_size for ids in encoded for i in ids)


@EVERY
def test_control_tokens_have_ids_of_their_own(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.control_ids()
    assert list(ids) == list(CONTROL_TOKENS)
    assert len(set(ids.values())) == len(ids)
    assert tokenizer.decode([ids[END], ids[FILE]]) == END + FILE
    assert tokenizer.control_id("<|no_such|>") is None


def test_control_tokens_come_first_in_a_trained_vocabulary() -> None:
    assert list(TOKENIZERS["trained"].control_ids().values()) == list(range(len(CONTROL_TOKENS)))
    assert TOKENIZERS["trained"].vocab_size == 1024


def test_the_size_covers_ids_after_a_gap() -> None:
    tokens = json.loads(TRAINED)["added_tokens"]
    data = changed(added_tokens=[*tokens, tokens[0] | {"id": 70_000, "content": "<|far|>"}])
    tokenizer = Tokenizer(json.dumps(data).encode(), "gap")
    far = tokenizer.control_id("<|far|>")
    assert far is not None
    assert tokenizer.vocab_size == far + 1


TRAIN = """
import hashlib, sys
from pathlib import Path
from codeflow.pack.vocabulary import train
texts = [p.read_text() for p in sorted(Path(sys.argv[1]).glob("*.py"))]
print(hashlib.sha256(train(iter(texts), 1024)).hexdigest())
"""


def test_training_is_deterministic_here_and_in_other_processes() -> None:
    assert train(iter(SOURCES), 1024) == TRAINED
    hashes = {
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(ROOT / "codeflow")],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed,
                              "RAYON_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "3"))
    }  # fmt: skip
    assert hashes == {TOKENIZERS["trained"].sha256}


def test_training_learns_from_its_texts() -> None:
    text = SOURCES[0]
    (here,) = TOKENIZERS["trained"].encode([text])
    (elsewhere,) = Tokenizer(train(iter(["xyzzy " * 50]), 1024), "other").encode([text])
    assert len(here) < 0.6 * len(elsewhere)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b'{"model": 3}'])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(CodeflowError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.from_file(path)


def test_a_vocabulary_without_an_end_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    content = TRAINED.replace(END.encode(), b"<|other_end|>")
    with pytest.raises(CodeflowError, match=r"v has no <\|endoftext\|> token"):
        Tokenizer(content, "v")
    with pytest.raises(CodeflowError, match=r"cannot read tokenizer .*absent\.json: No such file"):
        Tokenizer.from_file(tmp_path / "absent.json")
