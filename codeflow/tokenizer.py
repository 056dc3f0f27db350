"""Text to token ids, with control tokens that no source text can forge.

Wraps a `tokenizer.json` of the `tokenizers` library. Control tokens are inserted by id when a
document is put together; the same characters inside a source file are ordinary text. (By default
every BPE library turns a literal `<|endoftext|>` in a file into the real control token.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

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


class Tokenizer:
    """A vocabulary, byte-level BPE as a rule.

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
        except Exception as e:  # the library raises bare Exception for any malformed file
            raise CodeflowError(f"{where} is not a tokenizer.json: {e}") from e
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
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown by name."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


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
