from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.filter.messages import is_merge, message_scores, normalise, words


@pytest.mark.parametrize(
    ("message", "subject"),
    [
        ("fix(runtime-core): keep slots stable (#1234)", "keep slots stable"),
        ("feat(compiler)!: drop filters", "drop filters"),
        ("net: fix UDP split on Windows (#1573)", "fix UDP split on Windows"),
        ("printer: improve columns", "improve columns"),
        ("[BUGFIX] Repair the cache", "Repair the cache"),
        (":sparkles: Add tabs", "Add tabs"),
        ("Fix overflow\n\nSigned-off-by: A <a@b>\nChange-Id: Ifeed", "Fix overflow"),
        ("Fix overflow\n\nCo-authored-by: A <a@b>\nReviewed-by: B", "Fix overflow"),
        ("Fix overflow, closes #12, #13", "Fix overflow,"),
        ("Fix overflow\n\nFixes: gh-12", "Fix overflow"),
        ("Fix overflow [skip ci]", "Fix overflow"),
        ("Fix overflow\n\n(cherry picked from commit 0123456789abcdef)", "Fix overflow"),
        ("Merge pull request #5 from a/b\n\nAdd a parser", "Add a parser"),
        ("Auto merge of #9 - u:b, r=v\n\nAdd a parser", "Add a parser"),
        ("Merge release/1.2 into main\n\nAdd a parser", "Add a parser"),
        ("Merge branch 'a' into 'b'\n\nAdd a parser\n\nSee merge request g/p!7", "Add a parser"),
        ("Merge branch 'x'\n\nConflicts:\n\ta/b.py\n\tc.py", ""),
        ("Merge branch 'x'\n\n# Conflicts:\n#\ta/b.py\n", ""),
        ("Fix overflow\r\n\r\nSigned-off-by: A <a@b>\r\n", "Fix overflow"),
    ],
)
def test_formalities_are_removed(message: str, subject: str) -> None:
    assert normalise(message) == subject


@pytest.mark.parametrize(
    "message",
    [
        "Merge branch 'main' into topic",
        "Merge branch 'v1.x' of https://example.org/r",
        "Merge pull request #12 from user/branch",
        "Merge remote-tracking branch 'origin/main'",
        "Merge tag 'v1.2'",
        "Merged in feature/x (pull request #3)",
        "Merge release/1.2 into main",
        "Merge #123",
        "Merge PR #12",
        "  merge branches 'a' and 'b'",
    ],
)
def test_merge_lines(message: str) -> None:
    assert is_merge(message)
    scores = message_scores([message])
    assert (scores.merge_only_messages, scores.informative_messages) == (1, 0)
    assert scores.message_words == 0


@pytest.mark.parametrize(
    "message",
    [
        "Merge duplicate helpers into utils",
        "Merge the two caches",
        'Merge "Add a parser for lists"',
        "Mergesort for linked lists",
        "Fix bug after Merge branch 'x'",
    ],
)
def test_work_that_merges_code_is_not_a_merge(message: str) -> None:
    assert not is_merge(message)
    assert message_scores([message]).informative_messages == 1


def test_a_merged_pull_request_is_informative_by_its_title() -> None:
    scores = message_scores(["Merge pull request #5 from a/b\n\nAdd a list parser"])
    assert (scores.merge_only_messages, scores.informative_messages) == (0, 1)
    assert scores.message_words == 3


@pytest.mark.parametrize(
    "message",
    ["wip", "Update README.md", "update", "Initial commit", "v1.2.3", "", "#12", "fix: #9"],
)
def test_fillers_are_neither_informative_nor_merges(message: str) -> None:
    scores = message_scores([message])
    assert (scores.merge_only_messages, scores.informative_messages) == (0, 0)
    assert scores.message_words == 0


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ("fix(core): don't re-render (#1)", 2),
        ("Fix deadbeef1 regression", 2),
        ("Revert to 0123456789abcdef0123456789abcdef01234567", 2),
        ("See https://example.org/a/b/c", 1),
        ("Исправить ошибку входа", 3),
        ("修复登录错误", 6),
        ("effaced facade", 2),
    ],
)
def test_words(message: str, count: int) -> None:
    assert len(words(message)) == count


@pytest.mark.parametrize(
    "unit",
    [
        "fix a/",
        "/",
        " ",
        "fix ",
        "fix: #1, ",
        "[",
        "a",
        "conflicts:\n\ta\n",
        "Merge x into ",
        "\n# ",
    ],
)
def test_hostile_messages_are_read_in_linear_time(unit: str) -> None:
    start = time.process_time()
    message_scores([unit * (100_000 // len(unit)), "fix " + unit * (100_000 // len(unit))])
    assert time.process_time() - start < 2


@given(
    subject=st.lists(st.sampled_from(["keep", "slots", "stable", "cache"]), min_size=3, max_size=6),
    kind=st.sampled_from(["fix", "feat", "refactor", "net", "rt"]),
    scope=st.sampled_from(["", "(core)", "(a-b/c)", "(x, y)!", "!"]),
    number=st.integers(1, 99999),
)
def test_a_prefix_and_a_number_never_change_the_words(
    subject: list[str], kind: str, scope: str, number: int
) -> None:
    plain = " ".join(subject)
    assert words(f"{kind}{scope}: {plain} (#{number})") == words(plain) == subject


@given(st.lists(st.text(max_size=60), max_size=8))
def test_counts_are_bounded_by_the_messages(messages: list[str]) -> None:
    scores = message_scores(messages)
    assert scores.merge_only_messages + scores.informative_messages <= len(messages)
    assert scores.message_words >= scores.informative_messages
