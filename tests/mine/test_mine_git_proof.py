"""An independent proof: git itself applies every mined patch and reads back every stored file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from repo_builder import EXECUTABLE, GITLINK, LINK, WIDE, Mined, Repo, git, mine, text

from codeflow.mine.merkle import parse_tree

Reads = dict[bytes, tuple[int, str]]


def git_applies(source: Path, index: Path, triple: dict[str, Any]) -> str:
    """The tree git gets from R_old and the patch alone."""
    env = {"GIT_INDEX_FILE": str(index), "GIT_DIR": str(source)}
    git(source, "read-tree", triple["old_tree"], **env)
    git(source, "apply", "--cached", "--whitespace=nowarn", "-", stdin=triple["patch"], **env)
    return git(source, "write-tree", **env).decode().strip()


def listed_by_git(source: Path, tree: str) -> Reads:
    found = {}
    for line in git(source, "ls-tree", "-r", "-z", tree).split(b"\0")[:-1]:
        info, _, path = line.partition(b"\t")
        mode, _, name = info.split(b" ")
        found[path] = (int(mode, 8), name.decode())
    return found


def listed_from_tables(trees: dict[str, bytes], root: str, prefix: bytes = b"") -> Reads:
    found: Reads = {}
    for name, mode, entry in parse_tree(trees[root]):
        if mode == 0o040000:
            found |= listed_from_tables(trees, entry, prefix + name + b"/")
        else:
            found[prefix + name] = (mode, entry)
    return found


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of change a tree can see, each in its own step."""
    repo = Repo(tmp_path_factory.mktemp("varied") / "r.git")
    base = {b"src/a.py": text("a", 40), b"src/b.py": text("b", 40), b"docs/x.md": b"x\n"}
    files: dict[bytes, Any] = dict(base)
    states = [dict(files)]
    for change in (
        {b"src/a.py": text("a", 40, 5), b"crlf.txt": b"one\r\ntwo\r\n"},
        {b"src/a.py": None, b"src/moved/a.py": text("a", 40, 6)},
        {b"src/b.py": (EXECUTABLE, text("b", 40))},
        {b"link": (LINK, b"../../etc/passwd"), b"no-eol": b"last line\nwithout end"},
        {b"link": b"a file now\n", b"no-eol": b"last line\nwithout end\n"},
        {b"link": (LINK, b"target\n"), b"lone\rcr": b"a\rb\rc"},
        {b'caf\xe9 "quoted"\ttab': b"\xff\xfe latin\n\x80\n", b"sep": "a\u2028b\x0cc\n".encode()},
        {b'caf\xe9 "quoted"\ttab': None, b"caf\xe9 moved": b"\xff\xfe latin\n\x80\n"},
        {b"docs/x.md": None, b"docs": b"the folder is a file\n"},
        {b"docs": None, b"docs/deep/er": b"and a folder again\n"},
        {b"empty": b"", b"binary": b"\0\1\2", b"src/b.py": text("b", 42)},
        {b"empty": b"no longer\n", b"binary": None},
        {b"late-nul": b"x" * 9000 + b"\0\n", b"sub": (GITLINK, "12" * 20), b"c": b"1\n"},
        {b"late-nul": b"y" * 9000 + b"\0\n", b"sub": (GITLINK, "34" * 20), b"c": b"2\n"},
        {b"pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
        {b"headers": b"@@ -1 +1 @@\ndiff --git a/x b/x\n--- a/x\n+++ b/x\n\\ No newline\n"},
        {b"headers": b"diff --git a/x b/x\n", b"huge": b"huge line\n" * 120_000, b"c": b"3\n"},
        {b"src/b.py": None, b"src/b.py -> c": b"b/\n", b"c": b"-- \n"},
        {b"a b": b"1\n", b"a b/c": None},
    ):
        files |= change
        files = {p: v for p, v in files.items() if v is not None}
        states.append(dict(files))
    repo.chain(*states)
    return repo.path


@pytest.fixture(scope="module", params=["varied", "sample"])
def mined(
    request: pytest.FixtureRequest,
    varied: Path,
    sample_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Mined]:
    source = varied if request.param == "varied" else sample_repository
    every_step = {"max_commits": 1} if request.param == "varied" else {"min_lines": 20}
    root = tmp_path_factory.mktemp(request.param) / "data"
    return source, mine(source, root, **WIDE | every_step)


def test_git_gets_the_same_tree_from_every_patch(mined: tuple[Path, Mined], tmp_path: Path) -> None:
    source, result = mined
    complete = [t for t in result.rows("triples") if t["patch_complete"]]
    assert len(complete) >= 10
    for triple in complete:
        assert git_applies(source, tmp_path / "index", triple) == triple["new_tree"]


def test_both_whole_states_are_read_back_from_the_tables(mined: tuple[Path, Mined]) -> None:
    source, result = mined
    trees = {r["tree"]: r["data"] for r in result.rows("trees")}
    blobs = {r["blob"]: r for r in result.rows("blobs")}
    assert len(trees) == len(result.rows("trees"))
    assert len(blobs) == len(result.rows("blobs"))
    for root in {t[k] for t in result.rows("triples") for k in ("old_tree", "new_tree")}:
        assert listed_from_tables(trees, root) == listed_by_git(source, root)
    for name, row in blobs.items():
        content = git(source, "cat-file", "blob", name)
        assert row["size"] == len(content)
        if row["kind"] in ("text", "symlink", "lfs"):
            assert row["data"] == content
        else:
            assert row["data"] is None
            assert b"\0" in content or len(content) > 1 << 20


def test_changes_and_counts_are_those_of_git(mined: tuple[Path, Mined]) -> None:
    source, result = mined
    for triple in result.rows("triples"):
        changes = result.changes(triple["triple_id"])
        options = ("diff-tree", "-r", "-z", "--no-renames", "--numstat")
        counted = git(source, *options, triple["old_tree"], triple["new_tree"])
        paths = [line.split(b"\t", 2)[2] for line in counted.split(b"\0")[:-1]]
        ours = [p for c in changes for p in {c["path"], c["old_path"] or c["path"]}]
        assert sorted(set(ours)) == sorted(set(paths))
        assert triple["lines_added"] == sum(c["lines_added"] for c in changes)
        assert triple["lines_deleted"] == sum(c["lines_deleted"] for c in changes)
        assert triple["n_files"] == len({c["path"] for c in changes})
        assert triple["patch_complete"] == all(c["in_patch"] for c in changes)
        tree = git(source, "rev-parse", triple["new_commit"] + "^{tree}").decode().strip()
        assert tree == triple["new_tree"]


def test_kinds_decide_what_a_patch_holds(varied: Path, tmp_path: Path) -> None:
    result = mine(varied, tmp_path / "data", **WIDE, max_commits=1)
    kinds: dict[bytes, set[tuple[str, bool]]] = {}
    for change in result.rows("changes"):
        kinds.setdefault(change["path"], set()).add((change["kind"], change["in_patch"]))
    assert kinds[b"binary"] == {("binary", False)}
    assert kinds[b"late-nul"] == {("binary", False)}
    assert kinds[b"sub"] == {("gitlink", False)}
    assert kinds[b"huge"] == {("too_large", False)}
    assert kinds[b"pointer"] == {("lfs", True)}
    assert kinds[b"link"] == {("symlink", True), ("text", True)}
    assert kinds[b"sep"] == {("text", True)}
    patches = b"".join(t["patch"] for t in result.rows("triples"))
    assert b"Binary files" not in patches
    assert b"Subproject" not in patches
    assert b"rename from src/a.py\nrename to src/moved/a.py" in patches
