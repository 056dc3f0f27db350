"""Stage `decide`: keep or drop each triple, by rules over numbers.

A rule is a function of a row and the settings that returns what is wrong, or None. Its name is the
reason code. The first rule of `RULES` that objects decides, so each dropped triple has one reason
and the counts add up; the price is that a triple with several faults shows only the first. To add
a rule: write the function, add its setting to `FilterSettings`, name it in `RULES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from codeflow.errors import DatasetError
from codeflow.filter.provenance import is_permissive
from codeflow.recipe import FilterSettings, Recipe
from codeflow.tables import DECISIONS
from codeflow.work import Counts, Work

#: A row of `scores` with the columns `TRIPLE_COLUMNS` of its triple.
Row = Mapping[str, Any]
#: Returns the numbers behind the objection, or None.
Rule = Callable[[Row, FilterSettings], str | None]

TRIPLE_COLUMNS = ["triple_id", "patch_complete", "license", "lines_added", "lines_deleted"]


def incomplete_patch(row: Row, s: FilterSettings) -> str | None:
    """The patch leaves something out, so R_new cannot be rebuilt from text."""
    if s.drop_incomplete_patch and not row["patch_complete"]:
        return f"{row['binary_files']} files are not text"
    return None


def not_utf8(row: Row, s: FilterSettings) -> str | None:
    """A changed file cannot be shown as text."""
    if row["not_utf8_files"] > s.max_not_utf8_files:
        return f"{row['not_utf8_files']} files are not UTF-8"
    return None


def no_code(row: Row, s: FilterSettings) -> str | None:
    """Only prose, data or binaries changed."""
    if row["code_files"] < s.min_code_files:
        return f"{row['code_files']} code files < {s.min_code_files}"
    return None


def too_many_files(row: Row, s: FilterSettings) -> str | None:
    """A sweep over the repository, rarely one intent."""
    if row["code_files"] > s.max_code_files:
        return f"{row['code_files']} code files > {s.max_code_files}"
    return None


def machine_made(row: Row, s: FilterSettings) -> str | None:
    """Most changed lines were written by tools or copied from elsewhere."""
    lines = row["lines_added"] + row["lines_deleted"]
    if row["authored_lines"] < s.min_authored_fraction * lines:
        return (
            f"{row['authored_lines']} of {lines} lines authored; "
            f"files: {row['vendored_files']} vendored, {row['generated_files']} generated, "
            f"{row['lock_files']} lock, {row['binary_files']} binary"
        )
    return None


def bot(row: Row, s: FilterSettings) -> str | None:
    """Nobody but automation accounts committed."""
    if s.drop_bots and row["commits"] and row["bot_commits"] == row["commits"]:
        return f"{row['bot_commits']} of {row['commits']} commits by bots"
    return None


def revert(row: Row, s: FilterSettings) -> str | None:
    """Everything takes back earlier work."""
    if s.drop_reverts and row["commits"] and row["revert_commits"] == row["commits"]:
        return f"{row['revert_commits']} of {row['commits']} commits revert"
    return None


def no_intent(row: Row, s: FilterSettings) -> str | None:
    """The messages do not say what the change is for."""
    if row["message_words"] < s.min_message_words:
        return (
            f"{row['message_words']} words < {s.min_message_words} in "
            f"{row['informative_messages']} informative messages; "
            f"{row['merge_only_messages']} only merge"
        )
    return None


def whitespace_only(row: Row, s: FilterSettings) -> str | None:
    """Nothing changed but white space that has no meaning."""
    if s.drop_whitespace_only and row["whitespace_only"]:
        return "files are equal without white space"
    return None


def long_lines(row: Row, s: FilterSettings) -> str | None:
    """Added lines are too long to have been written by hand."""
    if row["max_line"] > s.max_line:
        return f"longest line {row['max_line']} bytes > {s.max_line}"
    if row["mean_line"] > s.max_mean_line:
        return f"mean line {row['mean_line']:.1f} bytes > {s.max_mean_line:g}"
    return None


def low_alnum(row: Row, s: FilterSettings) -> str | None:
    """Added text is mostly punctuation or white space: tables, art, matrices."""
    if row["alnum_fraction"] < s.min_alnum:
        return f"alphanumeric fraction {row['alnum_fraction']:.3f} < {s.min_alnum:g}"
    return None


def encoded_data(row: Row, s: FilterSettings) -> str | None:
    """Keys, images or archives were added as text."""
    if row["longest_base64"] > s.max_base64:
        return f"base64 run of {row['longest_base64']} bytes > {s.max_base64}"
    return None


def conflict_markers(row: Row, s: FilterSettings) -> str | None:
    """A merge conflict was committed unresolved."""
    if row["conflict_markers"] > s.max_conflict_markers:
        return f"{row['conflict_markers']} marker lines added"
    return None


def syntax_errors(row: Row, s: FilterSettings) -> str | None:
    """A file is worse formed after the change than before."""
    if s.drop_syntax_errors and row["syntax_broken_files"]:
        return (
            f"{row['syntax_broken_files']} of {row['parsed_files']} parsed files broken; "
            f"errors {row['syntax_errors_old']} -> {row['syntax_errors_new']}"
        )
    return None


def license(row: Row, s: FilterSettings) -> str | None:
    """The licence asks for more than attribution, or is unknown."""
    if s.permissive_only and not is_permissive(row["license"]):
        return f"licence {row['license'] or 'unknown'} is not known to be permissive"
    return None


#: In this order; cheap and structural reasons first, so that they explain most of the funnel.
RULES: tuple[Rule, ...] = (
    incomplete_patch,
    not_utf8,
    no_code,
    too_many_files,
    machine_made,
    bot,
    revert,
    no_intent,
    whitespace_only,
    long_lines,
    low_alnum,
    encoded_data,
    conflict_markers,
    syntax_errors,
    license,
)


def objection(row: Row, settings: FilterSettings) -> tuple[str, str] | None:
    """Reason code and detail of the first rule that objects to a triple, or None."""
    for rule in RULES:
        if (detail := rule(row, settings)) is not None:
            return rule.__name__, detail
    return None


def run(work: Work, recipe: Recipe) -> Counts:
    """Decide on the triples of one repository.

    Reads `scores` and `triples` of the repository and `clusters` of the dataset, writes
    `decisions` in the order of `triples`. A duplicate is dropped before any rule is asked.

    Returns:
        `kept`, and `dropped_<reason>` for each reason that occurred.

    Raises:
        DatasetError: A triple has no scores.
    """
    triples = work.read("triples", TRIPLE_COLUMNS)
    scores = {row["triple_id"]: row for row in work.read("scores").to_pylist()}
    clusters = work.read("clusters")
    ours = pc.and_(
        pc.invert(clusters["keep"]), pc.is_in(clusters["triple_id"], triples["triple_id"])
    )
    duplicates = {row["triple_id"]: row for row in clusters.filter(ours).to_pylist()}
    rows = []
    for triple in triples.to_pylist():
        triple_id = triple["triple_id"]
        if triple_id not in scores:
            raise DatasetError(
                f"triple {triple_id} of {work.unit} has no scores: run `codeflow filter` again"
            )
        stage, reason, detail = "", "", ""
        if duplicate := duplicates.get(triple_id):
            stage, reason = "dedup", "duplicate"
            detail = "of {matched_id}: {kind}, Jaccard {jaccard:.3f}".format_map(duplicate)
        elif dropped := objection(scores[triple_id] | triple, recipe.filter):
            stage, (reason, detail) = "filter", dropped
        rows.append(
            {
                "triple_id": triple_id,
                "keep": not reason,
                "stage": stage,
                "reason": reason,
                "detail": detail,
            }
        )
    work.write("decisions", pa.Table.from_pylist(rows, schema=DECISIONS.schema))
    dropped_by = Counter(str(row["reason"]) for row in rows if not row["keep"])
    return {
        "kept": len(rows) - dropped_by.total(),
        **{f"dropped_{reason}": n for reason, n in sorted(dropped_by.items())},
    }
