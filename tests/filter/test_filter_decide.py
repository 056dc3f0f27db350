from __future__ import annotations

import base64
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filter_inputs import Commit, Step, build, decided
from hypothesis import given
from hypothesis import strategies as st

from codeflow.errors import DatasetError
from codeflow.filter import decide
from codeflow.filter.decide import RULES, objection
from codeflow.recipe import FilterSettings, Recipe, override_recipe
from codeflow.tables import SCORES

PY = b"def f(a):\n    if a:\n        return a\n    return None\n"
MORE = PY + b"\n\ndef g(b):\n    return [f(x) for x in b]\n"
CLEAN = Step({"a.py": PY}, {"a.py": MORE, "CHANGES.rst": b"Lists can be nested.\n"})


def changed(**changes: Any) -> Step:
    return dataclasses.replace(CLEAN, **changes)


def appended(text: bytes) -> Step:
    return changed(new={"a.py": MORE + text})


KEY = b'KEY = """\n' + base64.encodebytes(random.Random(0).randbytes(1200)) + b'"""\n'
DROPPED = {
    "incomplete_patch": changed(triple={"patch_complete": False}),
    "not_utf8": appended("# naïve\n".encode("latin-1")),
    "no_code": changed(old={}, new={"README.md": b"# How to use the parser\n"}),
    "too_many_files": changed(old={}, new={f"m{i}.py": PY for i in range(16)}),
    "machine_made": changed(new={"a.py": MORE, "vendor/x.py": PY * 9}),
    "bot": changed(commits=(Commit(is_bot=True), Commit("Merge #1", is_merge=True))),
    "revert": changed(commits=(Commit(is_revert=True), Commit(is_revert=True))),
    "no_intent": changed(commits=(Commit("wip"), Commit("Merge branch 'x'", is_merge=True))),
    "whitespace_only": changed(new={"a.py": PY.replace(b"\n", b"\n\n")}),
    "long_lines": appended(b"x = '" + b"word " * 300 + b"'\n"),
    "low_alnum": appended((b"# " + b"-+-+-" * 12 + b"\n") * 20),
    "encoded_data": appended(KEY),
    "conflict_markers": appended(b"<<<<<<< HEAD\n"),
    "syntax_errors": appended(b"def h(:\n    retrun (\n"),
}  # fmt: skip


def verdicts(root: Path, *steps: Step, **options: Any) -> Iterator[tuple[bool, str, str, str]]:
    for row in decided(root, *steps, **options)[0]:
        yield row["keep"], row["stage"], row["reason"], row["detail"]


def test_a_clean_triple_is_kept_by_default(tmp_path: Path) -> None:
    assert list(verdicts(tmp_path, CLEAN)) == [(True, "", "", "")]


@pytest.mark.parametrize("reason", list(DROPPED))
def test_every_reason_is_reached(tmp_path: Path, reason: str) -> None:
    ((keep, stage, found, detail),) = verdicts(tmp_path, DROPPED[reason])
    assert (keep, stage, found) == (False, "filter", reason)
    assert detail


def test_all_rules_are_covered_by_a_fixture_and_by_a_setting(tmp_path: Path) -> None:
    names = [rule.__name__ for rule in RULES]
    assert names == [*DROPPED, "license"]
    assert len(set(names)) == len(names)
    assert all(rule.__doc__ for rule in RULES)
    everything = override_recipe(
        Recipe(),
        [
            "filter.drop_incomplete_patch=false",
            "filter.max_not_utf8_files=99",
            "filter.min_code_files=0",
            "filter.max_code_files=99",
            "filter.min_authored_fraction=0",
            "filter.drop_bots=false",
            "filter.drop_reverts=false",
            "filter.min_message_words=0",
            "filter.drop_whitespace_only=false",
            "filter.max_line=100000",
            "filter.max_mean_line=100000",
            "filter.min_alnum=0",
            "filter.max_base64=100000",
            "filter.max_conflict_markers=99",
            "filter.drop_syntax_errors=false",
        ],
    )
    rows, counts = decided(tmp_path, *DROPPED.values(), recipe=everything)
    assert all(row["keep"] for row in rows)
    assert counts == {"kept": len(DROPPED)}


@pytest.mark.parametrize(
    ("license", "reason"), [("MIT", ""), ("GPL-3.0-only", "license"), (None, "license")]
)
def test_licences_matter_only_when_asked(tmp_path: Path, license: str | None, reason: str) -> None:
    step = changed(triple={"license": license})
    strict = override_recipe(Recipe(), ["filter.permissive_only=true"])
    assert [v[0] for v in verdicts(tmp_path / "a", step)] == [True]
    assert [v[2] for v in verdicts(tmp_path / "b", step, recipe=strict)] == [reason]


@pytest.mark.parametrize(
    "message",
    [
        "fix(runtime-core): keep slots stable across renders (#1234)",
        "net: fix UDP split on Windows (#1573)",
        "feat!: drop support for filters",
        "Merge pull request #5 from a/b\n\nAdd a list parser",
        "修复登录错误",
    ],
)
def test_messages_of_real_projects_carry_intent(tmp_path: Path, message: str) -> None:
    assert [v[0] for v in verdicts(tmp_path, changed(commits=(Commit(message),)))] == [True]


def test_one_human_or_forward_commit_is_enough(tmp_path: Path) -> None:
    mixed = changed(commits=(Commit(is_bot=True), Commit(is_revert=True), Commit()))
    assert [v[0] for v in verdicts(tmp_path, mixed)] == [True]


def test_bots_and_reverts_need_a_commit_to_be_judged_by(tmp_path: Path) -> None:
    merged = Commit("Merge pull request #5 from a/b\n\nAdd a list parser", is_merge=True)
    assert [v[0] for v in verdicts(tmp_path, changed(commits=(merged,)))] == [True]


def test_duplicates_go_first_and_name_what_was_kept(tmp_path: Path) -> None:
    def member(triple: str, keep: bool) -> dict[str, Any]:
        return {
            "triple_id": triple, "cluster_id": "t0", "keep": keep, "matched_id": "t0",
            "kind": "near", "jaccard": 0.8333,
        }  # fmt: skip

    clusters = [member("t0", True), member("t1", False), member("elsewhere", False)]
    rows, counts = decided(tmp_path, CLEAN, DROPPED["no_code"], CLEAN, clusters=clusters)
    assert [(r["keep"], r["stage"], r["reason"]) for r in rows] == [
        (True, "", ""),
        (False, "dedup", "duplicate"),
        (True, "", ""),
    ]
    assert rows[1]["detail"] == "of t0: near, Jaccard 0.833"
    assert counts == {"kept": 2, "dropped_duplicate": 1}


def test_the_first_rule_wins_and_counts_add_up(tmp_path: Path) -> None:
    both = dataclasses.replace(DROPPED["syntax_errors"], commits=(Commit(is_bot=True),))
    rows, counts = decided(tmp_path, both, CLEAN, *DROPPED.values())
    assert rows[0]["reason"] == "bot"
    assert counts["dropped_bot"] == 2
    assert sum(counts.values()) == len(rows) == 2 + len(DROPPED)
    assert list(counts) == ["kept", *sorted(set(counts) - {"kept"})]


def test_no_triples_and_no_clusters_give_an_empty_table(tmp_path: Path) -> None:
    assert decided(tmp_path) == ([], {"kept": 0})


def test_missing_scores_are_an_error_that_names_the_triple(tmp_path: Path) -> None:
    work = build(tmp_path, [CLEAN])
    with pytest.raises(DatasetError, match="t0"):
        decide.run(work, Recipe())


ROW = st.fixed_dictionaries(
    {
        c.name: st.booleans() if str(c.type) == "bool" else st.integers(0, 2000)
        for c in SCORES.columns
        if c.name != "triple_id"
    }
    | {
        "patch_complete": st.booleans(),
        "license": st.sampled_from([None, "MIT", "GPL-3.0-only"]),
        "lines_added": st.integers(0, 1000),
        "lines_deleted": st.integers(0, 1000),
    }
)


@given(ROW)
def test_any_row_gets_the_first_objection(row: dict[str, Any]) -> None:
    settings = FilterSettings(permissive_only=True)
    all_objections = [(r.__name__, d) for r in RULES if (d := r(row, settings)) is not None]
    assert objection(row, settings) == (all_objections[0] if all_objections else None)
    assert all(detail for _, detail in all_objections)
