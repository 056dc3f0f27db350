"""Build a small repository with a real-looking history: the input of `make demo` and of tests.

    python examples/make_sample_repository.py DIR

The history of "stockroom", an inventory service in Python, TypeScript, Go, Rust, C and Java, is
told in `sample_repository/*.txt`, read in the order of their names. A chapter is a list of steps.
A step is a line `%% VERB …` and the text below it, up to the next step:

    %% commit WHO SUBJECT      a commit on the current branch; the text is the rest of its message
    %% merge WHO BRANCH NR     a pull request merged into main; the text is its title
    %% revert WHO SUBJECT      undo the commit on this branch that has this subject
    %% on BRANCH               go to a branch; a new one starts where we stand
    anything else              a change of files in the commit above it: see `CHANGES`

Trade-off: the tale is replayed, not recorded. Edits name the text they replace, so a chapter reads
like a review, and a step that does not fit what came before it is an error, not a silent no-op.
Objects are written with libgit2 from fixed names, times and bytes; no work tree, hook, template or
git configuration takes part, so the head has the same id on every machine.
"""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pygit2

from codeflow.errors import CodeflowError, UsageError

CHAPTERS = Path(__file__).parent / "sample_repository"
START = 1_614_589_200  # 2021-03-01 09:00 UTC
PLAIN, EXECUTABLE, SYMLINK = 0o100644, 0o100755, 0o120000

# Name, address, time zone in minutes east of UTC.
AUTHORS = {
    "ana": ("Ana Ribeiro", "ana@stockroom.example", 0),
    "kenji": ("Kenji Mori", "kenji@stockroom.example", 540),
    "mira": ("Mira Olsen", "mira.olsen@example.org", 60),
    "priya": ("Priya Nair", "priya@example.org", 330),
    "sam": ("Sam Whitfield", "sam@example.com", -300),
    "tomas": ("Tomáš Novák", "tomas@example.net", 120),
    "bot": ("dependabot[bot]", "49699333+dependabot[bot]@users.noreply.github.com", 0),
}


class File(NamedTuple):
    data: bytes
    mode: int = PLAIN


Files = dict[str, File]


@dataclass(frozen=True)
class Commit:
    id: pygit2.Oid
    subject: str
    files: Files
    parent: Commit | None


class Step(NamedTuple):
    """One `%%` line and the text below it; `where` (file:line) is for messages."""

    verb: str
    rest: str
    text: bytes
    where: str


class StoryError(CodeflowError):
    """A chapter has a step that does not fit; the message names its file and line."""


def build(path: Path, *, bare: bool = True) -> str:
    """Write the sample repository into `path` and return the hex id of its head.

    Args:
        path: A folder that does not exist yet or is empty.
        bare: Without a work tree; otherwise the head is checked out.

    Raises:
        UsageError: `path` is a file or holds something.
        StoryError: A chapter was edited and no longer fits together.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} is not an empty folder; name one that is empty or does not exist")
    repo = pygit2.init_repository(str(path), bare=bare, initial_head="main")
    head = _replay(repo, _read_steps())
    repo.references.create("refs/heads/main", head)
    if not bare:
        repo.checkout_head(  # type: ignore[no-untyped-call]  # pygit2 has no types for it
            strategy=pygit2.enums.CheckoutStrategy.FORCE
        )
    return str(head)


def _read_steps() -> Iterator[Step]:
    for chapter in sorted(CHAPTERS.glob("*.txt")):
        # Bytes, because `read_text` would turn a checkout's line ends into this machine's idea.
        story = chapter.read_bytes().replace(b"\r\n", b"\n").decode()
        line = 1 + story.partition("%% ")[0].count("\n")  # Above the first step is a foreword.
        for part in re.split(r"^%% ", story, flags=re.MULTILINE)[1:]:
            head, _, text = part.partition("\n")
            verb, _, rest = head.partition(" ")
            text = text.rstrip("\n") + "\n" if text.strip() else ""  # Blank lines part the steps.
            yield Step(verb, rest, text.encode(), f"{chapter.name}:{line}")
            line += part.count("\n")


def _replay(repo: pygit2.Repository, steps: Iterator[Step]) -> pygit2.Oid:
    """Play all steps; a commit is written when the step after its last change is met."""
    writer = _Writer(repo)
    for step in steps:
        try:
            writer.play(step)
        except (KeyError, ValueError) as e:
            line = f"%% {step.verb} {step.rest}"
            raise StoryError(f"{step.where}: `{line}` does not fit: {e}") from e
    return writer.finish()


class _Writer:
    """Where the replay stands: the branches, and the commit that is being told."""

    def __init__(self, repo: pygit2.Repository) -> None:
        self.repo = repo
        self.tips: dict[str, Commit] = {}
        self.branch = "main"
        self.files: Files = {}
        self.blobs: dict[bytes, pygit2.Oid] = {}
        self.pending: Callable[[], Commit] | None = None
        self.n_written = 0
        self.time = START

    def play(self, step: Step) -> None:
        if step.verb in CHANGES:
            if self.pending is None:
                raise ValueError("it belongs to no commit")
            CHANGES[step.verb](self.files, shlex.split(step.rest), step.text)
            return
        self._write_pending()
        if step.verb == "on":
            self.tips.setdefault(step.rest, self.tips[self.branch])
            self._go_to(step.rest)
        elif step.verb == "commit":
            who, _, subject = step.rest.partition(" ")
            self._begin(who, subject, step.text.decode().strip(), [])
        elif step.verb == "merge":
            who, branch, number = step.rest.split()
            self._go_to("main")
            side = self.tips.pop(branch)
            self.files = _three_way(_fork(self.tips["main"], side).files, self.files, side.files)
            subject = f"Merge pull request #{number} from {branch}"
            self._begin(who, subject, step.text.decode().strip(), [side.id])
        elif step.verb == "revert":
            who, _, subject = step.rest.partition(" ")
            undone = _find(self.tips[self.branch], subject)
            before = undone.parent.files if undone.parent else {}
            self.files = _three_way(undone.files, self.files, before)
            body = f"This reverts commit {undone.id}.\n\n{step.text.decode()}".strip()
            self._begin(who, f'Revert "{subject}"', body, [])
        else:
            raise ValueError(f"no such verb; files change by {', '.join(CHANGES)}")

    def finish(self) -> pygit2.Oid:
        self._write_pending()
        if set(self.tips) != {"main"}:
            raise StoryError(f"never merged: {', '.join(sorted(set(self.tips) - {'main'}))}")
        return self.tips["main"].id

    def _go_to(self, branch: str) -> None:
        self.branch = branch
        self.files = dict(self.tips[branch].files)

    def _begin(self, who: str, subject: str, body: str, merged: list[pygit2.Oid]) -> None:
        name, address, zone = AUTHORS[who]
        # Four hours to five days from commit to commit; the golden ratio spreads them evenly.
        self.time += 14_400 + self.n_written * 258_092 % 417_601
        author = pygit2.Signature(name, address, self.time, zone)
        message = f"{subject}\n\n{body}\n" if body else f"{subject}\n"

        def write() -> Commit:
            parent = self.tips.get(self.branch)
            if parent and parent.files == self.files:
                raise ValueError(f"the commit before it, `{subject}`, changes nothing")
            parents = [parent.id, *merged] if parent else []
            tree = self._write_tree()
            oid = self.repo.create_commit(None, author, author, message, tree, parents)
            return Commit(oid, subject, dict(self.files), parent)

        self.pending = write

    def _write_pending(self) -> None:
        if self.pending:
            self.tips[self.branch] = self.pending()
            self.pending = None
            self.n_written += 1

    def _write_tree(self) -> pygit2.Oid:
        index = pygit2.Index()
        for path, file in self.files.items():
            if file.data not in self.blobs:  # Most files are as they were: spare the disk.
                self.blobs[file.data] = self.repo.create_blob(file.data)
            mode = pygit2.enums.FileMode(file.mode)
            index.add(pygit2.IndexEntry(path, self.blobs[file.data], mode))
        return index.write_tree(self.repo)


def _three_way(base: Files, ours: Files, theirs: Files) -> Files:
    """`ours` with what changed from `base` to `theirs`, whole file by whole file."""
    merged = dict(ours)
    for path in sorted(base.keys() | theirs.keys()):
        if theirs.get(path) == base.get(path):
            continue
        if ours.get(path) != base.get(path):
            raise ValueError(f"both sides changed {path}")
        if path in theirs:
            merged[path] = theirs[path]
        else:
            del merged[path]
    return merged


def _ancestry(commit: Commit | None) -> Iterator[Commit]:
    while commit:
        yield commit
        commit = commit.parent


def _fork(main: Commit, side: Commit) -> Commit:
    known = {c.id for c in _ancestry(main)}
    return next(c for c in _ancestry(side) if c.id in known)


def _find(tip: Commit, subject: str) -> Commit:
    for commit in _ancestry(tip):
        if commit.subject == subject:
            return commit
    raise ValueError("no commit has this subject")


def _new(files: Files, args: list[str], text: bytes) -> None:
    """`new PATH`: a file with this text; a file that exists is written anew."""
    (path,) = args
    files[path] = File(text, files[path].mode if path in files else PLAIN)


def _append(files: Files, args: list[str], text: bytes) -> None:
    """`append PATH`: the text at the end."""
    (path,) = args
    file = files[path]
    files[path] = file._replace(data=file.data + _with_line_ends_of(file, text))


def _insert(files: Files, args: list[str], text: bytes) -> None:
    """`insert PATH`: the text before the last line, which closes a class or a test module."""
    (path,) = args
    *lines, last = files[path].data.splitlines(keepends=True)
    data = b"".join([*lines, _with_line_ends_of(files[path], text), last])
    files[path] = files[path]._replace(data=data)


def _edit(files: Files, args: list[str], text: bytes) -> None:
    """`edit PATH`: the text above a line `%%` becomes the text below it."""
    (path,) = args
    file = files[path]
    old, new = (_with_line_ends_of(file, part) for part in text.split(b"%%\n"))
    if (n := file.data.count(old)) != 1:
        raise ValueError(f"the old text occurs {n} times in {path}, not once")
    files[path] = file._replace(data=file.data.replace(old, new))


def _swap(files: Files, args: list[str], _text: bytes) -> None:
    """`swap GLOB OLD NEW`: a word by another, everywhere in the files of that name."""
    pattern, old, new = args
    changed = False
    for path, file in files.items():
        if fnmatchcase(path, pattern) and old.encode() in file.data:
            files[path] = file._replace(data=file.data.replace(old.encode(), new.encode()))
            changed = True
    if not changed:
        raise ValueError(f"{old!r} is nowhere in {pattern}")


def _move(files: Files, args: list[str], _text: bytes) -> None:
    """`move OLD NEW`: a file, or a folder when both end in a slash."""
    old, new = args
    moved = [p for p in files if p == old or (old.endswith("/") and p.startswith(old))]
    if not moved:
        raise ValueError(f"there is no {old}")
    for path in moved:
        files[new + path.removeprefix(old)] = files.pop(path)


def _copy(files: Files, args: list[str], _text: bytes) -> None:
    """`copy OLD NEW`."""
    old, new = args
    files[new] = files[old]


def _delete(files: Files, args: list[str], _text: bytes) -> None:
    """`delete PATH`."""
    (path,) = args
    del files[path]


def _executable(files: Files, args: list[str], _text: bytes) -> None:
    """`executable PATH`: the mode alone."""
    (path,) = args
    files[path] = files[path]._replace(mode=EXECUTABLE)


def _link(files: Files, args: list[str], _text: bytes) -> None:
    """`link PATH TARGET`: a symbolic link."""
    path, target = args
    files[path] = File(target.encode(), SYMLINK)


def _base64(files: Files, args: list[str], text: bytes) -> None:
    """`base64 PATH`: a binary file."""
    (path,) = args
    files[path] = File(base64.b64decode(text))


def _latin1(files: Files, args: list[str], text: bytes) -> None:
    """`latin1 PATH`: a file in the encoding of another age, not valid UTF-8."""
    (path,) = args
    files[path] = File(text.decode().encode("latin-1"))


def _crlf(files: Files, args: list[str], _text: bytes) -> None:
    """`crlf PATH`: Windows line ends; later steps keep them."""
    (path,) = args
    files[path] = files[path]._replace(data=files[path].data.replace(b"\n", b"\r\n"))


def _chomp(files: Files, args: list[str], _text: bytes) -> None:
    """`chomp PATH`: without the newline at the end."""
    (path,) = args
    files[path] = files[path]._replace(data=files[path].data.removesuffix(b"\n"))


def _tabs(files: Files, args: list[str], _text: bytes) -> None:
    """`tabs PATH`: indent by tabs instead of four spaces."""
    (path,) = args
    data = re.sub(
        rb"^(?: {4})+", lambda m: b"\t" * (len(m[0]) // 4), files[path].data, flags=re.MULTILINE
    )
    files[path] = files[path]._replace(data=data)


CHANGES: dict[str, Callable[[Files, list[str], bytes], None]] = {
    "new": _new,
    "append": _append,
    "insert": _insert,
    "edit": _edit,
    "swap": _swap,
    "move": _move,
    "copy": _copy,
    "delete": _delete,
    "executable": _executable,
    "link": _link,
    "base64": _base64,
    "latin1": _latin1,
    "crlf": _crlf,
    "chomp": _chomp,
    "tabs": _tabs,
}


def _with_line_ends_of(file: File, text: bytes) -> bytes:
    return text.replace(b"\n", b"\r\n") if b"\r\n" in file.data else text


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the sample repository of the demo.")
    parser.add_argument("dir", type=Path, help="an empty or new folder")
    parser.add_argument(
        "--worktree", action="store_true", help="check the head out (default: bare)"
    )
    options = parser.parse_args()
    try:
        head = build(options.dir, bare=not options.worktree)
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    repo = pygit2.Repository(str(options.dir))
    n_commits = sum(1 for _ in repo.walk(repo.head.target))
    where = options.dir.resolve()
    print(f"{where}: {n_commits} commits, head {head}")
    print(f"next: echo {shlex.quote(str(where))} > repos.txt")
    print("      codeflow build --repos repos.txt --out data/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
