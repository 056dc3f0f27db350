"""Stage `score`: numbers about every triple of one repository, and no thresholds.

Each part of a row is a frozen dataclass whose fields are columns of `scores`. File contents are
read once, in the order they are stored, and reduced at once to the few facts below: memory grows
with the number of changed files, not with their size, and no file is parsed twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from codeflow.filter.messages import message_scores
from codeflow.filter.provenance import is_generated, path_provenance
from codeflow.filter.syntax import ABSENT, GRAMMARS, Syntax, inspect, is_broken
from codeflow.filter.text import added_lines, is_utf8, substance, text_scores
from codeflow.paths import PROSE_AND_DATA, language_of
from codeflow.recipe import Recipe
from codeflow.tables import SCORES
from codeflow.work import Counts, Work

COMMIT_COLUMNS = ["position", "message", "is_merge", "is_bot", "is_revert"]
TRIPLE_COLUMNS = ["triple_id", "old_position", "new_position", "patch"]

#: A row of an input table, by column name.
Row = Mapping[str, Any]
#: Blob and language: the same content reads differently in another language.
Side = tuple[str | None, str]


@dataclass(frozen=True)
class BlobFacts:
    """All that is remembered of a file's content, read as a file of one language."""

    utf8: bool
    generated: bool
    substance: bytes
    syntax: Syntax | None


Facts = Mapping[Side, BlobFacts]


@dataclass(frozen=True)
class FileScores:
    """Columns about the kinds of changed files. The first class that fits a file counts:
    binary (not text), lock, vendored, generated, authored."""

    code_files: int = 0
    code_lines: int = 0
    vendored_files: int = 0
    generated_files: int = 0
    lock_files: int = 0
    binary_files: int = 0
    authored_lines: int = 0
    not_utf8_files: int = 0
    whitespace_only: bool = False


@dataclass(frozen=True)
class SyntaxScores:
    """Columns about authored files that were parsed on both sides."""

    syntax_errors_old: int = 0
    syntax_errors_new: int = 0
    syntax_broken_files: int = 0
    parsed_files: int = 0


@dataclass(frozen=True)
class CommitScores:
    """Columns about who committed. A merge repeats what its commits say, so merges do not count."""

    commits: int
    bot_commits: int
    revert_commits: int


def run(work: Work, _recipe: Recipe) -> Counts:
    """Score the triples of one repository.

    Reads `triples`, `changes`, `commits` and `blobs` of the repository, writes `scores` in the
    order of `triples`.
    """
    changes: dict[str, list[Row]] = defaultdict(list)
    for change in work.read("changes").to_pylist():
        changes[change["triple_id"]].append(change)
    facts = blob_facts(work, chain.from_iterable(changes.values()))
    commits: dict[int, list[Row]] = defaultdict(list)
    for commit in work.read("commits", COMMIT_COLUMNS).to_pylist():
        commits[commit["position"]].append(commit)
    rows = []
    for batch in work.batches("triples", TRIPLE_COLUMNS):
        for triple in batch.to_pylist():
            files = changes[triple["triple_id"]]
            steps = range(triple["old_position"] + 1, triple["new_position"] + 1)
            between = [commit for step in steps for commit in commits[step]]
            rows.append(
                {"triple_id": triple["triple_id"]}
                | asdict(file_scores(files, facts))
                | asdict(text_scores(added_lines(triple["patch"])))
                | asdict(syntax_scores(files, facts))
                | asdict(commit_scores(between))
                | asdict(message_scores(commit["message"] for commit in between))
            )
    work.write("scores", pa.Table.from_pylist(rows, schema=SCORES.schema))
    return {
        "triples": len(rows),
        "files_inspected": len(facts),
        "files_parsed": sum(f.syntax is not None for f in facts.values()),
    }


def blob_facts(work: Work, changes: Iterable[Row]) -> Facts:
    """Facts about both sides of every changed text file, by (blob, language)."""
    wanted: dict[str, set[str]] = defaultdict(set)
    authored: set[Side] = set()
    for change in changes:
        if change["kind"] == "text":
            for blob, language in sides(change):
                if blob is not None:
                    wanted[blob].add(language)
                    if not path_provenance(change["path"]):
                        authored.add((blob, language))
    facts: dict[Side, BlobFacts] = {}
    for batch in work.batches("blobs", ["blob", "kind", "data"]):
        blobs, kinds = batch.column("blob").to_pylist(), batch.column("kind").to_pylist()
        for i, (blob, kind) in enumerate(zip(blobs, kinds, strict=True)):
            if kind == "text" and blob in wanted:
                data = batch.column("data")[i].as_py()
                for side in ((blob, language) for language in wanted[blob]):
                    facts[side] = inspect_blob(data, side[1], parse=side in authored)
    return facts


def inspect_blob(data: bytes, language: str, *, parse: bool) -> BlobFacts:
    """Reduce one file to its facts; `parse` asks for its syntax unless a tool wrote the file."""
    generated = is_generated(data, language)
    return BlobFacts(
        utf8=is_utf8(data),
        generated=generated,
        substance=substance(data, language),
        syntax=inspect(language, data) if parse and not generated else None,
    )


def sides(change: Row) -> tuple[Side, Side]:
    """`(blob, language)` of a changed file in R_old and in R_new; blob None where it is absent."""
    old_path, language = change["old_path"], change["language"]
    old_language = language if old_path is None else language_of(old_path)
    return (change["old_blob"], old_language), (change["new_blob"], language)


def file_scores(changes: Iterable[Row], facts: Facts) -> FileScores:
    """Classify the changed files of one triple."""
    files: Counter[str] = Counter()
    code_files = code_lines = authored_lines = not_utf8 = 0
    same_substance = []
    for change in changes:
        lines = change["lines_added"] + change["lines_deleted"]
        old, new = (facts.get(side) for side in sides(change))
        provenance = _provenance(change, new or old)
        files[provenance] += 1
        authored_lines += lines if provenance == "authored" else 0
        if change["kind"] == "text":
            not_utf8 += any(side is not None and not side.utf8 for side in (old, new))
            if change["language"] not in PROSE_AND_DATA:
                code_files += 1
                code_lines += lines
        same_substance.append(
            change["status"] == "M"
            and change["old_mode"] == change["new_mode"]
            and old is not None
            and new is not None
            and old.substance == new.substance
        )
    return FileScores(
        code_files=code_files,
        code_lines=code_lines,
        vendored_files=files["vendored"],
        generated_files=files["generated"],
        lock_files=files["lock"],
        binary_files=files["binary"],
        authored_lines=authored_lines,
        not_utf8_files=not_utf8,
        whitespace_only=bool(same_substance) and all(same_substance),
    )


def _provenance(change: Row, facts: BlobFacts | None) -> str:
    if change["kind"] != "text":
        return "binary"
    by_content = "generated" if facts is not None and facts.generated else "authored"
    return path_provenance(change["path"]) or by_content


def syntax_scores(changes: Iterable[Row], facts: Facts) -> SyntaxScores:
    """Compare the defects of each changed file before and after.

    Deleted files and files whose content stayed are left out, and so is a file one side of which
    was not parsed. An added file, or one renamed from a language without a grammar, is compared
    with a clean one.
    """
    pairs = []
    for change in changes:
        old_side, new_side = sides(change)
        if new_side[0] is None or old_side[0] == new_side[0]:
            continue
        new = _syntax_of(new_side, facts)
        is_new = old_side[0] is None or old_side[1] not in GRAMMARS
        old = ABSENT if is_new else _syntax_of(old_side, facts)
        if old is not None and new is not None:
            pairs.append((change["language"], old, new))
    return SyntaxScores(
        syntax_errors_old=sum(old.errors for _, old, _ in pairs),
        syntax_errors_new=sum(new.errors for _, _, new in pairs),
        syntax_broken_files=sum(is_broken(*pair) for pair in pairs),
        parsed_files=len(pairs),
    )


def _syntax_of(side: Side, facts: Facts) -> Syntax | None:
    found = facts.get(side)
    return found.syntax if found else None


def commit_scores(commits: Iterable[Row]) -> CommitScores:
    """Count automation accounts and reverts among the commits that are no merges."""
    own = [commit for commit in commits if not commit["is_merge"]]
    return CommitScores(
        commits=len(own),
        bot_commits=sum(commit["is_bot"] for commit in own),
        revert_commits=sum(commit["is_revert"] for commit in own),
    )
