"""Every error codeflow raises on purpose, in one tree.

    CodeflowError              exit code 1: the run failed
    ├── UsageError             exit code 2: what the user typed cannot be run
    │   ├── RecipeError        a recipe or `--set` names or values something that does not exist
    │   └── SourceListError    a list of repositories has a bad line
    ├── DatasetError           a dataset folder cannot be read or written, or is another recipe's
    ├── RepositoryError        one repository cannot be mined; the run goes on with the others
    ├── ShardError             a shard or its manifest is missing, damaged or of another version
    └── VerificationError      stored data does not prove what it claims

A message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CodeflowError(Exception):
    """Base of all errors that are shown to a person as one message, without a traceback."""

    exit_code = 1


class UsageError(CodeflowError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class SourceListError(UsageError):
    pass


class DatasetError(CodeflowError):
    pass


class RepositoryError(CodeflowError):
    """One repository cannot be mined.

    Attributes:
        status: short machine-readable class of the problem (`empty`, `shallow`, `clone_failed`, …).
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return self.message


class ShardError(CodeflowError):
    pass


class VerificationError(CodeflowError):
    pass


def printable(text: str) -> str:
    """`text` without control characters: no escape sequence of a repository reaches a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The sentence that names the nearest valid choice, or lists them when none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if near:
        return f"Did you mean `{near[0]}`?"
    return "Valid: " + ", ".join(f"`{c}`" for c in choices) + "." if choices else ""
