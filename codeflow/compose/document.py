"""What a document is made of, and how one is fitted into a token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from codeflow.tokenizer import COMMIT_AFTER, COMMIT_MESSAGE, END, FILE, REPO, Tokenizer

#: The control token that opens each segment; a vocabulary without it opens with `FILE`, or nothing.
_OPENERS = {"repo": REPO, "context": FILE, "intent": COMMIT_MESSAGE, "patch": COMMIT_AFTER}


@dataclass(frozen=True)
class Segment:
    """A piece of a document.

    Attributes:
        role: `repo`, `context`, `intent` or `patch`.
        path: File it shows, empty when none.
        text: What is read there.
        optional: May be left out to fit the budget.
        priority: Among optional segments, higher ones stay longest.
    """

    role: str
    text: str
    path: str = ""
    optional: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Example:
    """Everything a document kind may look at: one triple with its surroundings, as plain values.

    Attributes:
        triple: A row of `triples`.
        changes: Its rows of `changes`.
        messages: Messages of its commits, oldest first.
        repo_name: `owner/name` where there is an owner.
        old_text: Contents of R_old's changed text files, by path.
    """

    triple: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    messages: Sequence[str]
    repo_name: str
    old_text: Mapping[bytes, str]


@dataclass
class Fitted:
    """A document that fits: kept segments with their token counts, ids and loss runs."""

    segments: list[tuple[Segment, int]] = field(default_factory=list)
    input_ids: list[int] = field(default_factory=list)
    dropped: int = 0


def fit(segments: Sequence[Segment], tokenizer: Tokenizer, budget: int) -> Fitted | int:
    """Encode segments; take optional ones, highest priority first, each if it still fits.

    Every text is encoded once, on its own: a token never spans two segments, so counts add up and
    the ids are final. Nothing is ever cut.

    Args:
        segments: In reading order.
        budget: Most tokens, control tokens and the end token included.

    Returns:
        The fitted document, or the tokens its required segments need when that is over the budget.
    """
    required = [i for i, s in enumerate(segments) if not s.optional]
    ids: dict[int, list[int]] = {}
    for i, body in zip(
        required, tokenizer.encode([segments[i].text for i in required]), strict=True
    ):
        ids[i] = [*_opener(segments[i], tokenizer), *body]
    needed = 1 + sum(map(len, ids.values()))
    if needed > budget:
        return needed
    left = budget - needed
    optional = [i for i, s in enumerate(segments) if s.optional]
    for i in sorted(optional, key=lambda i: (-segments[i].priority, i)):
        # Encoding is the dearest thing here. Code has 3-4 characters a token; what would need
        # more than 8 to fit the room that is left is not tried.
        if len(segments[i].text) > 8 * left:
            continue
        (body,) = tokenizer.encode([segments[i].text])
        encoded = [*_opener(segments[i], tokenizer), *body]
        if len(encoded) <= left:
            ids[i] = encoded
            left -= len(encoded)
    result = Fitted(dropped=len(segments) - len(ids))
    for i in sorted(ids):
        result.segments.append((segments[i], len(ids[i])))
        result.input_ids += ids[i]
    end = tokenizer.control_id(END)
    assert end is not None
    result.input_ids.append(end)
    return result


def _opener(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    for token in (_OPENERS[segment.role], FILE):
        found = tokenizer.control_id(token)
        if found is not None:
            return [found]
    return []
