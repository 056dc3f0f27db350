"""Conversations (JSON lines of chat messages) to shards, for supervised fine-tuning.

A line is `{"messages": [{"role": …, "content": …}, …]}`, with the roles system, user, assistant and
tool, or `{"prompt": …, "completion": …}`: a user's turn and an assistant's. A conversation becomes
one document, its turns laid one after another (the layout known as ChatML):

    <|im_start|>user
    What is a packed row?<|im_end|>
    <|im_start|>assistant
    Whole documents, one after another.<|im_end|>

The two marks are control tokens, inserted by id; whatever a message says is ordinary text. Training
targets are the content of an assistant's turn and the `<|im_end|>` that closes it; not the line
that opens the turn, which whoever asks a model writes, nor the line end that follows. Opening,
content and line end are encoded one by one, so that no token spans two of them.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import secrets
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codeflow.errors import CodeflowError, DatasetError, UsageError, did_you_mean
from codeflow.pack.shards import Documents, Lists, write_shards
from codeflow.recipe import PackSettings, digest
from codeflow.tables import DOC
from codeflow.tokenizer import TURN_END, TURN_START, Tokenizer, with_control_tokens
from codeflow.work import Work

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = ("role", "content", "train")
_FORMAT_VERSION = 1  # of the layout of turns; part of the shards' identity
_BATCH_CHARACTERS = 1 << 20  # encoded at a time: work for all cores, little memory


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
        train: Whether the content and the end of the turn are training targets.
    """

    role: str
    content: str
    train: bool


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: Token ids of all turns.
        loss_runs: Run lengths: not trained, trained, not trained, …; they add up to the length.
        segments: Role and tokens of each turn.
    """

    ids: list[int]
    loss_runs: list[int]
    segments: list[tuple[str, int]]


@dataclass(frozen=True)
class Rejected:
    """A conversation that is not packed.

    Attributes:
        where: `file:line`.
        reason: `not_json`, `malformed`, `nothing_trained`, `control_token` or `too_long`.
        detail: What is wrong.
    """

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Packed:
    """What came of it.

    Attributes:
        conversations: Those that were packed.
        rejected: The others, in reading order.
        reasons: How many were rejected, by reason.
        tokens: In all rows.
        trained_tokens: Those that are training targets.
        rows: Packed rows.
        fill: Share of the rows' room that holds tokens.
        vocab_size: Of the tokenizer beside the shards.
        added_tokens: Control tokens that the given tokenizer lacked, with the ids they got.
    """

    conversations: int
    rejected: tuple[Rejected, ...]
    reasons: dict[str, int]
    tokens: int
    trained_tokens: int
    rows: int
    fill: float
    vocab_size: int
    added_tokens: dict[str, int]


class ConversationError(CodeflowError):
    """A line holds no conversation that can be trained on; the others are packed all the same."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


def pack_messages(
    files: Sequence[Path],
    tokenizer: Path,
    out: Path,
    settings: PackSettings,
    *,
    last_only: bool = False,
) -> Packed:
    """Pack conversations into `out/shards/`; `out` appears whole or not at all.

    The same files, tokenizer and settings give the same bytes. Nothing is cut: a conversation
    longer than a row is rejected.

    Args:
        files: JSON lines; decompressed where the name ends in `.gz`.
        tokenizer: A tokenizer.json, or the folder of a dataset or of shards that holds one.
        out: A folder that does not exist or is empty.
        settings: Sizes of rows, row groups and files.
        last_only: Train on the last of the trained turns of each conversation alone.

    Raises:
        UsageError: A file cannot be read.
        DatasetError: `out` holds something already, or cannot be written.
        CodeflowError: The tokenizer cannot be used, or no conversation can be packed.
    """
    data, vocabulary, added = _read_tokenizer(tokenizer)
    with _appearing(out) as folder:
        collected = _Collected(ChatFormat(vocabulary), settings.length)
        names = _short_names(files)
        contents = []
        for file, name in zip(files, names, strict=True):
            content = hashlib.sha256()
            collected.take(name, _conversations(file, content, last_only))
            contents.append([name, content.hexdigest()])
        rejected = collected.rejected
        if not collected.doc_ids:
            first = f"; the first: {rejected[0]}" if rejected else ""
            raise CodeflowError(f"none of {len(rejected)} conversations can be packed{first}")
        fingerprint = digest(
            {
                "format": _FORMAT_VERSION,
                "files": contents,
                "tokenizer": vocabulary.sha256,
                "pack": asdict(settings),
                "last_only": last_only,
            }
        )
        reasons = dict(sorted(Counter(r.reason for r in rejected).items()))
        about = {
            "recipe": "messages",
            "recipe_hash": fingerprint,
            "added_tokens": added,
            "trained_tokens": collected.trained_tokens,
            "rejected": reasons,
        }
        work = Work(folder, "all", fingerprint, {})
        counts = write_shards(work, collected.documents(), settings, data, vocabulary, about)
    return Packed(
        conversations=counts["documents_packed"],
        rejected=tuple(rejected),
        reasons=reasons,
        tokens=counts["tokens"],
        trained_tokens=collected.trained_tokens,
        rows=counts["rows"],
        fill=counts["tokens"] / counts["capacity"],
        vocab_size=vocabulary.vocab_size,
        added_tokens=added,
    )


def describe(packed: Packed) -> str:
    """The result for a person."""
    total = packed.conversations + len(packed.rejected)
    told = ", ".join(f"{reason} {n:,}" for reason, n in packed.reasons.items())
    lines = [f"  conversations {packed.conversations:,} packed of {total:,}"]
    if told:
        lines.append(f"                {len(packed.rejected):,} rejected: {told}")
    share = 100 * packed.trained_tokens / packed.tokens
    lines += [
        f"  tokens        {packed.tokens:,}, of them {packed.trained_tokens:,} trained "
        f"({share:.1f} %)",
        f"  rows          {packed.rows:,}, {100 * packed.fill:.2f} % filled",
        f"  vocabulary    {packed.vocab_size:,}",
    ]
    if packed.added_tokens:
        new = ", ".join(f"{token} {id_}" for token, id_ in packed.added_tokens.items())
        lines.append(f"                grown by {new}: the model's embeddings must grow, too")
    return "\n".join(lines)


# -- lines to turns -------------------------------------------------------------------------------


def parse_conversation(line: bytes, *, last_only: bool = False) -> list[Turn]:
    """The turns of one line, of which at least one is trained.

    Raises:
        ConversationError: With the reason `not_json`, `malformed` or `nothing_trained`.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConversationError("not_json", f"{e}") from e
    turns = [_turn(message, n) for n, message in enumerate(_messages(value), start=1)]
    trained = [i for i, turn in enumerate(turns) if turn.train]
    if not trained:
        raise ConversationError("nothing_trained", "no message of the assistant is a target")
    if last_only:
        turns = [replace(turn, train=i == trained[-1]) for i, turn in enumerate(turns)]
    return turns


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, dict):
        raise ConversationError("malformed", "not an object with `messages`")
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise ConversationError("malformed", "`messages` is not a list of messages")
        return messages
    if "prompt" in value and "completion" in value:
        return [
            {"role": "user", "content": value["prompt"]},
            {"role": "assistant", "content": value["completion"]},
        ]
    raise ConversationError("malformed", "neither `messages` nor `prompt` and `completion`")


def _turn(message: Any, number: int) -> Turn:
    def malformed(problem: str) -> ConversationError:
        return ConversationError("malformed", f"message {number}: {problem}")

    if not isinstance(message, dict):
        raise malformed("not an object")
    for field in message:
        # What a message says must reach the model, or be refused: a call of a tool, for example.
        if field not in _FIELDS and message[field] is not None:
            raise malformed(f"unknown field {_shown(field, _FIELDS)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise malformed(f"role {_shown(role, ROLES)}")
    if not isinstance(content, str):
        raise malformed("`content` is not text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise malformed("`content` holds half of a surrogate pair") from None
    train = message.get("train", role == "assistant")
    if not isinstance(train, bool) or (train and role != "assistant"):
        raise malformed("`train` must be true or false, and true for the assistant alone")
    return Turn(role, content, train)


def _shown(word: Any, valid: Sequence[str]) -> str:
    """A wrong word, cut where it is long, and the nearest valid one."""
    short = str(word)[:40]
    return f"{short!r}. {did_you_mean(short, valid)}"


@dataclass(frozen=True)
class _Line:
    """A line of a file: its conversation, or no turns and the reason why."""

    number: int
    where: str
    turns: Sequence[Turn]
    rejected: Rejected | None = None


def _conversations(file: Path, content: Any, last_only: bool) -> Iterator[_Line]:
    """The lines of a file that are not blank; `content`, a running hash, is told of all.

    Raises:
        UsageError: The file cannot be read, or its compression is damaged.
    """
    compressed = file.name.endswith(".gz")
    try:
        with gzip.open(file) if compressed else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                content.update(line)
                text = line.removeprefix(codecs.BOM_UTF8).strip()
                if not text:
                    continue
                where = f"{file}:{number}"
                try:
                    yield _Line(number, where, parse_conversation(text, last_only=last_only))
                except ConversationError as e:
                    yield _Line(number, where, (), Rejected(where, e.reason, e.detail))
    except (OSError, EOFError, zlib.error) as e:
        raise UsageError(f"cannot read {file}: {getattr(e, 'strerror', None) or e}") from e


# -- turns to tokens ------------------------------------------------------------------------------


class ChatFormat:
    """How the turns of a conversation become tokens.

    Args:
        tokenizer: With the two control tokens of turns.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = tokenizer.control_ids()
        self._tokenizer = tokenizer
        self._control = frozenset(control.values())
        *headers, self._line_end = tokenizer.encode([*(f"{role}\n" for role in ROLES), "\n"])
        self._opening = {r: [control[TURN_START], *h] for r, h in zip(ROLES, headers, strict=True)}
        self._turn_end = control[TURN_END]

    def bodies(self, turns: Iterable[Turn]) -> Iterator[list[int]]:
        """Token ids of the turns' contents, encoded on all cores."""
        return iter(self._tokenizer.encode([turn.content for turn in turns]))

    def join(self, turns: Sequence[Turn], bodies: Iterable[list[int]]) -> Encoded:
        """One conversation from its turns and the ids of their contents.

        Raises:
            ConversationError: With the reason `control_token`. No tokenizer that codeflow trains
                does that; a vocabulary can hold a control token's text as an ordinary word.
        """
        ids: list[int] = []
        runs = [0]
        segments = []
        for number, (turn, body) in enumerate(zip(turns, bodies, strict=True), start=1):
            if not self._control.isdisjoint(body):
                raise ConversationError(
                    "control_token",
                    f"message {number}: this tokenizer makes a control token of its text",
                )
            before, opening = len(ids), self._opening[turn.role]
            ids += [*opening, *body, self._turn_end, *self._line_end]
            if turn.train:
                runs[-1] += len(opening)
                runs += [len(body) + 1, len(self._line_end)]
            else:
                runs[-1] += len(ids) - before
            segments.append((turn.role, len(ids) - before))
        return Encoded(ids, runs, segments)


class _Collected:
    """Conversations encoded so far, as flat arrays; and those that are not packed."""

    def __init__(self, chat: ChatFormat, length: int) -> None:
        self._chat = chat
        self._length = length
        self._ids, self._runs = _Growing("I"), _Growing("i")
        self._roles, self._role_tokens = _Growing("B"), _Growing("i")
        self._files: list[str] = []
        self.doc_ids: list[str] = []
        self.rejected: list[Rejected] = []
        self.trained_tokens = 0

    def take(self, name: str, lines: Iterable[_Line]) -> None:
        """Encode and keep the conversations of a file."""
        for batch in _batches(lines):
            bodies = self._chat.bodies(turn for line in batch for turn in line.turns)
            for line in batch:
                if line.rejected is not None:
                    self.rejected.append(line.rejected)
                    continue
                own = [next(bodies) for _ in line.turns]
                try:
                    self._keep(self._chat.join(line.turns, own), name, line.number)
                except ConversationError as e:
                    self.rejected.append(Rejected(line.where, e.reason, e.detail))

    def _keep(self, encoded: Encoded, name: str, number: int) -> None:
        if len(encoded.ids) > self._length:
            problem = f"{len(encoded.ids):,} tokens, rows hold {self._length:,}"
            raise ConversationError("too_long", problem)
        self._ids.append(encoded.ids)
        self._runs.append(encoded.loss_runs)
        self._roles.append([ROLES.index(role) for role, _ in encoded.segments])
        self._role_tokens.append([tokens for _, tokens in encoded.segments])
        self._files.append(name)
        self.doc_ids.append(f"{name}:{number}")
        self.trained_tokens += sum(encoded.loss_runs[1::2])

    def documents(self) -> Documents:
        """All of them, for packing; a document is named after the line it comes from."""
        count = len(self.doc_ids)
        known = {
            "doc_id": pa.array(self.doc_ids),
            "repo": pa.array(self._files),
            "kind": pa.repeat("messages", count),
        }
        empty = pa.repeat("", count)
        origin = {f.name: known.get(f.name, empty) for f in DOC if f.name != "segments"}
        return Documents(
            ids=self._ids.lists(),
            loss_runs=self._runs.lists(),
            roles=self._roles.lists(),
            role_tokens=self._role_tokens.lists(),
            role_names=ROLES,
            origin=pa.table(origin),
            reading_order=np.arange(count),
        )


class _Growing:
    """Lists of numbers that come one by one, kept in the width of their type."""

    def __init__(self, typecode: str) -> None:
        self._values = array(typecode)
        self._offsets = array("q", [0])

    def append(self, values: Iterable[int]) -> None:
        self._values.extend(values)
        self._offsets.append(len(self._values))

    def lists(self) -> Lists:
        return Lists(np.asarray(self._values), np.asarray(self._offsets))


def _batches(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    """Lines in portions of about `_BATCH_CHARACTERS`."""
    batch: list[_Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += 1 + sum(len(turn.content) for turn in line.turns)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


# -- files and folders ----------------------------------------------------------------------------


def _read_tokenizer(path: Path) -> tuple[bytes, Tokenizer, dict[str, int]]:
    """A tokenizer.json with the control tokens of turns, and those that had to be added."""
    inside = [path / "shards/tokenizer.json", path / "tokenizer.json"]
    file = next((p for p in inside if p.is_file()), path)
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UsageError(
            f"cannot read tokenizer {file}: {e.strerror} (give a tokenizer.json, or a folder of "
            "shards that holds one)"
        ) from e
    turns = (TURN_START, TURN_END)
    data, added = with_control_tokens(data, str(file), turns)
    return data, Tokenizer(data, str(file), required=turns), added


def _short_names(files: Sequence[Path]) -> list[str]:
    """Paths below the folder that the files share: the same wherever that folder lies."""
    paths = [Path(os.path.abspath(file)) for file in files]  # links keep their names
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Give a folder to fill, beside `out`; it becomes `out` when the block succeeds.

    Nothing is left behind when it fails. A kill can leave the folder, whose name says so.

    Raises:
        DatasetError: `out` is not an empty or new folder, or cannot be written.
    """
    target = out.resolve()
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(6)}")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DatasetError(f"{out} exists already: name an empty or new folder with --out")
        temporary.mkdir(parents=True)
    except OSError as e:
        raise DatasetError(f"cannot write to {out}: {e.strerror}") from e
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary)
        raise
