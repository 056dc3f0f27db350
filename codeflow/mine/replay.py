"""Proof from the stored tables alone: R_old is whole, and R_old + P = R_new.

For every triple: each tree and text blob of R_old is stored and hashes to its id, so R_old's root
id vouches for all of it; the patch, applied in process, gives each new blob, hashed again, and its
headers name the same paths, modes and blobs as the listed changes; and the root tree rebuilt from
R_old's trees with the changed paths put in hashes to R_new's id. The repository itself is not
needed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from codeflow.mine.headers import check_header
from codeflow.mine.merkle import changed_tree, parse_tree
from codeflow.mine.objects import EMPTY_BLOB, EMPTY_TREE, GITLINK, TREE, git_hash
from codeflow.mine.patch import PatchError, apply_section, split_patch
from codeflow.storage import parse_root
from codeflow.work import Work

_STORED = ("text", "symlink", "lfs")


class States:
    """The stored objects of one repository, checked against their ids as they are loaded.

    Attributes:
        bad: What is wrong with an object, by id.
    """

    def __init__(self, work: Work) -> None:
        self.bad: dict[str, str] = {}
        self.trees: dict[str, bytes] = {}
        self.contents: dict[str, bytes] = {}
        self._known_blobs: set[str] = set()
        self._whole: set[str] = {EMPTY_TREE}
        for batch in work.batches("trees", ["tree", "data"]):
            for name, data in zip(
                batch["tree"].to_pylist(), batch["data"].to_pylist(), strict=True
            ):
                self.trees[name] = data
                if git_hash(b"tree", data) != name:
                    self.bad[name] = f"tree {name} has other content than its id says"
        changes = work.read("changes", ["old_blob", "new_blob"])
        needed = set(changes["old_blob"].to_pylist()) | set(changes["new_blob"].to_pylist())
        for batch in work.batches("blobs", ["blob", "kind", "data"]):
            columns = (batch[c].to_pylist() for c in ("blob", "kind", "data"))
            for name, kind, data in zip(*columns, strict=True):
                self._known_blobs.add(name)
                if kind in _STORED and (data is None or git_hash(b"blob", data) != name):
                    self.bad[name] = f"blob {name} has other content than its id says"
                if data is not None and name in needed:
                    self.contents[name] = data

    def tree(self, name: str) -> bytes:
        """Raw tree, as `changed_tree` wants it."""
        if name not in self.trees:
            raise ValueError(f"tree {name} is not stored")
        return self.trees[name]

    def missing_in(self, root: str) -> str | None:
        """What keeps the state with this root from being rebuilt whole; None when nothing does."""
        stack, seen = [root], []
        while stack:
            tree = stack.pop()
            if tree in self._whole:
                continue
            seen.append(tree)
            if tree in self.bad or tree not in self.trees:
                return self.bad.get(tree, f"tree {tree} is not stored")
            for _, mode, entry in parse_tree(self.trees[tree]):
                if mode == TREE:
                    stack.append(entry)
                elif mode != GITLINK and (entry in self.bad or entry not in self._known_blobs):
                    return self.bad.get(entry, f"blob {entry} is not stored")
        self._whole.update(seen)
        return None


def replay_triple(
    states: States, triple: dict[str, Any], changes: list[dict[str, Any]]
) -> str | None:
    """Prove one triple from stored data.

    Args:
        states: Stored objects of its repository.
        triple: Its row of `triples`.
        changes: Its rows of `changes`, in stored order.

    Returns:
        What is wrong, or None when R_old + P = R_new holds. Where `patch_complete` is false, files
        the patch cannot hold are taken by id.
    """
    problem = states.missing_in(triple["old_tree"]) or states.missing_in(triple["new_tree"])
    if problem is not None:
        return problem
    try:
        sections = split_patch(triple["patch"])
    except PatchError as e:
        return f"patch: {e}"
    if len(sections) != (listed := sum(c["in_patch"] for c in changes)):
        return f"patch has {len(sections)} sections, the listed changes have {listed}"
    if triple["patch_complete"] != all(c["in_patch"] for c in changes):
        return "patch_complete contradicts the listed changes"
    edits: dict[bytes, tuple[int, str] | None] = {}
    remaining = iter(sections)
    for change in changes:
        section = next(remaining) if change["in_patch"] else None
        old, new = change["old_blob"], change["new_blob"]
        if section is not None and (problem := check_header(section, change)):
            return f"{change['path']!r}: {problem}"
        if section is not None and old != new:
            try:
                result = apply_section(states.contents[old] if old else b"", section)
            except (PatchError, KeyError) as e:
                return f"{change['path']!r}: {e}"
            if git_hash(b"blob", result) != (new or EMPTY_BLOB):
                return f"{change['path']!r}: the patch leads to other content"
        if old is not None:
            edits.setdefault(change["old_path"] or change["path"], None)
        if new is not None:
            edits[change["path"]] = (change["new_mode"], new)
    try:
        rebuilt = changed_tree(states.tree, triple["old_tree"], edits)
    except ValueError as e:
        return str(e)
    if rebuilt != triple["new_tree"]:
        return f"R_new rebuilds to tree {rebuilt}, not {triple['new_tree']}"
    return None


def verify_repository(args: dict[str, Any]) -> dict[str, Any]:
    """Executor entry point: replay all triples of one repository.

    Args:
        args: `root`, `unit`, `inputs` (table -> paths relative to root).

    Returns:
        `triples`, `proven`, `complete` (with the patch alone), `problems` (triple id, what).
    """
    root = parse_root(args["root"])
    inputs = {table: [root / p for p in paths] for table, paths in args["inputs"].items()}
    work = Work(root, args["unit"], "", inputs)
    states = States(work)
    changes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for change in work.read("changes").to_pylist():
        changes[change["triple_id"]].append(change)
    problems = []
    triples = complete = 0
    for batch in work.batches("triples"):
        for triple in batch.to_pylist():
            triples += 1
            complete += triple["patch_complete"]
            problem = replay_triple(states, triple, changes[triple["triple_id"]])
            if problem is not None:
                problems.append([triple["triple_id"], problem])
    return {
        "triples": triples,
        "proven": triples - len(problems),
        "complete": complete,
        "objects": len(states.trees) + len(states.contents),
        "problems": problems,
    }
