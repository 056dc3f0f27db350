"""Git trees as values: parse, change paths, hash again.

A commit's root tree id is a Merkle hash of every path, mode and byte below it. Whoever rebuilds the
same id has rebuilt the same repository state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from codeflow.mine.objects import EMPTY_TREE, TREE, git_hash

_ENTRY = re.compile(rb"([0-7]+) ([^\0]*)\0(.{20})", re.DOTALL)
Entry = tuple[int, str]  # mode, object id
ReadTree = Callable[[str], bytes]


def parse_tree(data: bytes) -> Iterator[tuple[bytes, int, str]]:
    """`(name, mode, id)` of each entry of a raw tree.

    Raises:
        ValueError: The bytes are no tree.
    """
    at = 0
    for match in _ENTRY.finditer(data):
        if match.start() != at:
            break
        mode, name, entry = match.groups()
        yield name, int(mode, 8), entry.hex()
        at = match.end()
    if at != len(data):
        raise ValueError(f"tree is malformed at byte {at}")


def format_tree(entries: Mapping[bytes, Entry]) -> bytes:
    """Raw tree bytes in git's order: by name, folders as if their name ended in a slash."""
    order = sorted(entries, key=lambda n: n + b"/" if entries[n][0] == TREE else n)
    return b"".join(b"%o %s\0" % (entries[n][0], n) + bytes.fromhex(entries[n][1]) for n in order)


def changed_tree(read: ReadTree, root: str, edits: Mapping[bytes, Entry | None]) -> str:
    """Id of the tree that `root` becomes under `edits`.

    Args:
        read: Raw tree by id.
        root: Id of the tree to change.
        edits: New (mode, id) by full path; None removes the path. Folders left empty vanish.

    Raises:
        ValueError: A tree on the way to an edit is malformed.
    """
    return _changed(read, root, {tuple(p.split(b"/")): e for p, e in edits.items()})


def _changed(read: ReadTree, tree: str, edits: Mapping[tuple[bytes, ...], Entry | None]) -> str:
    data = b"" if tree == EMPTY_TREE else read(tree)
    entries = {n: (m, i) for n, m, i in parse_tree(data)}
    if format_tree(entries) != data:
        raise ValueError(f"tree {tree} is not one git would write: order, duplicates or modes")
    below: dict[bytes, dict[tuple[bytes, ...], Entry | None]] = {}
    # Removals first: a file may give way to a folder of the same name, and the other way round.
    for path, entry in sorted(edits.items(), key=lambda e: e[1] is not None):
        if len(path) > 1:
            below.setdefault(path[0], {})[path[1:]] = entry
        elif entry is None:
            entries.pop(path[0], None)
    for name, part in below.items():
        mode, child = entries.get(name, (0, EMPTY_TREE))
        changed = _changed(read, child if mode == TREE else EMPTY_TREE, part)
        if changed == EMPTY_TREE:
            if mode == TREE:
                del entries[name]
        else:
            entries[name] = (TREE, changed)
    for path, entry in edits.items():
        if len(path) == 1 and entry is not None:
            entries[path[0]] = entry
    return git_hash(b"tree", format_tree(entries)) if entries else EMPTY_TREE
