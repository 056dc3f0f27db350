"""Small repositories and builds of them, shared by the tests of the engine."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pygit2

from codeflow.exec import Outcome
from codeflow.mine.sources import parse_sources
from codeflow.pipeline import BuildResult, RunOptions, build
from codeflow.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
SMALL = ("mine.min_commits=20", "tokenizer.vocab_size=1024", "pack.length=4096")
WORDS = ["order", "stock", "item", "price", "count", "label", "batch", "owner", "total", "limit"]
HEAVY = {
    "pyarrow",
    "polars",
    "pygit2",
    "torch",
    "ray",
    "numpy",
    "tokenizers",
    "tree_sitter",
    "rich",
}


class Recorder:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ran: list[tuple[str, str]] = []
        self._step = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step_started(self, step: str, *_: int) -> None:
        self._step = step

    def unit_ended(self, outcome: Outcome) -> None:
        self.ran.append((self._step, outcome.unit_id))

    def step_ended(self, step: str, counts: dict[str, int]) -> None:
        pass

    @property
    def steps(self) -> list[str]:
        return list(dict.fromkeys(step for step, _ in self.ran))


def make_repository(path: Path, seed: int, commits: int = 50) -> Path:
    """A bare repository of a package that grows by a function a commit, all its own."""
    rng = random.Random(seed)
    repo = pygit2.init_repository(str(path), bare=True)
    files: dict[str, str] = {"LICENSE": "MIT License\n"}
    parents: list[pygit2.Oid] = []
    for n in range(commits):
        name = f"module_{rng.randrange(4)}.py"
        function = "_".join(rng.sample(WORDS, 3)) + f"_{seed}_{n}"
        body = "".join(
            f"    {rng.choice(WORDS)}_{rng.randrange(99)} = {rng.choice(WORDS)} + {n}\n"
            for _ in range(rng.randrange(8, 30))
        )
        text = f"\n\ndef {function}({', '.join(WORDS)}):\n{body}    return {rng.choice(WORDS)}\n"
        files[name] = files.get(name, '"""A module."""\n') + text
        builder = repo.TreeBuilder()
        for file, content in files.items():
            builder.insert(file, repo.create_blob(content.encode()), pygit2.enums.FileMode.BLOB)
        who = pygit2.Signature("Ana", "ana@example.org", 1_600_000_000 + 3600 * n, 60)
        message = f"Compute {function} from the stock of an order\n"
        parents = [repo.create_commit("HEAD", who, who, message, builder.write(), parents)]
    return path


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, *overrides])


def run_build(
    out: Path,
    repositories: Iterable[Path],
    *overrides: str,
    options: RunOptions = RunOptions(executor="inline"),
    until: str = "pack",
) -> tuple[BuildResult, Recorder]:
    seen = Recorder()
    sources = parse_sources([str(path) for path in repositories], "list")
    return build(out, recipe(*overrides), sources, seen, options, until), seen


def fingerprint(out: Path) -> dict[str, str]:
    """sha256 of everything that is data: tables, shards, and the manifest."""
    files = [out / "manifest.json"]
    files += [p for d in ("tables", "shards") for p in (out / d).rglob("*") if p.is_file()]
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(files)
    }


def temporary_files(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if ".tmp-" in p.name]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "codeflow", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | extra


def codeflow(
    *arguments: object, cwd: Path | None = None, expect: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process and check its exit code."""
    done = subprocess.run(
        command(*arguments), env=environment(), cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    if expect is not None:
        assert done.returncode == expect, done.stdout + done.stderr
    return done


def write_list(path: Path, repositories: Sequence[Path | str]) -> Path:
    path.write_text("".join(f"{r}\n" for r in repositories))
    return path
