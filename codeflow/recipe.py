"""Every setting of every stage, with default, unit, meaning and source.

A recipe is one TOML file, one section a stage. The dataclasses below are also the Python API:
`Recipe()` is the default recipe, `dataclasses.replace` changes it. Settings under `[run]` say how
to run, never what comes out; all others are part of the fingerprints of the stages that use them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeflow.errors import RecipeError
from codeflow.settings import build, flatten, read_toml, section, setting, to_mapping
from codeflow.settings import with_overrides as _with_overrides


@dataclass(frozen=True)
class MineSettings:
    window_from: float = setting(
        0.40, "start of the maturity window, as a fraction of the mainline by commit count",
        minimum=0, maximum=1, source="IQuest-Coder-V1 report: 40-80 % of a project's life",
    )  # fmt: skip
    window_to: float = setting(
        0.80, "end of the maturity window, as a fraction of the mainline by commit count",
        minimum=0, maximum=1, source="IQuest-Coder-V1 report: 40-80 % of a project's life",
    )  # fmt: skip
    lifecycle: str = setting(
        "commits",
        "what the window's fractions measure: mainline commits, time, or churn (changed lines)",
        choices=("commits", "time", "churn"),
        source="measured: by time, express's window would be 42 commits of 3,888",
    )
    collapse_forks: bool = setting(
        True, "of repositories that share their root commit, mine one and list the rest"
    )
    slice_commits: int = setting(
        1000, "mainline steps that make one unit of work; giants are cut into several",
        unit="commits", minimum=2,
        source="measured: a slice of redis takes 2-30 s and 0.6 GB in each step",
    )  # fmt: skip
    policy: str = setting(
        "band",
        "where triples end: `band` (size band below), `commit` (each step), `count` (every "
        "max_commits steps), `release` (tags), `pull_request` (merges and steps naming one)",
        choices=("band", "commit", "count", "release", "pull_request"),
        source="measured: the band's patch sizes alone do not depend on the repository",
    )
    min_commits: int = setting(
        100, "repositories with a shorter mainline are skipped", unit="commits", minimum=1,
        source="Seed-Coder: at least 100 commits",
    )  # fmt: skip
    min_lines: int = setting(
        20, "smallest net patch of a triple", unit="changed lines", minimum=1,
        source="measured on 7 repositories: 20-400 lines fit 24-89 % of triples into 32K tokens",
    )  # fmt: skip
    max_lines: int = setting(
        400, "largest net patch of a triple", unit="changed lines", minimum=1,
        source="as min_lines",
    )  # fmt: skip
    max_files: int = setting(
        20, "most files a triple may change", unit="files", minimum=1, source="as min_lines"
    )
    max_commits: int = setting(
        30, "most mainline steps from R_old to R_new", unit="commits", minimum=1,
        source="as min_lines",
    )  # fmt: skip
    prefer_tests: bool = setting(
        True,
        "prefer an endpoint whose own commit touches code and tests over the first in the band",
    )
    max_blob_bytes: int = setting(
        1 << 20, "larger files are kept by id only", unit="bytes", minimum=1,
        source="GitHub Linguist calls larger files too large to show",
    )  # fmt: skip
    rename_limit: int = setting(
        400, "most files compared for inexact renames (quadratic)", unit="files", minimum=0,
        source="git's own default is 1000; 3,000 renames cost libgit2 0.8 s",
    )  # fmt: skip
    author_key: str = setting(
        "codeflow", "key of the author hashes; change it to make ids unlinkable to other datasets"
    )


@dataclass(frozen=True)
class DedupSettings:
    threshold: float = setting(
        0.7, "exact Jaccard similarity of changed lines from which two triples are duplicates",
        minimum=0, maximum=1, source="BigCode near-deduplication",
    )  # fmt: skip
    min_shingles: int = setting(
        10, "changes with fewer distinct shingles are compared by exact keys only",
        unit="shingles", minimum=1,
        source="measured: below 10 shingles version bumps and typo fixes collapse",
    )  # fmt: skip


@dataclass(frozen=True)
class FilterSettings:
    drop_incomplete_patch: bool = setting(
        True, "drop when the patch alone does not give R_new (a binary or too large file changed)",
        source="Clean-PR: keep a change only if its edits replay exactly",
    )  # fmt: skip
    max_not_utf8_files: int = setting(
        0, "most changed text files that are not valid UTF-8", unit="files", minimum=0,
        source="ours: documents are text",
    )  # fmt: skip
    min_code_files: int = setting(
        1, "fewest changed files in a programming language", unit="files", minimum=0,
        source="SWE-rebench: 1-15 code files",
    )  # fmt: skip
    max_code_files: int = setting(
        15, "most changed files in a programming language", unit="files", minimum=0,
        source="SWE-rebench: 1-15 code files",
    )  # fmt: skip
    min_authored_fraction: float = setting(
        0.5, "fewest changed lines outside vendored, generated and lock files, as a fraction",
        minimum=0, maximum=1, source="ours: a patch that is mostly machine-made teaches little",
    )  # fmt: skip
    max_line: int = setting(
        1000, "longest added line", unit="bytes", minimum=1,
        source="StarCoder, DeepSeek-Coder, OpenCoder",
    )  # fmt: skip
    max_mean_line: float = setting(
        100.0, "largest mean length of added lines", unit="bytes", minimum=1,
        source="StarCoder, DeepSeek-Coder, OpenCoder",
    )  # fmt: skip
    min_alnum: float = setting(
        0.25, "smallest fraction of letters and digits in added text", minimum=0, maximum=1,
        source="StarCoder, DeepSeek-Coder, Granite, The Stack v2",
    )  # fmt: skip
    max_base64: int = setting(
        1024, "longest run of base64 digits in added text", unit="bytes", minimum=1,
        source="OpenCoder",
    )  # fmt: skip
    max_conflict_markers: int = setting(
        0, "most added merge-conflict marker lines", unit="lines", minimum=0,
        source="ours: an unresolved conflict is never meant",
    )  # fmt: skip
    drop_whitespace_only: bool = setting(True, "drop changes of white space alone")
    drop_syntax_errors: bool = setting(
        True, "drop when a file has more syntax errors after the patch than before",
        source="LintSeq and Seed-Coder's rule as a difference; no false alarm in 3,300 commits",
    )  # fmt: skip
    drop_bots: bool = setting(
        True, "drop when only automation accounts wrote the commits", source="CommitPack"
    )
    drop_reverts: bool = setting(
        True, "drop when every commit reverts another", source="CommitPack"
    )
    min_message_words: int = setting(
        3, "fewest words in all informative messages together", unit="words", minimum=0,
        source="CommitPackFT's message rules keep 0-27 % of good projects; this keeps intent only",
    )  # fmt: skip
    permissive_only: bool = setting(
        False, "keep only triples under a permissive licence (MIT, Apache-2.0, BSD, ISC, …)"
    )


@dataclass(frozen=True)
class TokenizerSettings:
    path: str | None = setting(
        None, "a tokenizer.json to use; unset: a byte-level BPE is trained on the kept triples"
    )
    vocab_size: int = setting(
        32768, "size of the trained vocabulary, control tokens included", unit="tokens",
        minimum=512, maximum=1 << 20,
        source="measured: 76,800 gains 3 % compression over 32,768 and costs twice the bytes",
    )  # fmt: skip
    sample_bytes: int = setting(
        50_000_000, "text the vocabulary is trained on", unit="bytes", minimum=1000
    )


@dataclass(frozen=True)
class ComposeSettings:
    context: str = setting(
        "changed",
        "old files shown before the patch: the changed ones (`changed`), or none (`none`)",
        choices=("changed", "none"),
    )
    max_messages: int = setting(
        30, "most commit messages shown as intent", unit="messages", minimum=0
    )
    train_context: bool = setting(
        True, "context and intent are training targets too, not the patch alone",
        source="pre- and mid-training convention: every token is a target",
    )  # fmt: skip


@dataclass(frozen=True)
class PackSettings:
    length: int = setting(
        32768, "row length; documents must fit whole", unit="tokens", minimum=128,
        source="IQuest-Coder-V1 mid-training: 32K, then 128K",
    )  # fmt: skip
    shard_tokens: int = setting(
        1 << 27, "tokens per shard file", unit="tokens", minimum=1024,
        source="about 256 MB of 16-bit ids",
    )  # fmt: skip
    group_tokens: int = setting(
        1 << 19, "tokens per Parquet row group", unit="tokens", minimum=1024,
        source="measured: 16 rows of 32K keep random reads below 1 ms",
    )  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    unit_seconds: float = setting(3600.0, "time limit of one unit", unit="seconds", minimum=1)
    unit_memory_mib: int = setting(8192, "memory limit of one unit", unit="MiB", minimum=256)
    attempts: int = setting(3, "starts granted to a unit whose process dies", minimum=1)
    clone_seconds: float = setting(
        1800.0, "time limit of one clone or update, all attempts together", unit="seconds",
        minimum=1,
    )  # fmt: skip
    clone_attempts: int = setting(
        4, "starts granted to a clone while the network fails; refusals get one", minimum=1
    )
    clone_max_mib: int = setting(
        4096, "larger repositories are given up while they are fetched", unit="MiB", minimum=1
    )


@dataclass(frozen=True)
class Recipe:
    name: str = setting("default", "a dataset accepts changes of its recipe, not another recipe")
    mine: MineSettings = section(MineSettings)
    dedup: DedupSettings = section(DedupSettings)
    filter: FilterSettings = section(FilterSettings)
    tokenizer: TokenizerSettings = section(TokenizerSettings)
    compose: ComposeSettings = section(ComposeSettings)
    pack: PackSettings = section(PackSettings)
    run: RunSettings = section(RunSettings)

    @property
    def hash(self) -> str:
        """Hash of everything that can change a byte of the output; `[run]` is left out."""
        content = {k: v for k, v in to_mapping(self).items() if k != "run"}
        return digest(content)

    def part(self, keys: Iterable[str]) -> dict[str, Any]:
        """The settings a step depends on, by section or dotted key (`pack.length`)."""
        leaves = list(flatten(self))
        return {
            name: value
            for key in keys
            for name, value, _ in leaves
            if name == key or name.startswith(key + ".")
        }


_OF_TRAINING = {"model", "train", "stage"}  # sections of recipes that `codeflow train` takes


def digest(value: Any) -> str:
    """A stable hash of a JSON-able value, 24 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def load_recipe(path: str | Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file (None: the default recipe) and apply `section.key=value` overrides.

    Raises:
        RecipeError: No such file, bad TOML, an unknown key (names the nearest), a bad value.
    """
    mapping: dict[str, Any] = {}
    where = "recipe"
    if path is not None:
        where = str(path)
        try:
            mapping = read_toml(Path(path).read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"cannot read recipe {where}: {e}") from e
        if mapping.keys() & _OF_TRAINING:
            raise RecipeError(
                f"{where} is a recipe for training: give it to `codeflow train --recipe`. What a "
                "dataset's recipe holds, `codeflow show recipe` says."
            )
        mapping.setdefault("name", Path(path).stem)
    recipe = build(Recipe, mapping, where)
    return override_recipe(recipe, overrides)


def override_recipe(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """`recipe` with `--set` overrides applied and everything checked."""
    overrides = list(overrides)
    if not overrides:
        result = recipe
    else:
        result = build(Recipe, _with_overrides(to_mapping(recipe), overrides), "--set")
    _check(result)
    return result


def recipe_from_mapping(mapping: dict[str, Any], where: str) -> Recipe:
    """A recipe from its stored form."""
    return build(Recipe, mapping, where)


def changed_settings(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """`(key, old value, new value)` of every output-relevant setting that differs."""
    before = {name: value for name, value, _ in flatten(old)}
    after = {name: value for name, value, _ in flatten(new)}
    return [
        (name, before[name], after[name])
        for name in after
        if before[name] != after[name] and not name.startswith("run.")
    ]


def to_toml(recipe: Recipe, *, comments: bool = False) -> str:
    """The recipe as TOML; with comments, meaning, unit and source of every key beside it."""
    lines = [f"# codeflow recipe, hash {recipe.hash}"]
    current = ""
    for key, value, meta in flatten(recipe):
        head, _, name = key.rpartition(".")
        if head != current:
            lines += ["", f"[{head}]"]
            current = head
        if comments:
            unit = f" [{meta['unit']}]" if meta.get("unit") else ""
            source = f" Source: {meta['source']}." if meta.get("source") else ""
            lines.append(f"# {meta['meaning'][:1].upper()}{meta['meaning'][1:]}{unit}.{source}")
        lines.append(f"# {name} =" if value is None else f"{name} = {_toml_value(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _check(recipe: Recipe) -> None:
    mine = recipe.mine
    if mine.window_from >= mine.window_to:
        raise RecipeError(
            f"`mine.window_from` ({mine.window_from}) must lie below `mine.window_to` "
            f"({mine.window_to})"
        )
    if mine.min_lines > mine.max_lines:
        raise RecipeError(
            f"`mine.min_lines` ({mine.min_lines}) must not exceed `mine.max_lines` "
            f"({mine.max_lines})"
        )
