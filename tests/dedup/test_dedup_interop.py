"""Sketches can be handed to datasketch and taken back."""

from __future__ import annotations

import itertools
import random
import sys
import types
from collections import defaultdict

import dedup_triples as make
import numpy as np
import pytest

from codeflow.dedup import cfmh1, interop, keys
from codeflow.errors import UsageError

datasketch = pytest.importorskip("datasketch")


def rows(texts: list[bytes]) -> np.ndarray:
    return cfmh1.minhash(cfmh1.shingle_sets(texts))


def test_there_and_back() -> None:
    (row,) = rows([b"a b c d e f g"])
    sketch = interop.to_datasketch(row.tobytes())
    assert interop.from_datasketch(sketch) == row.tobytes()
    assert sketch.jaccard(sketch) == 1.0


def test_converted_sketches_merge_and_grow() -> None:
    left, right = b"a b c d e f g h", b"1 2 3 4 5 6 7 8"
    sets = cfmh1.shingle_sets([left, right])
    one, two = (interop.to_datasketch(row.tobytes()) for row in cfmh1.minhash(sets))
    grown = interop.to_datasketch(cfmh1.minhash(sets)[0].tobytes())
    one.merge(two)
    for shingle in sets.of(1).tolist():
        grown.update(shingle)
    grown_at_once = interop.to_datasketch(cfmh1.minhash(sets)[0].tobytes())
    grown_at_once.update_batch(sets.of(1))
    union = cfmh1.ShingleSets(np.sort(sets.values), np.array([0, len(sets.values)]))
    expected = cfmh1.minhash(union).tobytes()
    assert [interop.from_datasketch(s) for s in (one, grown, grown_at_once)] == [expected] * 3


def test_candidates_equal_those_of_its_lsh() -> None:
    triples = make.families(random.Random(3), 80, [0.01, 0.03, 0.05, 0.08])
    matrix = rows([keys.shingle_text(keys.changed_lines(t.patch)) for t in triples])
    index = datasketch.MinHashLSH(num_perm=256, params=(cfmh1.BANDS, cfmh1.ROWS))
    sketches = [interop.to_datasketch(row.tobytes()) for row in matrix]
    for i, sketch in enumerate(sketches):
        index.insert(i, sketch)
    theirs = {(i, j) for i, sketch in enumerate(sketches) for j in index.query(sketch) if i < j}
    buckets = defaultdict(list)
    for i, hashes in enumerate(cfmh1.band_hashes(matrix).tolist()):
        for band_hash in hashes:
            buckets[band_hash].append(i)
    ours = {pair for members in buckets.values() for pair in itertools.combinations(members, 2)}
    assert len(theirs) > 300
    assert ours == theirs


@pytest.mark.parametrize("row", [b"", b"\0" * 1008])
def test_a_row_without_sketch_is_refused(row: bytes) -> None:
    with pytest.raises(UsageError, match=f"has {len(row)}"):
        interop.to_datasketch(row)


@pytest.mark.parametrize(
    "options",
    [
        {"num_perm": 128, "seed": 1, "scheme": "affine32"},
        {"num_perm": 256, "seed": 2, "scheme": "affine32"},
        {"num_perm": 256, "seed": 1, "scheme": "legacy"},
    ],
)
def test_other_sketches_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        interop.from_datasketch(datasketch.MinHash(**options))


def test_without_datasketch_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"pip install codeflow\[datasketch\]"):
        interop.to_datasketch(bytes(1024))


def test_an_old_datasketch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("datasketch")
    old.__version__ = "1.6.5"
    monkeypatch.setitem(sys.modules, "datasketch", old)
    with pytest.raises(UsageError, match=r"1\.6\.5 lacks scheme affine32"):
        interop.to_datasketch(bytes(1024))
