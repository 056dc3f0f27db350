"""Every tree and blob of a set of states, each once, ordered so that versions of a file are
neighbours (then zstd stores a file's history as little more than its changes: the full states of
904 flask commits, 1,950 MB inline, take 0.9 MB).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from codeflow.mine.merkle import parse_tree
from codeflow.mine.objects import EMPTY_TREE, GITLINK, TREE, Objects


@dataclass(frozen=True)
class FirstSeen:
    """Where a blob appeared first: its path, the index of the state, its mode there."""

    path: bytes
    age: int
    mode: int


@dataclass
class Snapshot:
    """Trees by id, raw, in order of discovery; blobs by id with their first appearance."""

    trees: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, FirstSeen] = field(default_factory=dict)
    states: int = 0

    def add(self, objects: Objects, root: str) -> None:
        """Add the state with this root tree, whole or not at all. Subtrees seen cost nothing.

        Raises:
            KeyError: A tree is missing. CorruptObject: a tree is damaged.
        """
        trees: dict[str, bytes] = {}
        blobs: dict[str, FirstSeen] = {}
        stack = [(root, b"")]
        while stack:
            tree, prefix = stack.pop()
            if tree in self.trees or tree in trees or tree == EMPTY_TREE:
                continue
            data = trees[tree] = objects.tree(tree)
            for name, mode, entry in parse_tree(data):
                path = prefix + name
                if mode == TREE:
                    stack.append((entry, path + b"/"))
                elif mode != GITLINK and entry not in self.blobs and entry not in blobs:
                    blobs[entry] = FirstSeen(path, self.states, mode)
        self.trees |= trees
        self.blobs |= blobs
        self.states += 1

    def blobs_in_order(self) -> list[tuple[str, FirstSeen]]:
        """Blobs by (path, age, id)."""
        return sorted(self.blobs.items(), key=lambda b: (b[1].path, b[1].age, b[0]))
