"""Finding a repository and its head: every state a folder can be in, made by git itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from repo_builder import WIDE, Repo, git, mine, text

from codeflow.errors import RepositoryError
from codeflow.mine.refs import find_git_dir, pinned_head


@pytest.fixture
def work_tree(tmp_path: Path) -> Path:
    """A repository with a work tree, three commits and a folder `sub`."""
    path = tmp_path / "work"
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    (path / "sub").mkdir()
    for i in range(3):
        (path / "sub/a.py").write_bytes(text("a", 10, i))
        git(path, "add", ".")
        git(path, "commit", "-q", "-m", f"step {i}")
    return path


def head_of(path: Path) -> str:
    return git(path, "rev-parse", "HEAD").decode().strip()


def status(path: Path) -> str:
    with pytest.raises(RepositoryError) as error:
        pinned_head(find_git_dir(path))
    assert str(error.value)
    return error.value.status


def test_a_work_tree_and_a_bare_repository(work_tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(work_tree), "bare.git")
    for path in (work_tree, tmp_path / "bare.git"):
        assert pinned_head(find_git_dir(path)) == head_of(path)


def test_a_folder_inside_a_repository_is_no_repository(work_tree: Path) -> None:
    with pytest.raises(RepositoryError, match="sub is not a git repository"):
        find_git_dir(work_tree / "sub")


def test_an_empty_repository_and_an_unborn_branch(work_tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "other", "empty")
    assert status(tmp_path / "empty") == "empty"
    git(work_tree, "symbolic-ref", "HEAD", "refs/heads/not-there")
    assert status(work_tree) == "empty"


def test_a_detached_head_is_what_is_pinned(work_tree: Path) -> None:
    first = git(work_tree, "rev-list", "--max-parents=0", "HEAD").decode().strip()
    git(work_tree, "checkout", "-q", "--detach", first)
    assert pinned_head(find_git_dir(work_tree)) == first


def test_packed_refs(work_tree: Path) -> None:
    head = head_of(work_tree)
    git(work_tree, "tag", "-a", "-m", "peeled line", "v1")
    git(work_tree, "pack-refs", "--all")
    assert not (work_tree / ".git/refs/heads/main").exists()
    assert pinned_head(find_git_dir(work_tree)) == head
    git(work_tree, "commit", "-q", "--allow-empty", "-m", "a loose ref wins over a packed one")
    assert pinned_head(find_git_dir(work_tree)) == head_of(work_tree) != head


def test_a_linked_worktree_has_its_own_head_and_shared_objects(
    work_tree: Path, tmp_path: Path
) -> None:
    git(work_tree, "worktree", "add", "-q", "-b", "side", str(tmp_path / "linked"), "HEAD~1")
    assert (tmp_path / "linked/.git").is_file()
    found = find_git_dir(tmp_path / "linked")
    assert pinned_head(found) == head_of(tmp_path / "linked") != head_of(work_tree)
    assert found.objects.samefile(work_tree / ".git/objects")
    result = mine(tmp_path / "linked", tmp_path / "data", **WIDE)
    assert result.counts["mainline_commits"] == 2


def test_a_git_file_redirect(work_tree: Path, tmp_path: Path) -> None:
    head = head_of(work_tree)
    (work_tree / ".git").rename(tmp_path / "elsewhere")
    (work_tree / ".git").write_text("gitdir: ../elsewhere\n")
    assert pinned_head(find_git_dir(work_tree)) == head
    (work_tree / ".git").write_text("gitdir: ../nowhere\n")
    assert status(work_tree) == "not_a_repository"
    (work_tree / ".git").write_text("anything\n")
    assert status(work_tree) == "not_a_repository"


def test_a_shallow_clone_is_refused(work_tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{work_tree}", "shallow")
    assert status(tmp_path / "shallow") == "shallow"
    git(tmp_path / "shallow", "fetch", "-q", "--unshallow")
    assert pinned_head(find_git_dir(tmp_path / "shallow")) == head_of(work_tree)


def test_grafts_are_refused(work_tree: Path) -> None:
    (work_tree / ".git/info").mkdir(exist_ok=True)
    (work_tree / ".git/info/grafts").write_text(head_of(work_tree) + "\n")
    assert status(work_tree) == "grafts"


def test_a_sha256_repository_is_refused(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--object-format=sha256", "new")
    git(tmp_path / "new", "commit", "-q", "--allow-empty", "-m", "one")
    assert status(tmp_path / "new") == "unsupported"


def test_a_reftable_is_refused(work_tree: Path) -> None:
    (work_tree / ".git/reftable").mkdir()
    assert status(work_tree) == "unsupported"


@pytest.mark.parametrize("ref", ["ref: refs/heads/loop", "ref: ../../secret", "ref: HEAD", "junk"])
def test_heads_that_lead_nowhere_end(tmp_path: Path, ref: str) -> None:
    repo = Repo(tmp_path / "r.git")
    (repo.path.parent / "secret").write_text("12" * 20)
    (repo.path / "refs/heads/loop").write_text("ref: refs/heads/loop\n")
    (repo.path / "HEAD").write_text(ref + "\n")
    assert status(repo.path) == "empty"


def test_replace_refs_are_ignored(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    one, two = repo.chain({b"a": text("a", 9)}, {b"a": text("a", 9, 1)})
    other = repo.commit({b"evil": b"1\n"}, [], b"replacement\n", head=False)
    git(repo.path, "replace", "-f", two, other)
    assert b"replacement" in git(repo.path, "cat-file", "commit", two)
    result = mine(repo.path, tmp_path / "data", **WIDE)
    assert [t["new_commit"] for t in result.rows("triples")] == [two]
    assert [c["message"] for c in result.rows("commits")] == ["step 0\n", "step 1\n"]
    assert result.rows("triples")[0]["old_commit"] == one
