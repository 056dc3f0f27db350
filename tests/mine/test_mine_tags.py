"""Tags read from files that anybody may have written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import Repo, git, text

from codeflow.mine.refs import GitDir, _is_ref_name, tags

ID, OTHER = "12" * 20, "34" * 20


@pytest.fixture
def bare(tmp_path: Path) -> GitDir:
    (tmp_path / "refs/tags").mkdir(parents=True)
    return GitDir(tmp_path, tmp_path)


def pack(git_dir: GitDir, *lines: str) -> None:
    (git_dir.common_dir / "packed-refs").write_text("".join(f"{line}\n" for line in lines))


def test_what_git_writes_loose_and_packed(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    first, second = repo.chain({b"a": text("a", 1)}, {b"a": text("a", 2)})
    git(repo.path, "tag", "light", first)
    git(repo.path, "tag", "rel/v1", second)
    git(repo.path, "tag", "-a", "-m", "x", "annotated", first)
    tag_object = git(repo.path, "rev-parse", "annotated").decode().strip()
    git_dir = GitDir(repo.path, repo.path)
    loose = {"light": first, "rel/v1": second, "annotated": tag_object}
    assert tags(git_dir) == loose
    git(repo.path, "pack-refs", "--all")
    assert tags(git_dir) == loose | {"annotated": first}  # peeled by git
    git(repo.path, "tag", "-f", "light", second)
    assert tags(git_dir)["light"] == second


def test_no_tags(bare: GitDir, tmp_path: Path) -> None:
    assert tags(bare) == {}
    assert tags(GitDir(tmp_path / "none", tmp_path / "none")) == {}


def test_lines_that_are_no_tags(bare: GitDir) -> None:
    pack(
        bare,
        "# pack-refs with: peeled fully-peeled sorted ",
        f"^{OTHER}",
        f"{ID} refs/heads/main",
        f"^{OTHER}",
        f"{ID} refs/tags/good",
        f"^{OTHER}",
        f"{ID} refs/tags/unpeeled",
        "^nonsense",
        "nonsense refs/tags/x",
        f"^{OTHER}",
        f"{ID[:-1]} refs/tags/short",
        f"{ID}",
        "",
    )
    assert tags(bare) == {"good": OTHER, "unpeeled": ID}


@pytest.mark.parametrize(
    "name",
    ["../../heads/x", "a/../b", "..", "a..b", ".hidden", "a/.b", "x.lock", "a//b", "/a", "a/", "",
     "a b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "@{0}", "a\x7f", "a\x1b[31m", "a."],
)  # fmt: skip
def test_names_git_would_refuse(bare: GitDir, name: str) -> None:
    pack(bare, f"{ID} refs/tags/{name}", f"^{OTHER}", f"{ID} refs/tags/good")
    assert tags(bare) == {"good": ID}


def test_files_that_are_no_tags(bare: GitDir, tmp_path: Path) -> None:
    folder = bare.common_dir / "refs/tags"
    (tmp_path / "secret").write_text(ID + "\n")
    (folder / "good").write_text(ID + "\n")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "around").symlink_to(folder)
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (folder / "symbolic").write_text("ref: refs/heads/main\n")
    (folder / "binary").write_bytes(b"\xff\0" * 99)
    (folder / "empty").write_bytes(b"")
    (folder / "x.lock").write_text(ID + "\n")
    with (folder / "endless").open("wb") as f:
        f.truncate(8 << 30)  # sparse
    assert tags(bare) == {"good": ID}


def test_a_looping_folder_and_a_packed_refs_that_is_none(bare: GitDir) -> None:
    (bare.common_dir / "packed-refs").symlink_to(bare.common_dir / "packed-refs")
    assert tags(bare) == {}
    (bare.common_dir / "packed-refs").unlink()
    (bare.common_dir / "packed-refs").mkdir()
    assert tags(bare) == {}


def test_a_huge_line_is_not_kept(bare: GitDir) -> None:
    pack(bare, f"{ID} refs/tags/{'x' * 5_000_000}", f"{ID} refs/tags/good")
    found = tags(bare)
    assert found.pop("good") == ID
    assert all(len(name) < 5000 for name in found)


@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,4}(/[a-z0-9]{1,4}){0,2}", fullmatch=True),
                       st.binary(min_size=20, max_size=20).map(bytes.hex)))  # fmt: skip
def test_packed_tags_come_back(
    tmp_path_factory: pytest.TempPathFactory, named: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    pack(GitDir(folder, folder), *(f"{i} refs/tags/{n}" for n, i in named.items()))
    assert tags(GitDir(folder, folder)) == named


@given(st.text())
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    if _is_ref_name(name):
        assert Path("/refs/tags", name).resolve().is_relative_to("/refs/tags")
        assert "\0" not in name
