"""Storage: what the whole states around every patch cost, as a share of writing them out.

Mines each repository with every mainline step of its window as a triple (and with the default
policy, whose triples span several steps), and compares

    stored    the Parquet files of the tables `blobs` and `trees`: enough to rebuild R_old and R_new
              of every triple, whole
    inline    the text of R_old and R_new of every triple, end to end, as a table with both states
              in its rows would hold it before compression

Both come from the same dataset, and `codeflow verify` proves such a dataset; sizes do not depend on
the machine, so one run is enough.

    python bench/storage.py path/to/flask.git [more repositories]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from codeflow.dataset import Dataset
from codeflow.mine.merkle import parse_tree
from codeflow.mine.objects import EMPTY_TREE, GITLINK, TREE

_CLAIM = 0.03
_TEXT = ("text", "symlink", "lfs")


def main(repositories: list[str]) -> int:
    if not repositories:
        print("name at least one local repository: python bench/storage.py flask.git")
        return 2
    met = True
    for repository in repositories:
        for policy in ("commit", "band"):
            with tempfile.TemporaryDirectory() as folder:
                dataset = mined(Path(repository).resolve(), Path(folder), policy)
                triples, inline, unique, stored = sizes(dataset)
            share = stored / inline
            met &= share <= _CLAIM
            print(
                f"{Path(repository).name:<14} {policy:<6} {triples:>5} triples: inline "
                f"{inline / 1e6:>8,.1f} MB, each file once {unique / 1e6:>6.1f} MB, stored "
                f"{stored / 1e6:>5.2f} MB = {100 * share:.3f} % (claim {100 * _CLAIM:g} %)"
            )
    return 0 if met else 1


def mined(repository: Path, folder: Path, policy: str) -> Dataset:
    listing = folder / "list.txt"
    listing.write_text(f"{repository}\n")
    command = [sys.executable, "-m", "codeflow", "mine", "--quiet", "--repos", str(listing)]
    out = folder / "data"
    options = ["--out", str(out), "--set", f"mine.policy={policy}"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return Dataset.open(out)


def sizes(dataset: Dataset) -> tuple[int, int, int, int]:
    """Triples; bytes of all their states; of each distinct file once; of the Parquet files."""
    blobs = {
        row["blob"]: row["size"]
        for row in dataset.read("blobs", ["blob", "kind", "size"]).to_pylist()
        if row["kind"] in _TEXT
    }
    trees = {row["tree"]: row["data"] for row in dataset.read("trees").to_pylist()}
    states = States(trees, blobs)
    triples = dataset.read("triples", ["old_tree", "new_tree"]).to_pylist()
    inline = sum(states.size(t["old_tree"]) + states.size(t["new_tree"]) for t in triples)
    manifest: dict[str, Any] = json.loads((dataset.root / "manifest.json").read_text())
    stored = sum(f["bytes"] for f in manifest["files"] if f["table"] in ("blobs", "trees"))
    return len(triples), inline, sum(blobs.values()), stored


class States:
    """Sizes of states; each folder is added up once, however many states share it."""

    def __init__(self, trees: dict[str, bytes], blobs: dict[str, int]) -> None:
        self._trees = trees
        self._blobs = blobs
        self._known: dict[str, int] = {EMPTY_TREE: 0}

    def size(self, tree: str) -> int:
        """Bytes of all text files below a tree."""
        if tree not in self._known:
            self._known[tree] = sum(
                self.size(entry) if mode == TREE else self._blobs.get(entry, 0)
                for _, mode, entry in parse_tree(self._trees[tree])
                if mode != GITLINK
            )
        return self._known[tree]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
