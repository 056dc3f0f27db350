"""Text to ids and back; no text forges a control token, whatever vocabulary a user brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from codeflow.errors import CodeflowError
from codeflow.pack.vocabulary import train
from codeflow.tokenizer import CONTROL_TOKENS, END, FILE, SPLIT, Tokenizer

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


# Pieces that tokens could run across where a line ends, and a vocabulary that has such tokens.
PIECES = [
    "\n", "\r\n", "\r", " ", "    ", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028",
    "\u3000", "}", ");",
    "/", "//", "'s", "'ll", "a", "if", "return", "7", "1234", "é", "e\u0301", "\u0301",
    "日本", "\U0001f600", "_", "#", "}\n", "}\n\n", " \n", "\n\n\n", "\n    ", "\n\t\t", ";\n  x",
]  # fmt: skip
ACROSS = train(iter([*SOURCES, *(a + b for a in PIECES for b in PIECES for _ in range(9))]), 4096)
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def taken_apart(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = json.loads(ACROSS)
    change(content)
    return json.dumps(content).encode()


def with_split(pattern: str) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern

    return change


BY_LINE = {
    "trained": ACROSS,
    "qwen": taken_apart(with_split(CONTRACTIONS + SPLIT)),
    "cl100k": taken_apart(with_split(CONTRACTIONS + SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))),
    "llama3": taken_apart(
        lambda c: c.update(
            post_processor={
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                     "use_regex": True},
                    {
                        "type": "TemplateProcessing", "pair": [],
                        "single": [{"SpecialToken": {"id": END, "type_id": 0}},
                                   {"Sequence": {"id": "A", "type_id": 0}}],
                        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
                    },
                ],
            }
        )
    ),
    "composing": taken_apart(lambda c: c.update(normalizer={"type": "NFC"})),
}  # fmt: skip
WHOLE = {
    # o200k's, whose tokens may end in a slash of the next line
    "slash": taken_apart(with_split(SPLIT.replace(r"[\r\n]*", r"[\r\n/]*"))),
    "gpt2": taken_apart(
        lambda c: c.update(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                           "trim_offsets": True, "use_regex": True}
        )
    ),
    "prefix": taken_apart(
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)
    ),
    "more": taken_apart(
        lambda c: c["pre_tokenizer"]["pretokenizers"].append(
            {"type": "Digits", "individual_digits": True}
        )
    ),
    "inverted": taken_apart(lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(invert=True)),
    "folding": taken_apart(lambda c: c.update(normalizer={"type": "NFKC"})),
    "none": taken_apart(lambda c: c.update(pre_tokenizer=None)),
    "doubling": taken_apart(
        lambda c: c.update(
            post_processor={
                "type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
            }
        )
    ),
    "dropout": taken_apart(lambda c: c["model"].update(dropout=0.1)),
}  # fmt: skip


def plain(data: bytes) -> HFTokenizer:
    """The library itself, told that control tokens are text."""
    tokenizer = HFTokenizer.from_str(data.decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


LINE_TOKENIZERS = {name: (Tokenizer(d, name), plain(d)) for name, d in BY_LINE.items()}


@pytest.mark.parametrize("name", BY_LINE)
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), max_size=3))
def test_ids_by_line_are_those_of_the_whole_text(name: str, texts: list[str]) -> None:
    tokenizer, whole = LINE_TOKENIZERS[name]
    expected = [whole.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode(texts) == expected
    assert tokenizer.encode(texts) == expected  # from the lines it knows now


def test_only_vocabularies_known_to_allow_it_are_encoded_by_line() -> None:
    assert all(Tokenizer(data, name)._lines is not None for name, data in BY_LINE.items())
    assert all(Tokenizer(data, name)._lines is None for name, data in WHOLE.items())


def test_known_lines_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codeflow.tokenizer._KEPT_BYTES", 1000)
    tokenizer, whole = Tokenizer(TRAINED, "t"), plain(TRAINED)
    for text in SOURCES:
        assert tokenizer.encode([text]) == [whole.encode(text, add_special_tokens=False).ids]
        assert tokenizer._lines is not None
        assert sum(map(len, tokenizer._lines)) < 1000 + len(text)


def test_short_lines_count_with_all_they_take() -> None:
    tokenizer = Tokenizer(TRAINED, "t")
    for start in range(0, 100_000, 10_000):
        tokenizer.encode(["".join(f"{i:x}\n" for i in range(start, start + 10_000))])
    assert tokenizer._lines is not None
    keys, ids = tokenizer._lines, tokenizer._lines.values()
    taken = sum(map(sys.getsizeof, [*keys, *ids])) + sys.getsizeof(tokenizer._lines)
    assert taken == pytest.approx(tokenizer._kept_bytes, rel=0.3)


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


def test_a_vocabulary_the_library_panics_at_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    content = json.loads(TRAINED)
    content["model"]["continuing_subword_prefix"] = "##"
    with pytest.raises(CodeflowError, match=r"v is not a tokenizer\.json"):
        Tokenizer(json.dumps(content).encode(), "v")
    capfd.readouterr()  # what Rust says of it


def test_a_vocabulary_without_an_end_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    content = TRAINED.replace(END.encode(), b"<|other_end|>")
    with pytest.raises(CodeflowError, match=r"v has no <\|endoftext\|> token"):
        Tokenizer(content, "v")
    with pytest.raises(CodeflowError, match=r"cannot read tokenizer .*absent\.json: No such file"):
        Tokenizer.from_file(tmp_path / "absent.json")
