"""What commit messages say once their formalities are taken away.

`fix(router): keep query (#123)` carries the intent of three words; published message filters drop
it for its prefix or its number. So prefixes, numbers, trailers and merge lines are removed first
and words are counted after. Counting words is crude but does not favour one project's habits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# git, GitHub, GitLab, Bitbucket and bors each have their own merge line.
_MERGE = re.compile(
    r"(?i)(?:auto )?merge(?:d|s)?\s+(?:"
    r"(?:branch|branches|tag|tags|commit|remote-tracking branch|remote branch)\b"
    r"|(?:pull|merge) requests?\b|PR\s*#?\d+|#\d+|of #\d+|in\s+\S+\s+\(pull request|https?://"
    r"|\S+\s+into\s+(?:dev|develop|main|master|stable|trunk|release\S*)\s*$)"
)
_CONFLICT_LIST = re.compile(r"(?im)^#?[ \t]*conflicts:[ \t]*\n(?:#?[ \t]+\S.*\n?)+")
_TRAILER = re.compile(
    r"(?im)^[ \t]*(?:(?:signed-off|co-authored|reviewed|acked|tested|reported|suggested|approved"
    r"|helped|merged|committed|co-developed|pair-programmed)-by|change-id|reviewed-on|git-svn-id"
    r"|differential revision|cc|refs?)[ \t]*:.*$|^see merge request \S+$"
    r"|\(?cherry[ -]picked from commit [0-9a-f]+\)?"
)
_SCOPE = re.compile(r"^\s*(?:\[[^\]\n]*\]\s*)*(?::\w+:\s*)?(?:[\w./*,-]+(?:\([^)\n]*\))?!?:\s+)?")
_NOISE = re.compile(
    r"(?i)\b(?:fix(?:e[sd])?|close[sd]?|resolve[sd]?)"
    r"(?::?[ \t]+(?:#|gh-|[\w.-]{1,99}/[\w.-]{1,99}#)\d+,?)+"
    r"|\(?(?:#|gh-)\d+\)?|https?://\S+|\[(?:skip ci|ci skip)\]|\b(?=[a-f]*\d)[0-9a-f]{7,40}\b"
)
# Scripts without spaces: every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\d_]{2,}(?:['’-][^\W\d_]+)*")
#: Messages that name no change; after CommitPack's list (Muennighoff et al., 2023).
_EMPTY = frozenset(
    (
        *("changes", "cleanup", "commit", "debug", "dummy", "fix", "fixes", "misc", "readme"),
        *("save", "temp", "test", "tests", "tmp", "typo", "update", "updated", "updates", "wip"),
        *("add files via upload", "first commit", "heartbeat update", "initial commit"),
        *("minor changes", "more work", "no message", "update readme", "update readme md"),
        *("updated readme", "updated readme md", "work in progress"),
    )
)


@dataclass(frozen=True)
class MessageScores:
    """Columns of `scores` about the messages of a triple's commits."""

    merge_only_messages: int
    informative_messages: int
    message_words: int


def normalise(message: str) -> str:
    """A message without merge line, scope prefix, references, trailers and conflict lists.

    A merged pull request keeps its body, where the title stands.
    """
    text = message.replace("\r\n", "\n").strip()
    if is_merge(text):
        text = text.partition("\n")[2]
    text = _TRAILER.sub("", _CONFLICT_LIST.sub("", text))
    text = _NOISE.sub(" ", text)
    return _SCOPE.sub("", text, count=1).strip()


def is_merge(message: str) -> bool:
    """Is the subject one of the lines that tools write for a merge?"""
    return _MERGE.match(message.strip().partition("\n")[0]) is not None


def words(message: str) -> list[str]:
    """The words of a normalised message, lower case; a character each in Chinese or Japanese."""
    return [w.lower() for w in _WORD.findall(normalise(message))]


def message_scores(messages: Iterable[str]) -> MessageScores:
    """Count over all commits of a triple.

    A message is merge-only when nothing is left of a merge line, informative when words are left
    that are more than a filler (`wip`, `update readme`).
    """
    merge_only = informative = total = 0
    for message in messages:
        found = words(message)
        if not found:
            merge_only += is_merge(message)
        elif " ".join(found) not in _EMPTY:
            informative += 1
            total += len(found)
    return MessageScores(merge_only, informative, total)
