"""Odd but honest repositories: what the miner does with each is settled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from repo_builder import EXECUTABLE, GITLINK, LINK, WIDE, Repo, git, mine, objects_of, text

from codeflow.mine.triple import Prover, net_change
from codeflow.recipe import MineSettings

STEP = WIDE | {"max_commits": 1}


def test_an_executable_bit_alone_is_no_triple_but_goes_with_one(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    a, b = b"a\n", text("b", 5)
    repo.chain({b"a": a, b"b": b}, {b"a": (EXECUTABLE, a), b"b": b}, {b"a": a, b"b": b + b"c\n"})
    (triple,) = mine(repo.path, tmp_path / "data", **STEP).rows("triples")
    assert triple["old_position"] == 1
    assert b"old mode 100755\nnew mode 100644\n" in triple["patch"]


def test_an_empty_commit_is_a_step_without_a_triple(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"a": b"1\n"}, {b"a": b"1\n"}, {b"a": b"2\n"})
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["old_position"] for t in result.rows("triples")] == [1]
    assert len(result.rows("commits")) == 3


def test_a_root_commit_is_never_r_new(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"a": text("a", 30)})
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert result.rows("triples") == []
    assert result.counts["mined"] == 1


def test_an_octopus_is_the_change_against_its_first_parent(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    (root,) = repo.chain({b"a": b"1\n"})
    sides = [
        repo.commit({b"a": b"1\n", name: b"x\n"}, [root], b"side\n", head=False)
        for name in (b"s1", b"s2", b"s3")
    ]
    merged = {b"a": b"1\n", b"s1": b"x\n", b"s2": b"x\n", b"s3": b"x\n"}
    octopus = repo.commit(merged, [root, *sides], b"octopus\n")
    result = mine(repo.path, tmp_path / "data", **STEP)
    (triple,) = result.rows("triples")
    assert (triple["old_commit"], triple["new_commit"], triple["n_files"]) == (root, octopus, 3)
    commits = {c["commit"]: c for c in result.rows("commits")}
    assert commits.keys() == {root, octopus, *sides}
    assert [c["on_mainline"] for c in commits.values()] == [True, False, False, False, True]
    assert commits[octopus]["is_merge"]
    assert {commits[s]["position"] for s in sides} == {1}


def test_dates_do_not_order_anything(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    commits: list[str] = []
    for i, seconds in enumerate((5, 10**18, -(10**5), 3, 0)):
        author = b"A <a@b> %d +9999" % seconds
        commits.append(repo.commit({b"a": b"%d\n" % i}, commits[-1:], b"m\n", author=author))
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [t["new_commit"] for t in result.rows("triples")] == commits[1:]
    assert [c["author_time"] for c in result.rows("commits")] == [5, 10**18, -(10**5), 3, 0]


def test_messages_and_authors_of_every_kind_are_stored(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    one = repo.commit({b"a": b"1\n"}, [], b"nul\0 in it\n", author=b"no brackets at all")
    two = repo.commit({b"a": b"2\n"}, [one], rb"\ud800", headers=b"encoding unicode_escape\n")
    repo.commit({b"a": b"3\n"}, [two], b"caf\xe9\n", headers=b"encoding bogus\n")
    rows = mine(repo.path, tmp_path / "data", **STEP).rows("commits")
    assert [r["message"] for r in rows] == ["nul\0 in it\n", r"\ud800", "caf\ufffd\n"]
    assert [r["message_raw"] for r in rows] == [None, rb"\ud800", b"caf\xe9\n"]


def test_a_path_that_is_not_utf8_is_kept_as_bytes(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"caf\xe9.py": b"1\n"}, {b"caf\xe9.py": b"\xe9\n"})
    result = mine(repo.path, tmp_path / "data", **STEP)
    (change,) = result.rows("changes")
    assert (change["path"], change["language"]) == (b"caf\xe9.py", "Python")
    assert b'"a/caf\\351.py"' in result.rows("triples")[0]["patch"]


def test_neither_attributes_nor_configuration_change_a_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = {b".gitattributes": b"*.py binary\n*.py -diff eol=crlf\n"}
    plain, odd = Repo(tmp_path / "plain.git"), tmp_path / "odd"
    plain.chain(*(attributes | {b"a.py": text("a", 9, i), b"b": text("b", 9, i)} for i in (0, 1)))
    git(tmp_path, "clone", "-q", str(plain.path), "odd")
    for setting in ("noprefix=true", "mnemonicPrefix=true", "context=0", "algorithm=patience"):
        git(odd, "config", "diff." + setting.split("=")[0], setting.split("=")[1])
    git(odd, "config", "core.abbrev", "20")
    (odd / ".git/info/attributes").write_text("* -diff\n")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(odd / ".git/config", home / ".gitconfig")
    first = mine(plain.path, tmp_path / "one", **STEP).rows("triples")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    second = mine(odd, tmp_path / "two", **STEP).rows("triples")
    assert first[0]["patch"] == second[0]["patch"]
    assert first[0]["patch"].startswith(b"diff --git a/a.py b/a.py\nindex ")
    assert first[0]["patch_complete"]


def test_a_local_repository_is_left_as_it_was(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"a": b"1\n"}, {b"a": b"2\n"})
    before = {p: p.stat().st_mtime_ns for p in repo.path.rglob("*")}
    mine(repo.path, tmp_path / "data", **STEP)
    assert {p: p.stat().st_mtime_ns for p in repo.path.rglob("*")} == before


def test_packed_and_loose_objects_mine_to_the_same_bytes(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*({b"a": text("a", 9, i), b"b": b"%d\n" % i} for i in range(9)))
    loose = mine(repo.path, tmp_path / "one", **WIDE)
    git(repo.path, "repack", "-q", "-a", "-d")
    git(repo.path, "prune-packed")
    packed = mine(repo.path, tmp_path / "two", **WIDE)
    assert [f.sha256 for f in loose.marker.files] == [f.sha256 for f in packed.marker.files]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (b"\0", b"\0\1", "binary"),
        (b"text\n", b"\0", "binary"),
        (b"x\n" * 600_000, b"y\n" * 600_000, "too_large"),
        ((GITLINK, "12" * 20), (GITLINK, "34" * 20), "gitlink"),
        ("text\n".encode("utf-16"), "tuxt\n".encode("utf-16"), "binary"),
    ],
)
def test_what_is_no_text_changes_by_id_only(
    tmp_path: Path, old: object, new: object, kind: str
) -> None:
    repo = Repo(tmp_path / "r.git")
    code = {b"a.py": b"1\n"}, {b"a.py": b"2\n"}
    repo.chain(*({**c, b"odd": value} for c, value in zip(code, (old, new), strict=True)))  # type: ignore[dict-item]
    result = mine(repo.path, tmp_path / "data", **STEP)
    (triple,) = result.rows("triples")
    changes = {c["path"]: c for c in result.rows("changes")}
    assert not triple["patch_complete"]
    assert (changes[b"odd"]["kind"], changes[b"odd"]["in_patch"]) == (kind, False)
    assert changes[b"a.py"]["in_patch"]
    assert b"odd" not in triple["patch"]


def test_old_group_writable_modes_survive(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain(*({b"a": (0o100664, text("a", 9, i))} for i in range(2)))
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert [c["new_mode"] for c in result.rows("changes")] == [0o100664]


def test_three_thousand_renames_stay_cheap(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    blobs = [(0o100644, repo.blob(text(f"file {i}", 8))) for i in range(3000)]
    edited = [(0o100644, repo.blob(text(f"file {i}", 8) + b"more\n")) for i in range(3000)]
    old = {b"old/%04d" % i: blob for i, blob in enumerate(blobs)}
    new = {b"new/%04d" % i: blob for i, blob in enumerate(edited)}
    trees = repo.tree(old | {b"a": b"1\n"}), repo.tree(new | {b"a": b"2\n"})
    commits = repo.chain(*trees, new | {b"a": b"3\n"})
    started = time.process_time()
    (triple,) = mine(repo.path, tmp_path / "data", **STEP).rows("triples")
    assert (triple["old_commit"], triple["n_files"]) == (commits[1], 1)
    change = net_change(objects_of(repo), *trees, MineSettings())
    Prover(objects_of(repo)).prove(*trees, change)
    assert time.process_time() - started < 10


def test_a_symlink_is_text_of_its_target_and_never_followed(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    repo.chain({b"l": (LINK, b"/etc/passwd")}, {b"l": (LINK, b"/etc/shadow")})
    result = mine(repo.path, tmp_path / "data", **STEP)
    assert {r["data"] for r in result.rows("blobs")} == {b"/etc/passwd", b"/etc/shadow"}
    assert {r["kind"] for r in result.rows("blobs")} == {"symlink"}


def test_a_moved_binary_is_a_patch_that_git_applies(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    image = b"\x89PNG\0" + bytes(range(256))
    repo.chain({b"old.png": image, b"a": b"1\n"}, {b"new.png": image, b"a": b"2\n"})
    (triple,) = mine(repo.path, tmp_path / "data", **STEP).rows("triples")
    assert triple["patch_complete"]
    assert b"rename to new.png" in triple["patch"]
    git = ["git", "-C", str(repo.path)]
    env = {**os.environ, "GIT_INDEX_FILE": str(tmp_path / "index")}
    subprocess.run([*git, "read-tree", triple["old_tree"]], env=env, check=True)
    subprocess.run([*git, "apply", "--cached"], input=triple["patch"], env=env, check=True)
    done = subprocess.run([*git, "write-tree"], env=env, check=True, capture_output=True)
    assert done.stdout.decode().strip() == triple["new_tree"]
