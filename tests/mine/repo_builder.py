"""Real git repositories, built object by object, and what mining makes of them.

Raw objects are written through libgit2, so a test can say exactly which bytes a commit or tree has,
also those git itself would refuse to write.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pygit2

from codeflow.dataset import Dataset
from codeflow.mine.objects import EMPTY_TREE, Objects
from codeflow.recipe import MineSettings
from codeflow.work import read_files, run_unit

FILE, EXECUTABLE, LINK, GITLINK, FOLDER = 0o100644, 0o100755, 0o120000, 0o160000, 0o040000
AUTHOR = b"Ada <ada@example.org> 1600000000 +0100"
#: Nothing of the machine's own git configuration takes part.
GIT_ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
    "GIT_AUTHOR_DATE": "1600000000 +0000",
    "GIT_COMMITTER_DATE": "1600000000 +0000",
    "LC_ALL": "C",
}
#: The whole mainline, triples from a single changed line on.
WIDE = {"window_from": 0.0, "window_to": 1.0, "min_commits": 1, "min_lines": 1}

Files = Mapping[bytes, bytes | tuple[int, bytes | str]]


def git(folder: Path, *args: str, stdin: bytes | None = None, **env: str) -> bytes:
    """Run git in a folder; its standard output."""
    done = subprocess.run(
        ["git", "-C", str(folder), *args],
        input=stdin,
        capture_output=True,
        env=GIT_ENV | env,
        check=False,
    )
    assert done.returncode == 0, f"git {' '.join(args)}: {done.stderr.decode()}"
    return done.stdout


def text(name: str, n: int, first: int = 0) -> bytes:
    """`n` distinct lines."""
    return b"".join(b"%s line %d\n" % (name.encode(), i) for i in range(first, first + n))


class Repo:
    """A bare repository to write into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repo = pygit2.init_repository(str(path), bare=True, initial_head="main")

    def blob(self, data: bytes) -> str:
        return str(self._repo.create_blob(data))

    def raw(self, kind: pygit2.enums.ObjectType, data: bytes) -> str:
        return str(self._repo.odb.write(kind, data))

    def raw_tree(self, *entries: tuple[int, bytes, str]) -> str:
        """A tree of exactly these entries, in this order, whatever their names are."""
        data = b"".join(b"%o %s\0" % (m, n) + bytes.fromhex(i) for m, n, i in entries)
        return self.raw(pygit2.enums.ObjectType.TREE, data)

    def tree(self, files: Files) -> str:
        """A tree of whole paths. Values: content, or (mode, content), or (GITLINK, commit id)."""
        folders: dict[bytes, dict[bytes, bytes | tuple[int, bytes | str]]] = {}
        entries: list[tuple[bytes, int, bytes, str]] = []
        for path, value in files.items():
            name, slash, rest = path.partition(b"/")
            if slash:
                folders.setdefault(name, {})[rest] = value
                continue
            mode, data = value if isinstance(value, tuple) else (FILE, value)
            entries.append((name, mode, name, data if isinstance(data, str) else self.blob(data)))
        for name, below in folders.items():
            entries.append((name + b"/", FOLDER, name, self.tree(below)))
        return self.raw_tree(*(e[1:] for e in sorted(entries)))

    def commit(
        self,
        tree: str | Files,
        parents: Sequence[str] = (),
        message: bytes = b"message\n",
        *,
        author: bytes = AUTHOR,
        headers: bytes = b"",
        head: bool = True,
    ) -> str:
        """Write a raw commit; `head` moves `main` to it."""
        name = tree if isinstance(tree, str) else self.tree(tree)
        lines = [b"tree " + name.encode(), *(b"parent " + p.encode() for p in parents)]
        lines += [b"author " + author, b"committer " + AUTHOR]
        raw = b"\n".join(lines) + b"\n" + headers + b"\n" + message
        commit = self.raw(pygit2.enums.ObjectType.COMMIT, raw)
        if head:
            (self.path / "refs/heads/main").write_text(commit + "\n")
        return commit

    def chain(self, *states: str | Files) -> list[str]:
        """One commit after another."""
        commits: list[str] = []
        for i, state in enumerate(states):
            commits.append(self.commit(state, commits[-1:], b"step %d\n" % i))
        return commits

    def loose(self, name: str) -> Path:
        return self.path / "objects" / name[:2] / name[2:]

    def replace(self, name: str, kind: str, data: bytes) -> None:
        """Damage: valid zlib data, but of other content than the id says."""
        self.loose(name).chmod(0o644)
        self.loose(name).write_bytes(zlib.compress(b"%s %d\0" % (kind.encode(), len(data)) + data))


class Mined:
    """A dataset with one mined repository, in one slice."""

    def __init__(self, root: Path) -> None:
        self.dataset = Dataset.open(root)
        survey = self.dataset.marker("survey", "repo")
        assert survey is not None
        self.survey = survey
        self.unit = "repo.0000"
        self.marker = self.dataset.marker("mine", self.unit) or survey

    @property
    def counts(self) -> dict[str, int]:
        return self.survey.counts | self.marker.counts

    def table(self, name: str) -> pa.Table:
        files = {*self.survey.files, *self.marker.files}
        return read_files([self.dataset.root / f.path for f in files if f.table == name], name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table(name).to_pylist()
        return rows

    def changes(self, triple_id: str) -> list[dict[str, Any]]:
        return [c for c in self.rows("changes") if c["triple_id"] == triple_id]


def mine(source: Path, root: Path, **settings: Any) -> Mined:
    """Run the units of a local repository as far as `mine`, as an executor would."""
    dataset = Dataset.create(root)
    fingerprint = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    facts: dict[str, Any] = {
        "repo_id": "repo",
        "kind": "path",
        "location": str(source),
        "name": source.name,
        "leader": "repo",
    }

    def run(step: str, unit: str) -> None:
        run_unit(
            {
                "root": str(root),
                "step": step,
                "unit": unit,
                "fingerprint": fingerprint,
                "run": f"codeflow.mine.{'run' if step == 'mine' else step}:run",
                "inputs": {},
                "facts": facts,
                "recipe": {"mine": settings},
            }
        )
        marker = dataset.marker(step, unit)
        assert marker is not None
        facts.update(marker.facts)

    run("fetch", "repo")
    run("survey", "repo")
    for found in facts["slices"]:
        facts["slice"] = found
        run("mine", "repo.0000")
    return Mined(root)


def objects_of(repo: Repo) -> Objects:
    return Objects(repo.path / "objects", MineSettings().max_blob_bytes)


def empty_tree(repo: Repo) -> str:
    assert repo.raw_tree() == EMPTY_TREE
    return EMPTY_TREE
