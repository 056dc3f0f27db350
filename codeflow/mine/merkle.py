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
Edits = Mapping[tuple[bytes, ...], Entry | None]  # by the parts of a path; None removes it


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
    return _changed(read, root, _split(edits))


class TreeSplicer:
    """`changed_tree` along a history, where the result of a step is the start of the next one.

    An edit that keeps an entry's mode is written over the entry's id, without taking the tree
    apart, and trees that were made or read lately are still there: 4x faster on redis. A name that
    looks like an entry can mislead it, so a wrong id is no proof before `changed_tree` agrees.

    Args:
        read: Raw tree by id.
        keep_bytes: Of the latest trees.
    """

    def __init__(self, read: ReadTree, keep_bytes: int = 4 << 20) -> None:
        self._read, self._room = read, keep_bytes
        self._sound: dict[str, bytes] = {}  # trees such as git writes, in order of use

    def leads_to(self, old: str, new: str, edits: Mapping[bytes, Entry | None]) -> bool:
        """Does `old` become `new` under `edits`?

        Raises:
            ValueError: A tree on the way to an edit is malformed.
        """
        if self._changed(old, _split(edits)) == new:
            return True
        return changed_tree(self._read, old, edits) == new

    def _changed(self, tree: str, edits: Edits) -> str:
        data = self._tree(tree)
        own = _own_edits(edits, lambda name: _folder_at(data, name), self._changed)
        places = [_id_at(data, e[0], n) if e is not None else -1 for n, e in own.items()]
        if min(places, default=-1) < 0:
            data = _rewritten(_sound_entries(tree, data), own)
        else:
            for at, entry in zip(places, own.values(), strict=True):
                assert entry is not None
                data = data[:at] + bytes.fromhex(entry[1]) + data[at + 20 :]
        return self._keep(git_hash(b"tree", data), data)

    def _tree(self, tree: str) -> bytes:
        data = self._sound.get(tree)
        if data is None:
            data = b"" if tree == EMPTY_TREE else self._read(tree)
            _sound_entries(tree, data)
        self._keep(tree, data)
        return data

    def _keep(self, tree: str, data: bytes) -> str:
        self._room -= len(data) - len(self._sound.pop(tree, b""))
        self._sound[tree] = data
        while self._room < 0:
            self._room += len(self._sound.pop(next(iter(self._sound))))
        return tree


def _split(edits: Mapping[bytes, Entry | None]) -> Edits:
    return {tuple(path.split(b"/")): entry for path, entry in edits.items()}


def _changed(read: ReadTree, tree: str, edits: Edits) -> str:
    entries = _sound_entries(tree, b"" if tree == EMPTY_TREE else read(tree))

    def folder(name: bytes) -> str | None:
        mode, entry = entries.get(name, (0, ""))
        return entry if mode == TREE else None

    own = _own_edits(edits, folder, lambda child, part: _changed(read, child, part))
    return git_hash(b"tree", _rewritten(entries, own))


def _own_edits(
    edits: Edits, folder: Callable[[bytes], str | None], change: Callable[[str, Edits], str]
) -> dict[bytes, Entry | None]:
    """What becomes of a tree's own entries; a changed folder is an edit of its entry.

    A file may give way to a folder of the same name, and the other way round.
    """
    own = {path[0]: entry for path, entry in edits.items() if len(path) == 1}
    below: dict[bytes, dict[tuple[bytes, ...], Entry | None]] = {}
    for path, entry in edits.items():
        if len(path) > 1:
            below.setdefault(path[0], {})[path[1:]] = entry
    for name, part in below.items():
        old = None if name in own else folder(name)
        new = change(old or EMPTY_TREE, part)
        if new != EMPTY_TREE and own.get(name) is None:
            own[name] = (TREE, new)
        elif old is not None:
            own[name] = None
    return own


def _rewritten(entries: dict[bytes, Entry], own: Mapping[bytes, Entry | None]) -> bytes:
    for name, entry in own.items():
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry
    return format_tree(entries)


def _sound_entries(tree: str, data: bytes) -> dict[bytes, Entry]:
    entries = {n: (m, i) for n, m, i in parse_tree(data)}
    if format_tree(entries) != data:
        raise ValueError(f"tree {tree} is not one git would write: order, duplicates or modes")
    return entries


def _folder_at(data: bytes, name: bytes) -> str | None:
    at = _id_at(data, TREE, name)
    return data[at : at + 20].hex() if at >= 0 else None


def _id_at(data: bytes, mode: int, name: bytes) -> int:
    """Where the id of an entry begins; -1 when there is none with this mode and name."""
    head = b"%o %s\0" % (mode, name)
    at = data.find(head)
    begins_entry = at == 0 or (at > 20 and data[at - 21] == 0)  # after the id of another
    return at + len(head) if begins_entry else -1
