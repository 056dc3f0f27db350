"""The git command as second witness, from the stored tables alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import EXECUTABLE, LINK, WIDE, Mined, Repo, mine, text

from codeflow.cli import cli
from codeflow.mine.gitproof import choose
from codeflow.tables import TABLES
from codeflow.verify import verify
from codeflow.work import Work


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Mined:
    """Renames, modes, links, odd names, an empty file, a binary; the repository is gone."""
    folder = tmp_path_factory.mktemp("gitproof")
    repo = Repo(folder / "r.git")
    base: dict[bytes, Any] = {b"src/a.py": text("a", 30), b"same/x": b"same\n", b"l": (LINK, b"x")}
    states = [base]
    for step in (
        {b"src/a.py": None, b"src/deep/b c.py": text("a", 30, 2)},
        {b"src/deep/b c.py": (EXECUTABLE, text("a", 30, 2)), b"e": b"", b"n": b"1\n"},
        {b'caf\xe9 "q"\t': b"x\r\nno end", b"l": (LINK, b"y")},
        {b"bin": b"\0\1", b"e": b"1\n"},
        {b"l": b"a file\n", b"same/x": None},
    ):
        files = states[-1] | step
        states.append({k: v for k, v in files.items() if v is not None})
    repo.chain(*states)
    result = mine(repo.path, folder / "data", **WIDE, max_commits=1)
    shutil.rmtree(repo.path)
    return result


def test_git_agrees_without_the_repository(mined: Mined) -> None:
    found = verify(mined.dataset, workers=1, executor="inline", git_sample=50)
    assert found.problems == ()
    assert (found.triples, found.proven, found.complete) == (5, 5, 4)
    assert (found.git_checked, found.git_agreed) == (4, 4)


def test_the_size_of_the_sample(mined: Mined) -> None:
    for size in (0, 1, 3):
        found = verify(mined.dataset, workers=1, executor="inline", git_sample=size)
        assert (found.git_checked, found.git_agreed) == (size, size)


def test_nothing_of_the_users_git_takes_part(
    mined: Mined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text("[apply]\n\twhitespace = error-all\n[core]\n\tbare = no\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "x")
    found = verify(mined.dataset, workers=1, executor="inline", git_sample=4)
    assert (found.problems, found.git_agreed) == ((), 4)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("damage", ["patch", "new_tree", "old_tree"])
def test_git_disagrees_with_damaged_triples(mined: Mined, tmp_path: Path, damage: str) -> None:
    shutil.copytree(mined.dataset.root, tmp_path / "data")
    broken = Mined(tmp_path / "data")
    rows = broken.rows("triples")
    row = next(r for r in rows if r["patch_complete"] and b"\n+" in r["patch"])
    if damage == "patch":
        row["patch"] = row["patch"].replace(b"\n+", b"\n+x", 1)
    else:
        row[damage] = "12" * 20
    work = Work(broken.dataset.root, broken.marker.unit, "d" * 64, {})
    work.write("triples", pa.Table.from_pylist(rows, schema=TABLES["triples"].schema))
    files = [f for f in broken.marker.files if f.table != "triples"] + work.written
    broken.dataset.commit(replace(broken.marker, files=tuple(files)))
    found = verify(broken.dataset, workers=1, executor="inline", git_sample=50)
    assert (found.git_checked, found.git_agreed) == (4, 3)
    told = [p for p in found.problems if row["triple_id"] in p and "git" in p]
    assert len(told) == 1, found.problems


def test_without_git_the_problem_says_so(
    mined: Mined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = verify(mined.dataset, workers=1, executor="inline", git_sample=1)
    assert any("no `git` command on PATH" in p for p in found.problems)


def test_on_the_command_line(mined: Mined) -> None:
    root = str(mined.dataset.root)
    done = CliRunner().invoke(cli, ["verify", root, "--workers", "1", "--sample", "git:2"])
    assert done.exit_code == 0, done.output
    assert "git itself: 2 of 2 triples" in done.output
    done = CliRunner().invoke(cli, ["verify", root, "--workers", "1", "--sample", "git", "--json"])
    assert json.loads(done.output)["git_agreed"] == 4
    for bad in ("svn", "git:", "git:0", "git:-1", "git:x"):
        done = CliRunner().invoke(cli, ["verify", root, "--sample", bad])
        assert done.exit_code == 2
        assert "write git or git:100" in done.output


TRIPLES = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 10**6).map(str)), unique=True)


@given(TRIPLES.filter(lambda t: len({i for _, i in t}) == len(t)), st.integers(0, 20), st.randoms())
def test_the_choice_is_spread_and_the_same_for_any_order(
    triples: list[tuple[str, str]], size: int, random: Any
) -> None:
    chosen = choose(triples, size)
    assert len(chosen) == min(size, len(triples))
    shuffled = list(triples)
    random.shuffle(shuffled)
    assert choose(shuffled, size) == chosen
    total = {r: sum(r == repo for repo, _ in triples) for r, _ in triples}
    taken = {r: sum(i in chosen for repo, i in triples if repo == r) for r in total}
    for repo, n in taken.items():  # nobody has two more while another still has some left
        assert all(n <= taken[o] + 1 or taken[o] == total[o] for o in total), (repo, taken)
    assert choose(triples, size) <= choose(triples, size + 1)
