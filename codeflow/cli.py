"""The command line: read options, call one function, print.

No work is done here, and nothing heavy is imported before a command needs it: `codeflow --help`
must not load Arrow, libgit2 or torch.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from codeflow import __version__
from codeflow.errors import CodeflowError
from codeflow.exec import EXECUTORS
from codeflow.steps import STAGES
from codeflow.storage import AnyPath, parse_root

if TYPE_CHECKING:
    from codeflow.pipeline import RunOptions
    from codeflow.recipe import Recipe
    from codeflow.verify import Verification


class _Dataset(click.ParamType[AnyPath]):
    """A folder or a URI of an object store."""

    name = "dataset"

    def convert(self, value: Any, param: Any, ctx: Any) -> AnyPath:  # noqa: ARG002 - click's
        return value if isinstance(value, AnyPath) else parse_root(value)


_DATASET = _Dataset()
F = TypeVar("F", bound=Callable[..., Any])


def main() -> None:
    """Entry point: every error on purpose is one message and its exit code, never a traceback."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        code = e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"interrupted{_kept()}", err=True)
        code = 130
    except CodeflowError as e:
        click.echo(f"error: {e}", err=True)
        code = e.exit_code
    except BrokenPipeError:  # `codeflow show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        click.echo(f"error: no space left on the disk ({e.filename or 'output'}): free some"
                   f"{_kept()}", err=True)  # fmt: skip
        code = 1
    sys.exit(code or 0)


def _kept() -> str:
    """What a command that ended in the middle has left, and how to go on; empty: nothing."""
    command = next(iter(sys.argv[1:]), "")
    if command in ("build", *STAGES):
        return "; finished units are kept: run the same command to go on"
    if command == "train":
        return "; checkpoints written so far are kept: go on from the newest with --resume"
    return ""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  codeflow build --repos list.txt --out data/
  codeflow build --repos list.txt --out data/ --set pack.length=131072
  codeflow verify data/
  codeflow train --shards data/ --out run/ --steps 300
""",
)
@click.version_option(__version__, prog_name="codeflow")
def cli() -> None:
    """Mine git histories into (old repository, patch, new repository) training data."""


# -- options shared by commands -------------------------------------------------------------------


def _recipe_options(command: F) -> F:
    command = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
        help="Override one setting; may be repeated.",
    )(command)  # fmt: skip
    return click.option(
        "--recipe", "recipe_path", type=click.Path(dir_okay=False, path_type=Path),
        help="Recipe file (TOML). Default: the dataset's own, or the built-in one.",
    )(command)  # fmt: skip


def _run_options(command: F) -> F:
    for option in reversed(
        [
            click.option("--executor", type=click.Choice(EXECUTORS), default="local",
                         show_default=True,
                         help="How units run: local (supervised processes), inline (debugging) or "
                         "ray (a cluster)."),
            click.option("--workers", type=click.IntRange(1), default=None,
                         help="Units at work at a time. Default: number of cores; a Ray cluster is "
                         "used whole."),
            click.option("--address", default=None, metavar="HOST:PORT",
                         help="Ray cluster, or `auto`: this machine's. Default: RAY_ADDRESS, else "
                         "one that is started here."),
            click.option("--failed", "retry_failed", is_flag=True,
                         help="Run quarantined units again, too."),
            click.option("--dry-run", is_flag=True, help="Say what would run; write nothing."),
            click.option("--json", "as_json", is_flag=True,
                         help="Print the summary as JSON on standard output."),
            click.option("--quiet", "-q", is_flag=True, help="No progress."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _source_options(command: F) -> F:
    for option in reversed(
        [
            click.option("--repos", required=True, type=click.Path(path_type=Path),
                         help="List of repositories, one a line: URL, owner/name (GitHub), path or "
                         "git bundle; # starts a comment. The dataset holds what its list says: "
                         "data of repositories that are no longer listed are deleted."),
            click.option("--out", required=True, type=_DATASET,
                         help="Dataset: a folder, made when absent, or s3://bucket/prefix."),
            click.option("--limit", type=click.IntRange(1), default=None,
                         help="Take only the first repositories of the list; the others are not "
                         "in the dataset, and deleted from it if they were."),
            click.option("--update", is_flag=True,
                         help="Pin the heads of all repositories anew."),
            click.option("--replace-recipe", is_flag=True,
                         help="Turn a dataset of another recipe over to this one."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


# -- making data ----------------------------------------------------------------------------------


@cli.command(
    epilog="""\b
Examples:
  printf 'pallets/flask\\n./my-project\\n' > list.txt
  codeflow build --repos list.txt --out data/
  codeflow build --repos list.txt --out data/ --recipe pipelines/midtrain-32k.toml
  codeflow build --repos list.txt --out data/ --set dedup.threshold=0.85 --dry-run
"""
)
@_source_options
@_recipe_options
@_run_options
def build(**options: Any) -> int:
    """Everything: from a list of repositories to packed training shards.

    Run it again after an interruption or a changed setting: only what is missing is computed.
    """
    return _build_from_list("pack", **options)


@cli.command(
    epilog="""\b
Example:
  codeflow mine --repos list.txt --out data/ --set mine.max_lines=300
"""
)
@_source_options
@_recipe_options
@_run_options
def mine(**options: Any) -> int:
    """Repositories to triples: clone, find the maturity window, cut and prove triples."""
    return _build_from_list("mine", **options)


def _stage_command(stage: str, text: str, example: str) -> None:
    @cli.command(stage, help=text, epilog=f"\b\nExample:\n  {example}\n")
    @click.argument("data", type=_DATASET)
    @_recipe_options
    @_run_options
    def command(
        data: AnyPath, recipe_path: Path | None, overrides: tuple[str, ...], **run: Any
    ) -> int:
        return _build(data, None, stage, recipe_path, overrides, **run)


_stage_command(
    "dedup",
    "Find near-duplicate triples of an existing dataset (MinHash, verified).",
    "codeflow dedup data/ --set dedup.threshold=0.85",
)
_stage_command(
    "filter",
    "Score triples and decide which stay, each drop with its reason.",
    "codeflow filter data/ --set filter.permissive_only=true",
)
_stage_command(
    "compose",
    "Turn kept triples into training documents.",
    "codeflow compose data/ --set compose.context=none",
)
_stage_command(
    "pack",
    "Pack documents into rows and write shards.",
    "codeflow pack data/ --set pack.length=131072",
)


@cli.command(
    "pack-messages",
    epilog="""\b
Examples:
  codeflow pack-messages chat.jsonl --tokenizer data/ --out sft/
  codeflow pack-messages a.jsonl b.jsonl.gz --tokenizer tokenizer.json --out sft/ --length 8192
  codeflow train --shards sft/ --out run/
\b
A line of a file is one conversation:
  {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
Roles are system, user, assistant and tool. A message with "train": false is no training target.
{"prompt": "2 + 2?", "completion": "4"} means the same.
""",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="tokenizer.json, or the dataset or shards folder that holds it: take that of "
    "the data the model was trained on.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for shards/; new or empty.",
)
@click.option(
    "--length",
    type=click.IntRange(128),
    default=32768,
    show_default=True,
    help="Row length in tokens; longer conversations are rejected, none is cut.",
)
@click.option(
    "--last-only",
    is_flag=True,
    help="Train on the last message of the assistant alone. Default: on all of them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pack_messages(as_json: bool, out: Path, length: int, **options: Any) -> None:
    """Pack conversations (JSON lines) into shards for supervised fine-tuning.

    Only what the assistant says is a training target. Lines that cannot be used are named and
    counted; the others are packed.
    """
    import dataclasses

    from codeflow.errors import printable
    from codeflow.pack.messages import describe
    from codeflow.pack.messages import pack_messages as run
    from codeflow.recipe import PackSettings

    packed = run(out=out, settings=PackSettings(length=length), **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(packed)))
        return
    for rejected in packed.rejected[:50]:
        click.echo(printable(f"rejected: {rejected}"), err=True)
    if len(packed.rejected) > 50:
        click.echo(f"… and {len(packed.rejected) - 50:,} more (all: --json)", err=True)
    click.echo(f"{out}\n{describe(packed)}\nnext: codeflow train --shards {out} --out run/")


# -- looking at data ------------------------------------------------------------------------------


@cli.command(
    epilog="""\b
Examples:
  codeflow verify data/
  codeflow verify data/ --sample git:200
"""
)
@click.argument("data", type=_DATASET)
@click.option(
    "--sample",
    default="",
    metavar="git[:N]",
    help="Also let the git command replay N triples (50), spread over repositories, from "
    "the stored tables alone.",
)
@click.option("--workers", type=click.IntRange(1), default=None, help="Default: number of cores.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(data: AnyPath, sample: str, workers: int | None, as_json: bool) -> int:
    """Prove a dataset: every checksum, and R_old + P = R_new for every triple.

    Needs nothing but the dataset. Exits with 1 when anything is wrong.
    """
    import dataclasses
    import re

    from codeflow.dataset import Dataset
    from codeflow.verify import verify as run_verify

    match = re.fullmatch(r"git(?::([1-9]\d{0,8}))?", sample)
    if sample and match is None:
        raise click.BadParameter(f"`{sample}`: write git or git:100", param_hint="--sample")
    git_sample = int(match[1] or 50) if match else 0
    result = run_verify(Dataset.open(data), workers or _cores(), git_sample=git_sample)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        for problem in result.problems[:50]:
            click.echo(f"bad: {problem}", err=True)
        if len(result.problems) > 50:
            click.echo(f"… and {len(result.problems) - 50} more", err=True)
        if result.remedy:
            click.echo(f"to mend files: {result.remedy}", err=True)
        found = len(result.problems)
        problems = "1 problem" if found == 1 else f"{found:,} problems"
        click.echo(f"{_proof(result)}; {result.files:,} files checked, {problems}")
        if git_sample:
            click.echo(f"git itself: {result.git_agreed:,} of {result.git_checked:,} triples")
    return 1 if result.problems else 0


def _proof(result: Verification) -> str:
    if not result.triples:
        return "no triples to prove: none was mined"
    percent = 100 * result.proven / result.triples
    return (
        f"{result.proven:,} of {result.triples:,} triples proven ({percent:.2f} %), "
        f"{result.complete:,} by their patch alone"
    )


@cli.command(
    epilog="""\b
Examples:
  codeflow show data/                 the summary
  codeflow show data/ pallets         a repository and its triples
  codeflow show data/ 41f0            a triple or a document, by the start of its id
  codeflow show data/ row:0           the first packed row
  codeflow show data/ decisions       every drop with its reason
  codeflow show data/ rejects         kept triples that gave no document, and why
  codeflow show data/ recipe          the recipe it was made with
  codeflow show recipe > my.toml      the built-in recipe: every setting, its meaning and source
  codeflow show recipe --recipe pipelines/quickstart.toml --set pack.length=65536
"""
)
@click.argument("data", type=_DATASET)
@click.argument("item", default="")
@_recipe_options
def show(data: AnyPath, item: str, recipe_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Show a dataset, or one repository, triple, document or row of it.

    DATA is a dataset folder, or the word `recipe` to see what a recipe comes to without one.
    """
    from codeflow.dataset import Dataset
    from codeflow.recipe import Recipe, load_recipe, to_toml

    if str(data) == "recipe" and not item:
        click.echo(to_toml(load_recipe(recipe_path, overrides), comments=True), nl=False)
        return
    if recipe_path is not None or overrides:
        raise click.UsageError("--recipe and --set go with `codeflow show recipe`")
    dataset = Dataset.open(data)
    recipe = dataset.stored_recipe() or Recipe()
    if not item:
        from codeflow.report.summary import render, summarize

        click.echo(render(summarize(dataset, recipe), recipe))
    elif item == "recipe":
        click.echo(to_toml(recipe, comments=True), nl=False)
    else:
        from codeflow.report.show import show as show_item

        click.echo(show_item(dataset, item))


@cli.command()
@click.argument("table", default="")
@click.option("--write", type=click.Path(path_type=Path, file_okay=False),
              help="Write one JSON file a table into this folder.")  # fmt: skip
def schema(table: str, write: Path | None) -> None:
    """Print the tables and their columns, or write them as files."""
    from codeflow.errors import UsageError, did_you_mean
    from codeflow.tables import TABLES, schema_json

    if table and table not in TABLES:
        raise UsageError(f"no table `{table}`. {did_you_mean(table, TABLES)}")
    chosen = [TABLES[table]] if table else list(TABLES.values())
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for t in chosen:
            text = json.dumps(schema_json(t), indent=1, ensure_ascii=False) + "\n"
            (write / f"{t.name}.json").write_text(text, encoding="utf-8")
        click.echo(f"{len(chosen)} files in {write}")
        return
    for t in chosen:
        click.echo(click.style(t.name, bold=True) + f"  {t.meaning}")
        for c in t.columns:
            unit = f" [{c.unit}]" if c.unit else ""
            optional = "?" if c.nullable else ""
            click.echo(f"  {c.name + optional:<22} {c.type!s:<28} {c.meaning}{unit}")
        click.echo()


# -- training -------------------------------------------------------------------------------------


@cli.command(
    epilog="""\b
Examples:
  codeflow train --shards data/ --out run/ --steps 300
  codeflow train --shards data/ --out run/ --size small --set train.learning_rate=3e-4
  codeflow train --shards data/ --size 1.2b --dry-run
  codeflow train --recipe stages.toml --out run/
  codeflow train --recipe stages.toml --out run/ --resume
  torchrun --nproc-per-node 2 -m codeflow.train --shards data/ --out run/ --size 1.2b

stages.toml is your copy of pipelines/train-stages.toml, with your own data in its `shards` lines.
"""
)
@click.option("--shards", help="Dataset folder, shards folder or its manifest.json; the data of "
              "stages that name none.")  # fmt: skip
@click.option("--out", help="Folder for metrics.jsonl and checkpoints.")
@click.option("--steps", type=click.IntRange(1), help="Length of a run without stages.")
@click.option("--size", help="Named model size, from tiny (the default) to 40b.")
@click.option("--recipe", "--config", "config", type=click.Path(dir_okay=False),
              help="TOML file with [model], [train] and [[stage]] tables.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override one setting; of a stage: stage.NAME.key=value. May be "
              "repeated.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
@click.option("--dry-run", is_flag=True,
              help="Say what the run comes to, and whether it fits a GPU; needs none.")  # fmt: skip
@click.option("--gpu-memory", type=click.FloatRange(0, min_open=True), default=141.0,
              show_default=True, metavar="GB", help="Of each GPU, for --dry-run.")  # fmt: skip
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="GPUs, for --dry-run.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(**options: Any) -> None:
    """Train a LoopCoder on shards (needs the `train` extra: torch, safetensors).

    A run that is interrupted or told to stop (SIGTERM) saves a checkpoint first.
    """
    try:
        from codeflow.train.__main__ import execute
    except ModuleNotFoundError as e:
        raise CodeflowError(
            f"training needs {e.name}: pip install 'codeflow[train]' (README: CPU builds)"
        ) from e
    if text := execute(**options):
        click.echo(text)


def _model_command(name: str, module: str, parser: str, meaning: str, *first: str) -> None:
    """Add a command whose options are those of `python -m module`, which GPU machines use."""

    @cli.command(
        name,
        help=meaning,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> int:
        make = getattr(importlib.import_module("codeflow.train.arguments"), parser)
        try:
            options = make("codeflow" if first else f"codeflow {name}").parse_args(
                [*first, *arguments]
            )
        except SystemExit as e:  # --help, or what was typed is wrong and argparse has said how
            return int(e.code or 0)
        try:
            execute = importlib.import_module(module).execute
        except ModuleNotFoundError as e:
            raise CodeflowError(
                f"{name} needs {e.name}: pip install 'codeflow[train]' (README: CPU builds)"
            ) from e
        return int(execute(options))


_EVALUATE, _GENERATE, _HF = (f"codeflow.train.{m}" for m in ("evaluate", "generate", "hf"))
_model_command("evaluate", _EVALUATE, "evaluation", "Loss of a model by kind and role.")
_model_command("generate", _GENERATE, "generation", "Continue a prompt with a model.")
_model_command("export", _HF, "conversion", "A checkpoint for transformers or vLLM.", "export")
_model_command("import", _HF, "conversion", "A Llama or LoopCoder to train from.", "import")


# -- one build ------------------------------------------------------------------------------------


def _build_from_list(
    until: str, *, repos: Path, out: AnyPath, limit: int | None, recipe_path: Path | None,
    overrides: tuple[str, ...], **options: Any,
) -> int:  # fmt: skip
    from codeflow.mine.sources import read_sources

    sources = read_sources(repos)[:limit]
    return _build(out, sources, until, recipe_path, overrides, **options)


def _build(
    root: AnyPath,
    sources: Any,
    until: str,
    recipe_path: Path | None,
    overrides: tuple[str, ...],
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    workers: int | None,
    **options: Any,
) -> int:
    from codeflow.dataset import Dataset
    from codeflow.pipeline import RunOptions, build
    from codeflow.report.progress import make_progress
    from codeflow.report.summary import render, summarize

    run = RunOptions(workers=workers or _cores(), **options)
    chosen = _resolve_recipe(root, recipe_path, overrides)
    if dry_run:
        return _print_plan(root, chosen, sources, run, until, as_json)
    dataset = Dataset.open(root) if sources is None else Dataset.create(root)
    listed = len(sources if sources is not None else dataset.stored_sources() or [])
    with contextlib.closing(make_progress(quiet or as_json)) as progress:
        progress.note(_headline(chosen, listed, run))
        result = build(root, chosen, sources, progress, run, until)
    summary = summarize(dataset, chosen)
    if as_json:
        tally = {"units_run": result.ran, "units_skipped": result.skipped}
        click.echo(json.dumps(summary.as_json() | tally))
        return result.exit_code
    if result.ran == 0:
        click.echo(f"nothing to do: all {result.skipped} units are up to date", err=True)
    click.echo(render(summary, chosen))
    if result.quarantined:
        units = "1 unit" if len(result.quarantined) == 1 else f"{len(result.quarantined):,} units"
        click.echo(f"{units} failed; once the cause is gone: same command with --failed", err=True)
    if until == "pack":
        click.echo(f"next: codeflow verify {root}   codeflow show {root} row:0   "
                   f"codeflow train --shards {root} --out run/")  # fmt: skip
    return result.exit_code


def _resolve_recipe(root: AnyPath, path: Path | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe named, else the dataset's own, else the built-in one; with overrides applied."""
    from codeflow.dataset import Dataset
    from codeflow.recipe import load_recipe, override_recipe

    if path is None and Dataset.exists(root):
        stored = Dataset.open(root).stored_recipe()
        if stored is not None:
            return override_recipe(stored, overrides)
    return load_recipe(path, overrides)


def _print_plan(
    root: AnyPath, recipe: Recipe, sources: Any, run: RunOptions, until: str, as_json: bool
) -> int:
    import dataclasses

    from codeflow.pipeline import plan, some_names
    from codeflow.steps import STEPS

    planned = plan(root, recipe, sources, run)
    last = max(i for i, s in enumerate(STEPS) if s.stage == until)
    planned = dataclasses.replace(
        planned, steps={s.name: planned.steps[s.name] for s in STEPS[: last + 1]}
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(planned)))
        return 0
    for name, step in planned.steps.items():
        bound = "" if step.bound == "exactly" else step.bound
        click.echo(f"{name:<10} {bound:>7} {step.to_run:>6} to run {step.done:>6} done")
    for names, what in ((planned.added, "added"), (planned.removed, "removed with all their data")):
        if names:
            click.echo(f"repositories {what}: {len(names):,} ({some_names(names)})")
    return 0


def _headline(recipe: Recipe, repositories: int, run: RunOptions) -> str:
    how = {
        "inline": "inline",
        "ray": f"ray at {run.address}" if run.address else "ray",
    }.get(run.executor, f"{run.executor}, {run.workers} workers")
    plural = "repository" if repositories == 1 else "repositories"
    return (
        f"codeflow {__version__} · recipe {recipe.name}@{recipe.hash[:8]} · "
        f"{repositories} {plural} · {how}"
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
