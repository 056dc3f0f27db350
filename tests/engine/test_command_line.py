"""The command line: light help, exit codes, one clear message for what a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pygit2
import pytest
from engine_builds import (
    HEAVY,
    SMALL,
    codeflow,
    environment,
    fingerprint,
    make_repository,
    write_list,
)

from codeflow.cli import cli, main
from codeflow.dataset import Dataset
from codeflow.steps import STEPS

Repositories = tuple[Path, Path, Path]
OVERRIDES = [a for o in SMALL for a in ("--set", o)]


def listing(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*")}


# -- help -----------------------------------------------------------------------------------------


def test_help_of_every_command_works_and_loads_nothing_heavy() -> None:
    commands = [[], *([name] for name in cli.commands)]
    code = (
        "import sys; from codeflow.cli import cli\n"
        f"for c in {commands!r}: cli.main([*c, '--help'], standalone_mode=False)\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    usages = [line for line in done.stdout.splitlines() if line.lower().startswith("usage: ")]
    assert len(usages) == len(commands) > 8
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_and_option_explains_itself(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter


def test_help_and_version_from_a_shell() -> None:
    assert "Examples:" in codeflow("--help").stdout
    assert codeflow("--version").stdout.startswith("codeflow, version ")
    assert "Usage:" in codeflow("build", "-h").stdout


# -- what a user can get wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["buld"], "No such command 'buld'. Did you mean 'build'?"),
        (["build", "--replace-recipes"],
         "'--replace-recipe'"),
        (["build"], "Missing option '--repos'"),
        (["dedup"], "Missing argument 'DATA'"),
        (["build", "--repos", "LIST", "--out", "new", "--executor", "lokal"],
         "'lokal' is not one of 'local'"),
        (["build", "--repos", "LIST", "--out", "new", "--workers", "0"], "0 is not in the range"),
        (["build", "--repos", "absent", "--out", "new"], "no list of repositories at absent"),
        (["build", "--repos", "empty", "--out", "new"], "empty names no repository"),
        (["build", "--repos", "typo", "--out", "new"], "typo:3: `./legder.git`: no such folder"),
        (["build", "--repos", "plain", "--out", "new"], "plain:1: "),
        (["build", "--repos", ".", "--out", "new"], "cannot read the list"),
        (["build", "--repos", "LIST", "--out", "new", "--recipe", "absent.toml"],
         "cannot read recipe absent.toml"),
        (["build", "--repos", "LIST", "--out", "new", "--set", "mine.min_comits=3"],
         "Did you mean `mine.min_commits`?"),
        (["schema", "triple"], "no table `triple`. Did you mean `triples`?"),
        (["show", "DATA", "zzz"], "has the id `zzz`"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_message_exit_code_2_and_nothing_written(
    built: Path, repositories: Repositories, tmp_path: Path, arguments: list[str], message: str
) -> None:
    listed = write_list(tmp_path / "good", [repositories[1]])
    write_list(tmp_path / "empty", ["# nothing", ""])
    write_list(tmp_path / "typo", ["# mine", str(repositories[1]), "./legder.git"])
    (tmp_path / "folder").mkdir()
    write_list(tmp_path / "plain", ["./folder"])
    before = listing(tmp_path)
    replaced = {"LIST": str(listed), "DATA": str(built)}
    done = codeflow(*(replaced.get(a, a) for a in arguments), cwd=tmp_path, expect=2)
    assert message in done.stderr
    assert done.stdout == ""
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "is a file: name a folder with --out"),
        ("foreign", "is not a codeflow dataset and not empty"),
        ("/proc/codeflow", "cannot write to /proc/codeflow"),
    ],
)
def test_a_folder_that_cannot_be_used_is_exit_code_1(
    repositories: Repositories, tmp_path: Path, out: str, message: str
) -> None:
    listed = write_list(tmp_path / "list", [repositories[1]])
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    done = codeflow("build", "--repos", listed, "--out", out, cwd=tmp_path, expect=1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["dedup", "verify", "show"])
def test_commands_on_a_folder_that_is_no_dataset(tmp_path: Path, command: str) -> None:
    done = codeflow(command, tmp_path, expect=1)
    assert "is not a codeflow dataset" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_empty_and_shallow_repositories_are_named_and_the_others_built(
    repositories: Repositories, tmp_path: Path
) -> None:
    pygit2.init_repository(str(tmp_path / "hollow.git"), bare=True)
    shallow = make_repository(tmp_path / "shallow.git", 6, commits=25)
    head = str(pygit2.Repository(str(shallow)).head.target)
    (shallow / "shallow").write_text(f"{head}\n")
    bad = [tmp_path / "hollow.git", shallow]
    listed = write_list(tmp_path / "list", [*bad, repositories[1]])
    done = codeflow("build", "--repos", listed, "--out", tmp_path / "data", *OVERRIDES, expect=3)
    for name, reason in (("hollow", "no commit"), ("shallow", "shallow")):
        lines = [x for x in done.stdout.splitlines() if f"failed: fetch {name}-" in x]
        assert len(lines) == 1
        assert reason in lines[0]
    assert "1 mined of 3" in done.stdout
    listed = write_list(tmp_path / "bad", bad)
    done = codeflow("build", "--repos", listed, "--out", tmp_path / "none", *OVERRIDES, expect=1)
    assert "no repository could be mined:" in done.stderr


def test_another_recipe_is_refused_and_accepted_when_asked_for(
    built: Path, repositories: Repositories, tmp_path: Path
) -> None:
    out = shutil.copytree(built, tmp_path / "data")
    (tmp_path / "mine.toml").write_text("[pack]\nlength = 4096\n")
    listed = write_list(tmp_path / "list", repositories[:2])
    arguments = ["build", "--repos", listed, "--out", out, "--recipe", tmp_path / "mine.toml"]
    done = codeflow(*arguments, *OVERRIDES, expect=1)
    assert "made with recipe `default`, this is `mine`" in done.stderr
    codeflow(*arguments, *OVERRIDES, "--replace-recipe")
    assert 'name = "mine"' in codeflow("show", out, "recipe").stdout


# -- a good run -----------------------------------------------------------------------------------


def test_a_build_in_json_from_dry_run_to_nothing_to_do(
    repositories: Repositories, tmp_path: Path
) -> None:
    listed = write_list(tmp_path / "list", [*repositories[1:], "# the rest"])
    arguments = ["build", "--repos", listed, "--out", tmp_path / "data", *OVERRIDES]
    before = listing(tmp_path)
    planned = json.loads(codeflow(*arguments, "--dry-run", "--json").stdout)
    bounds = {"fetch": "exactly", **dict.fromkeys(("families", "survey"), "at most")}
    assert planned["steps"] == {
        s.name: {
            "to_run": 1 if s.scope == "dataset" else 2,
            "done": 0,
            "bound": bounds.get(s.name, "at most" if s.scope == "dataset" else "about"),
        }
        for s in STEPS
    }
    assert (planned["added"], planned["removed"]) == (["depot", "ledger"], [])
    told = codeflow(*arguments, "--dry-run").stdout
    assert "families   at most      1 to run" in told
    assert "repositories added: 2 (depot, ledger)" in told
    assert listing(tmp_path) == before
    done = codeflow(*arguments, "--json", "--workers", "2")
    summary = json.loads(done.stdout)
    assert done.stderr == ""
    assert (summary["units_run"], summary["units_skipped"], summary["mined"]) == (18, 0, 2)
    assert summary["rows"] > 0
    done = codeflow(*arguments, "--limit", "2")
    assert "nothing to do: all 18 units are up to date" in done.stderr
    assert "2 mined of 2" in done.stdout
    assert codeflow("verify", tmp_path / "data").stdout.endswith(" 0 problems\n")
    result = json.loads(codeflow("verify", tmp_path / "data", "--json").stdout)
    assert result["proven"] == result["triples"] == summary["triples"]


def test_a_shorter_list_is_announced_before_and_while_it_deletes(
    built: Path, repositories: Repositories, tmp_path: Path
) -> None:
    out = shutil.copytree(built, tmp_path / "data")
    listed = write_list(tmp_path / "list", repositories[:2])
    arguments = ["build", "--repos", listed, "--out", out, *OVERRIDES, "--limit", "1"]
    before = fingerprint(out)
    told = codeflow(*arguments, "--dry-run").stdout
    assert "repositories removed with all their data: 1 (ledger)" in told
    assert fingerprint(out) == before
    assert "1 removed with all their data: ledger" in codeflow(*arguments).stderr
    told = " ".join(codeflow("build", "--help").stdout.split())
    assert "data of repositories that are no longer listed are deleted" in told


def test_nothing_to_prove_is_said(tmp_path: Path) -> None:
    Dataset.create(tmp_path / "data")
    told = codeflow("verify", tmp_path / "data").stdout
    assert told == "no triples to prove: none was mined; 0 files checked, 0 problems\n"


def test_verify_names_the_remedy(built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "data"))
    for path in out.glob("shards/*.parquet"):
        path.unlink()
    told = codeflow("verify", out, expect=1).stderr
    assert f"that are damaged, then run `codeflow pack {out} --failed`" in told
    codeflow("pack", out, "--failed")
    assert codeflow("verify", out).stderr == ""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("pack", "interrupted; finished units are kept: run the same command to go on"),
        ("train", "interrupted; checkpoints written so far are kept: go on .* --resume"),
        ("show", "interrupted"),
    ],
)
def test_an_interruption_says_what_holds_for_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, told: str
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("codeflow.cli.cli.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["codeflow", command, "data"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert re.fullmatch(told, capsys.readouterr().err.strip())


def test_a_changed_setting_is_told_with_its_values_quoted(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "data")
    done = codeflow("compose", out, "--set", "compose.context=none")
    assert 'recipe changed: compose.context "changed" -> "none"' in done.stderr
    assert f"out of date: pack: run `codeflow pack {out}`" in done.stdout


def test_limit_takes_the_first_repositories(repositories: Repositories, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list", repositories[1:])
    arguments = ["mine", "--repos", listed, "--out", tmp_path / "data", *OVERRIDES, "--limit", "1"]
    summary = json.loads(codeflow(*arguments, "--json").stdout)
    assert (summary["repositories"], summary["stages"]) == (1, ["mine"])


def test_quiet_says_nothing_but_the_summary(repositories: Repositories, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list", [repositories[1]])
    done = codeflow("mine", "--repos", listed, "--out", tmp_path / "data", *OVERRIDES, "--quiet")
    assert done.stderr == ""
    assert "1 mined of 1" in done.stdout


def test_show_and_schema_and_recipe_print(built: Path, tmp_path: Path) -> None:
    assert "2 mined of 2" in codeflow("show", built).stdout
    assert "row 0:" in codeflow("show", built, "row:0").stdout
    assert "\x1b" not in codeflow("show", built, "row:0").stdout  # no colours into a pipe
    assert "triple_id" in codeflow("schema", "triples").stdout
    codeflow("schema", "--write", tmp_path / "schemas")
    assert (tmp_path / "schemas" / "triples.json").exists()
    printed = codeflow("show", "recipe", "--set", "pack.length=256").stdout
    (tmp_path / "own.toml").write_text(printed)
    assert codeflow("show", "recipe", "--recipe", tmp_path / "own.toml").stdout == printed


def test_a_reader_that_goes_away_is_no_traceback(built: Path) -> None:
    command = f"{sys.executable} -m codeflow show {built} decisions | head -n 0"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_a_second_run_on_a_locked_dataset_is_refused(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "data")
    with Dataset.open(out).locked():
        done = codeflow("pack", out, expect=1)
    assert "is in use by another codeflow run" in done.stderr


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, and nothing below."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_message_and_the_build_goes_on_later(
    repositories: Repositories, tmp_path: Path, tiny_disk: Path
) -> None:
    listed = write_list(tmp_path / "list", repositories)
    out = tiny_disk / "data"
    arguments = ["build", "--repos", listed, "--out", out, *OVERRIDES]
    done = codeflow(*arguments, expect=1)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "no space left on the disk" in errors[0].lower()
    assert [p for p in out.rglob("*") if ".tmp-" in p.name] == []
    assert not (out / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", str(tiny_disk)], check=True)
    codeflow(*arguments)
    codeflow(*arguments[:4], tmp_path / "elsewhere", *OVERRIDES)
    assert fingerprint(out) == fingerprint(tmp_path / "elsewhere")
