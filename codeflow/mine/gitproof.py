"""The same proof by somebody else: git itself applies stored patches to stored trees.

The in-process proof shares code with the miner; this one shares none. Trees and old contents of the
chosen triples are written into a temporary bare repository, and `read-tree R_old`,
`apply --cached`, `write-tree` must give the id of R_new. It takes some 20 ms a triple and as many
files as R_old has folders, hence a sample.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codeflow.mine.merkle import parse_tree
from codeflow.mine.objects import EMPTY_TREE, TREE, git_hash
from codeflow.storage import parse_root
from codeflow.work import Work

_TRIPLE_COLUMNS = ["triple_id", "old_tree", "new_tree", "patch"]


class GitError(Exception):
    """What git said when it refused."""


def choose(candidates: Iterable[tuple[str, str]], size: int) -> set[str]:
    """A sample of triples, spread over repositories, the same for the same data.

    Args:
        candidates: (repository, triple id).
        size: Triples wanted.

    Returns:
        At most `size` ids: of every repository the first by hash, then the second, …
    """
    by_repository: dict[str, list[str]] = defaultdict(list)
    for repository, triple in candidates:
        by_repository[repository].append(triple)
    ranked = [
        (rank, _hash(triple), triple)
        for triples in by_repository.values()
        for rank, triple in enumerate(sorted(triples, key=_hash))
    ]
    return {triple for _, _, triple in sorted(ranked)[:size]}


def prove_with_git(args: dict[str, Any]) -> dict[str, Any]:
    """Executor entry point: let git replay chosen triples of one unit.

    Args:
        args: `root`, `unit`, `inputs` (table -> paths relative to root), `triples` (ids).

    Returns:
        `checked`, `agreed`, `problems` (triple id, what).
    """
    root = parse_root(args["root"])
    inputs = {table: [root / p for p in paths] for table, paths in args["inputs"].items()}
    work = Work(root, args["unit"], "", inputs)
    chosen = set(args["triples"])
    triples = [
        row
        for batch in work.batches("triples", _TRIPLE_COLUMNS)
        for row in batch.to_pylist()
        if row["triple_id"] in chosen
    ]
    problems = []
    with tempfile.TemporaryDirectory(prefix="codeflow-") as folder:
        repository = _Repository(Path(folder))
        repository.write_trees(work, {t["old_tree"] for t in triples})
        repository.write_blobs(work, _old_blobs(work, chosen))
        for triple in triples:
            try:
                tree = repository.replay(triple["old_tree"], triple["patch"])
            except GitError as e:
                problems.append([triple["triple_id"], str(e)])
                continue
            if tree != triple["new_tree"]:
                what = f"git gets tree {tree} from the patch, not {triple['new_tree']}"
                problems.append([triple["triple_id"], what])
    return {
        "checked": len(triples),
        "agreed": len(triples) - len(problems),
        "problems": problems,
    }


class _Repository:
    """A bare repository that holds what the tables say, and nothing of the machine's git."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._git = folder / "r.git"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        self._env = kept | {
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_INDEX_FILE": str(folder / "index"),
            "LC_ALL": "C",
        }
        self._run("init", "--quiet", "--bare", "--template=", str(self._git))

    def write_trees(self, work: Work, roots: set[str]) -> None:
        stored: dict[str, bytes] = {}
        for batch in work.batches("trees", ["tree", "data"]):
            names, data = batch["tree"].to_pylist(), batch["data"].to_pylist()
            stored.update(zip(names, data, strict=True))
        stack, seen = list(roots), {EMPTY_TREE}
        while stack:
            tree = stack.pop()
            if tree in seen or tree not in stored:  # git names what it misses
                continue
            seen.add(tree)
            self._write(b"tree", stored[tree])
            stack += [entry for _, mode, entry in parse_tree(stored[tree]) if mode == TREE]

    def write_blobs(self, work: Work, names: set[str]) -> None:
        for batch in work.batches("blobs", ["blob", "data"]):
            rows = zip(batch["blob"].to_pylist(), batch["data"].to_pylist(), strict=True)
            for name, data in rows:
                if name in names and data is not None:
                    self._write(b"blob", data)

    def replay(self, old_tree: str, patch: bytes) -> str:
        """The tree git gets from R_old and the patch alone."""
        self._run("read-tree", "--empty" if old_tree == EMPTY_TREE else old_tree)
        self._run("apply", "--cached", "--whitespace=nowarn", "-", stdin=patch)
        # Contents that no patch touches are not here: ids vouch for them.
        return self._run("write-tree", "--missing-ok").decode().strip()

    def _write(self, kind: bytes, data: bytes) -> None:
        """A loose object, under the id its content has, whatever the table says."""
        name = git_hash(kind, data)
        path = self._git / "objects" / name[:2] / name[2:]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.compress(b"%s %d\0" % (kind, len(data)) + data, 1))

    def _run(self, *arguments: str, stdin: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                ["git", f"--git-dir={self._git}", *arguments],
                input=stdin, capture_output=True, env=self._env, cwd=self._folder, check=False,
            )  # fmt: skip
        except FileNotFoundError as e:
            raise GitError("no `git` command on PATH") from e
        if done.returncode != 0:
            said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[0]
            raise GitError(f"git {arguments[0]}: {said}")
        return done.stdout


def _old_blobs(work: Work, triples: set[str]) -> set[str]:
    columns = ("triple_id", "old_blob")
    return {
        blob
        for batch in work.batches("changes", list(columns))
        for triple, blob in zip(*(batch[c].to_pylist() for c in columns), strict=True)
        if triple in triples and blob is not None
    }


def _hash(triple: str) -> bytes:
    return hashlib.blake2b(triple.encode(), digest_size=8).digest()
