"""Array groups and components against the obvious Python."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.dedup import groups

members = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=40)
edges = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40)
    )
)


def columns(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def plain_roots(n: int, pairs: list[tuple[int, int]]) -> list[int]:
    parent = list(range(n))

    def find(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return [find(x) for x in range(n)]


@given(members)
def test_smallest_and_mixed(rows: list[tuple[int, int]]) -> None:
    table = columns(rows)
    key, value = groups.by_key(table[:, 0].astype(np.uint64), table[:, 1])
    expected = defaultdict(set)
    for k, v in rows:
        expected[k].add(v)
    assert sorted(zip(key.tolist(), value.tolist(), strict=True)) == sorted(rows)
    assert groups.smallest(key, value).tolist() == [min(expected[k]) for k in key.tolist()]
    assert groups.in_mixed(key, value).tolist() == [len(expected[k]) > 1 for k in key.tolist()]


def test_keys_above_the_sign_bit() -> None:
    key, value = groups.by_key(
        np.array([2**64 - 1, 1, 2**64 - 1, 2**63], dtype=np.uint64), np.array([7, 8, 5, 6])
    )
    assert key.tolist() == [1, 2**63, 2**64 - 1, 2**64 - 1]
    assert groups.smallest(key, value).tolist() == [8, 6, 5, 5]


@given(members, members)
def test_pairs(rows: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    table = columns(rows)
    pairs = groups.distinct_pairs(table[:, 0], table[:, 1])
    assert list(map(tuple, pairs.tolist())) == sorted({r for r in rows if r[0] != r[1]})
    new = groups.not_in(pairs, columns(others))
    assert new.tolist() == [tuple(p) not in others for p in pairs.tolist()]


def test_pairs_of_large_nodes() -> None:
    high = 2**31 - 1
    pairs = groups.distinct_pairs(np.array([high - 1, 0]), np.array([high, high]))
    assert pairs.tolist() == [[0, high], [high - 1, high]]


@given(edges, st.randoms())
def test_components_equal_union_find_in_any_order(
    graph: tuple[int, list[tuple[int, int]]], rng: object
) -> None:
    n, pairs = graph
    expected = plain_roots(n, pairs)
    shuffled = rng.sample([p[::-1] for p in pairs], len(pairs))
    assert groups.components(n, columns(pairs)).tolist() == expected
    assert groups.components(n, columns(shuffled)).tolist() == expected


@pytest.mark.parametrize("step", [1, -1, 7919])
def test_a_long_chain_is_one_component(step: int) -> None:
    n = 50_000
    order = np.arange(n) * step % n
    chain = np.stack([order[:-1], order[1:]], axis=1)
    assert (groups.components(n, chain) == 0).all()


def test_no_nodes() -> None:
    assert groups.components(0, columns([])).tolist() == []
    assert groups.components(3, columns([])).tolist() == [0, 1, 2]
