"""Documents in a token budget: context goes first, nothing is cut, counts add up to the token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.compose.document import Example, Fitted, Segment, fit
from codeflow.compose.run import loss_runs
from codeflow.compose.transition import transition
from codeflow.pack.shards import joined_runs
from codeflow.pack.vocabulary import train
from codeflow.recipe import ComposeSettings
from codeflow.tokenizer import COMMIT_AFTER, COMMIT_MESSAGE, END, FILE, REPO, Tokenizer

TOKENIZER_DATA = train(iter(["def f(x):\n    return x\n" * 20]), 512)
TOKENIZER = Tokenizer(TOKENIZER_DATA, "small")
OPENERS = {"repo": REPO, "context": FILE, "intent": COMMIT_MESSAGE, "patch": COMMIT_AFTER}
PATCH = (
    "diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n"
    "@@ -1,2 +1,2 @@\n x = 1\n-y = 2\n+y = 3\n@@ -9 +9 @@\n-z\n+Z\n"
)


def naive(segments: list[Segment]) -> list[int]:
    """Tokens of each segment, one at a time."""
    return [1 + len(TOKENIZER.encode([s.text])[0]) for s in segments]


SEGMENTS = st.lists(
    st.builds(
        Segment,
        st.sampled_from(["context", "context", "intent"]),
        st.text(st.characters(codec="utf-8"), max_size=30) | st.just(f"{END}{FILE}"),
        path=st.just("p"), optional=st.booleans(), priority=st.integers(0, 3),
    ),
    max_size=6,
).map(lambda found: [Segment("repo", "a/b\n"), *found, Segment("patch", PATCH)])  # fmt: skip


@given(SEGMENTS, st.integers(0, 60))
def test_fitted_documents(segments: list[Segment], extra: int) -> None:
    lengths = naive(segments)
    required = 1 + sum(n for s, n in zip(segments, lengths, strict=True) if not s.optional)
    assert fit(segments, TOKENIZER, required - 1) == required
    budget = required + extra
    fitted = fit(segments, TOKENIZER, budget)
    assert isinstance(fitted, Fitted)
    kept = [s for s, _ in fitted.segments]
    # Nothing is cut, moved or invented, and what is required is there.
    places = [next(i for i, s in enumerate(segments) if s is k) for k in kept]
    assert places == sorted(set(places))
    assert all(s.optional for i, s in enumerate(segments) if i not in places)
    assert fitted.dropped == len(segments) - len(kept)
    # Counts add up.
    assert [n for _, n in fitted.segments] == [lengths[i] for i in places]
    assert len(fitted.input_ids) == 1 + sum(n for _, n in fitted.segments) <= budget
    # What was left out does not fit beside what is at least as important.
    for i, segment in enumerate(segments):
        if i not in places:
            before = [j for j in places if segments[j].optional
                      and (-segments[j].priority, j) < (-segment.priority, i)]  # fmt: skip
            assert required + sum(lengths[j] for j in before) + lengths[i] > budget
    # The text can be read back, control tokens by name and only where they belong.
    assert TOKENIZER.decode(fitted.input_ids) == (
        "".join(OPENERS[s.role] + s.text for s in kept) + END
    )
    control = set(TOKENIZER.control_ids().values())
    assert sum(i in control for i in fitted.input_ids) == len(kept) + 1


def test_budget_is_exact_at_the_boundary() -> None:
    segments = [
        Segment("context", "x = 1\n", optional=True, priority=1),
        Segment("context", "y = 2222\n", optional=True, priority=5),
        Segment("patch", PATCH),
    ]
    x, y, patch = naive(segments)
    required = patch + 1
    kept: dict[int, Callable[[Any], bool] | list[int]] = {
        required: [2],
        required + min(x, y) - 1: [2],
        required + y: [1, 2],
        required + x + y - 1: [1, 2],
        required + x + y: [0, 1, 2],
    }
    for budget, places in kept.items():
        fitted = fit(segments, TOKENIZER, budget)
        assert isinstance(fitted, Fitted)
        assert [segments.index(s) for s, _ in fitted.segments] == places


def test_context_that_cannot_fit_is_left_out_unread() -> None:
    huge = Segment("context", "x" * 100_000, optional=True, priority=9)
    fitted = fit([huge, Segment("patch", PATCH)], TOKENIZER, 200)
    assert isinstance(fitted, Fitted)
    assert ([s.role for s, _ in fitted.segments], fitted.dropped) == (["patch"], 1)


def test_a_vocabulary_without_commit_tokens_opens_with_the_file_token() -> None:
    data = TOKENIZER_DATA.replace(COMMIT_AFTER.encode(), b"<|unknown|>")
    tokenizer = Tokenizer(data, "old")
    fitted = fit([Segment("patch", "x")], tokenizer, 100)
    assert isinstance(fitted, Fitted)
    assert fitted.input_ids[0] == tokenizer.control_id(FILE)
    bare = Tokenizer(data.replace(FILE.encode(), b"<|unknown2|>"), "bare")
    fitted = fit([Segment("patch", "x")], bare, 100)
    assert isinstance(fitted, Fitted)
    assert bare.decode(fitted.input_ids) == f"x{END}"


# -- the transition document ----------------------------------------------------------------------


def example(**fields: Any) -> Example:
    changes = [
        {"path": b"new.py", "old_path": b"old.py", "lines_added": 1, "lines_deleted": 1},
        {"path": b"b.py", "old_path": None, "lines_added": 5, "lines_deleted": 0},
        {"path": b"added.py", "old_path": None, "lines_added": 9, "lines_deleted": 0},
    ]
    old = {b"old.py": "x", b"b.py": "y\n"}
    values = {
        "triple": {"patch": PATCH.encode()}, "changes": changes, "repo_name": "a/b",
        "messages": ["Fix it\n", "  \n", "Again", "Third"], "old_text": old,
    }  # fmt: skip
    return Example(**(values | fields))


def test_transition_shows_old_files_then_intent_then_the_patch() -> None:
    segments = transition(example(), ComposeSettings(max_messages=2))
    assert [(s.role, s.path, s.text) for s in segments] == [
        ("repo", "", "a/b\n"),
        ("context", "old.py", "old.py\nx\n"),
        ("context", "b.py", "b.py\ny\n"),
        ("intent", "", "\nFix it\n\nAgain\n"),
        ("patch", "", "\n" + PATCH),
    ]
    assert [s.role for s in segments if s.optional] == ["context", "context"]
    assert [s.priority for s in segments if s.optional] == [2, 5]


def test_transition_without_context_or_messages() -> None:
    segments = transition(example(messages=[" \n"]), ComposeSettings(context="none"))
    assert [s.role for s in segments] == ["repo", "patch"]


def test_a_patch_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        transition(example(triple={"patch": b"\xff"}), ComposeSettings())


# -- loss runs ------------------------------------------------------------------------------------


def mask(runs: list[int]) -> list[bool]:
    return [i % 2 == 1 for i, length in enumerate(runs) for _ in range(length)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["repo", "context", "patch"]), st.integers(0, 5)), max_size=6
    ),
    st.booleans(),
)
def test_loss_runs_say_which_tokens_are_targets(
    parts: list[tuple[str, int]], train_context: bool
) -> None:
    fitted = Fitted([(Segment(role, ""), n) for role, n in parts])
    runs = loss_runs(fitted, ComposeSettings(train_context=train_context))
    naive = [role == "patch" or train_context for role, n in parts for _ in range(n)]
    assert mask(runs) == [*naive, True]


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5))
def test_runs_of_a_row_are_those_of_its_documents(parts: list[list[int]]) -> None:
    joined = joined_runs(parts)
    assert mask(joined) == [bit for runs in parts for bit in mask(runs)]
    assert all(joined[1:])  # only the first run may be empty
    assert list(accumulate(joined))[-1] == sum(map(sum, parts))
