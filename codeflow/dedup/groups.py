"""Groups of equal keys, star pairs and connected components, on integer arrays.

Everything here is linear in its input (sorting aside), needs no Python loop over members and gives
the same result for any order of the input.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
K = TypeVar("K", np.int64, np.uint64)


def by_key(keys: npt.NDArray[K], nodes: I64) -> tuple[npt.NDArray[K], I64]:
    """Both arrays, sorted by key: members of a group become neighbours."""
    order = np.argsort(keys, kind="stable")
    return keys[order], nodes[order]


def smallest(keys: npt.NDArray[K], values: I64) -> I64:
    """For every member, the smallest value of its group.

    Args:
        keys: Group of each member, sorted.
        values: Value of each member.
    """
    if not len(keys):
        return values
    starts = _starts(keys)
    sizes = np.diff(starts, append=len(keys))
    return np.repeat(np.minimum.reduceat(values, starts), sizes)


def in_mixed(keys: npt.NDArray[K], values: I64) -> npt.NDArray[np.bool_]:
    """For every member, whether its group (keys sorted) holds more than one value."""
    mixed: npt.NDArray[np.bool_] = smallest(keys, values) != -smallest(keys, -values)
    return mixed


def distinct_pairs(a: I64, b: I64) -> I64:
    """The distinct pairs (a_i, b_i) with a_i != b_i; shape (pairs, 2), sorted.

    Args:
        a, b: Node numbers from 0 to 2^31 - 1.
    """
    different = a != b
    packed = np.unique(a[different] << 32 | b[different])
    return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)


def not_in(pairs: I64, others: I64) -> npt.NDArray[np.bool_]:
    """For every pair, whether it is none of the others."""
    return ~np.isin(pairs[:, 0] << 32 | pairs[:, 1], others[:, 0] << 32 | others[:, 1])


def components(n: int, pairs: I64) -> I64:
    """The smallest node of each node's connected component; shape (n,).

    A union-find forest built by all pairs at once: the larger of two roots is hooked to the smaller
    one, then paths are halved until every node points at its root (Shiloach and Vishkin 1982).
    """
    root = np.arange(n, dtype=np.int64)
    a, b = pairs[:, 0], pairs[:, 1]
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(shorter := root[root], root):
            root = shorter


def _starts(keys: npt.NDArray[K]) -> I64:
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    return np.flatnonzero(first)
