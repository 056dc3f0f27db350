"""Text to token ids, with control tokens that no source text can forge.

Wraps a `tokenizer.json` of the `tokenizers` library. Control tokens are inserted by id when a
document is put together; the same characters inside a source file are ordinary text. (By default
every BPE library turns a literal `<|endoftext|>` in a file into the real control token.)
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from sys import getsizeof
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as _HFTokenizer

from codeflow.errors import CodeflowError
from codeflow.storage import AnyPath

END = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
REPO = "<|repo_name|>"
FILE = "<|file_sep|>"
COMMIT_MESSAGE = "<|commit_msg|>"
COMMIT_AFTER = "<|commit_after|>"

#: Control tokens of a trained vocabulary, in id order: those of the IQuest-Coder-V1 report, and
#: StarCoder's commit tokens, because the report names none for changes.
CONTROL_TOKENS = (
    END,
    TURN_START,
    TURN_END,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    REPO,
    FILE,
    "<|commit_before|>",
    COMMIT_MESSAGE,
    COMMIT_AFTER,
)

#: What trained vocabularies take apart before BPE: words with one leading character, digits one by
#: one (so that numbers have one spelling), runs of punctuation, line ends.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: That and its kin: those of Qwen, cl100k and Llama 3.
_SPLITS = {
    contractions + SPLIT.replace(r"|\p{N}|", digits)
    for contractions in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|")
    for digits in (r"|\p{N}|", r"|\p{N}{1,3}|")
}
# None of their tokens holds a line end and what follows it, unless that is another line end or
# white space up to one. White space is a wider notion there, hence only lines that begin in ASCII.
_LINE_END = re.compile(r"\n(?=[ \t]*[!-~])")
_KEPT_BYTES = 128 << 20  # of lines with their ids, before they are forgotten
_ENTRY_BYTES = 100  # what a dict takes for each
_LINES_AT_ONCE = 4096  # the library's own results are far larger than ids


class Tokenizer:
    """A vocabulary, byte-level BPE as a rule.

    Where its way of taking texts apart allows it, texts are encoded line by line and the ids of
    lines kept, because versions of a file share nearly all of them: the same ids, 4x faster on
    the documents of redis.

    Args:
        data: A tokenizer.json.
        where: What to call it in messages.
        required: Control tokens it must have.

    Attributes:
        vocab_size: Largest id plus one, control tokens included.
        sha256: Hash of the tokenizer.json it was read from.
    """

    def __init__(self, data: bytes, where: str, required: Sequence[str] = (END,)) -> None:
        try:
            content = json.loads(data)
            # Some vocabularies (Qwen2.5-Coder's) leave control tokens unmarked; the switch below
            # turns text of marked ones only into ordinary tokens.
            for token in content.get("added_tokens", []):
                token["special"] = True
            self._tokenizer = _HFTokenizer.from_str(json.dumps(content))
        except BaseException as e:  # the library raises bare Exception, or panics
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise CodeflowError(f"{where} is not a tokenizer.json: {e}") from e
        self._lines: dict[str, array[int]] | None = {} if _encodes_lines_alone(content) else None
        self._kept_bytes = 0
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # a file may carry either, and nothing is ever cut
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.sha256 = hashlib.sha256(data).hexdigest()
        for token in required:
            if self.control_id(token) is None:
                raise CodeflowError(f"{where} has no {token} token, which documents need")

    @classmethod
    def from_file(cls, path: AnyPath) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            CodeflowError: It cannot be read, is none, or lacks the end-of-text token.
        """
        try:
            data = path.read_bytes()
        except OSError as e:
            raise CodeflowError(f"cannot read tokenizer {path}: {e.strerror}") from e
        return cls(data, str(path))

    def control_id(self, token: str) -> int | None:
        """Id of a control token; None when this vocabulary lacks it."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def control_ids(self) -> dict[str, int]:
        """Those of `CONTROL_TOKENS` that this vocabulary has."""
        return {t: i for t in CONTROL_TOKENS if (i := self.control_id(t)) is not None}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; nothing in a text becomes a control token."""
        if self._lines is None:
            return self._encode(texts)
        result = []
        for text in texts:
            *lines, rest = _LINE_END.split(text)
            known = self._known(lines)
            (ids,) = self._encode([rest])
            result.append([*chain.from_iterable(map(known.__getitem__, lines)), *ids])
        return result

    def _known(self, lines: Iterable[str]) -> dict[str, array[int]]:
        """Ids by line, of at least these lines, each with its line end."""
        assert self._lines is not None
        if self._kept_bytes > _KEPT_BYTES:
            self._lines, self._kept_bytes = {}, 0
        new = [line for line in dict.fromkeys(lines) if line not in self._lines]
        for at in range(0, len(new), _LINES_AT_ONCE):
            batch = new[at : at + _LINES_AT_ONCE]
            encoded = self._encode([line + "\n" for line in batch])
            for line, ids in zip(batch, encoded, strict=True):
                kept = self._lines[line] = array("I", ids)
                self._kept_bytes += getsizeof(line) + getsizeof(kept) + _ENTRY_BYTES
        return self._lines

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown by name."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _encodes_lines_alone(content: dict[str, Any]) -> bool:
    """Are the ids of a text those of its lines, as cut by `_LINE_END`? Read from tokenizer.json."""
    model = content.get("model") or {}
    steps: list[dict[str, Any]] = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if len(steps) != 2:
        return False
    split, bytes_ = steps
    return (
        content.get("normalizer") in (None, {"type": "NFC"})
        and (split.get("type"), split.get("behavior")) == ("Split", "Isolated")
        and not split.get("invert")
        and split.get("pattern", {}).get("Regex") in _SPLITS
        and bytes_.get("type") == "ByteLevel"
        and not (bytes_.get("use_regex", True) or bytes_.get("add_prefix_space", True))
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and _keeps_ids(content.get("post_processor") or {})
    )


def _keeps_ids(processor: dict[str, Any]) -> bool:
    """Does it leave the ids of a text as they are, control tokens aside?"""
    match processor.get("type"):
        case "Sequence":
            return all(map(_keeps_ids, processor["processors"]))
        case "TemplateProcessing":
            return sum("Sequence" in piece for piece in processor["single"]) == 1
        case kind:
            return kind in (None, "ByteLevel")


def with_control_tokens(
    data: bytes, where: str, tokens: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
    """A tokenizer.json that has these control tokens, and the ids of those that were added.

    Raises:
        CodeflowError: It is no tokenizer.json, or has no room for another token.
    """
    before = Tokenizer(data, where, required=())
    missing = [t for t in tokens if before.control_id(t) is None]
    if not missing:
        return data, {}
    grown = _HFTokenizer.from_str(data.decode("utf-8"))
    taken = set(grown.get_vocab(with_added_tokens=True).values())
    grown.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])
    vocabulary = grown.get_vocab(with_added_tokens=True)
    added = {t: vocabulary[t] for t in missing}
    if taken & set(added.values()):  # the library counts tokens, whatever their ids
        raise CodeflowError(
            f"{where}: {', '.join(missing)} cannot be added, because its ids have gaps: add them "
            "to its `added_tokens` by hand"
        )
    return grown.to_str(pretty=True).encode(), added
