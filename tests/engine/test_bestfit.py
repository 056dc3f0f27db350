"""Packing against textbook best-fit-decreasing, one item after another over all rows."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.pack.bestfit import best_fit_decreasing


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Fill of each row, O(n²): each item, longest first, into the fullest row that holds it."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += length
        else:
            fills.append(length)
    return fills


def check(lengths: list[int], capacity: int) -> list[int]:
    """Fills of the rows, after checking what any packing must hold."""
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < fill <= capacity for fill in fills)
    return fills


@given(st.integers(1, 60).flatmap(
    lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))
))  # fmt: skip
def test_small_rows_are_filled_as_in_the_textbook(case: tuple[list[int], int]) -> None:
    assert Counter(check(*case)) == Counter(textbook(*case))


@given(st.lists(st.integers(1, 5000) | st.sampled_from([1023, 1024, 1025, 2048]), max_size=60))
def test_rooms_beyond_one_block_are_found(lengths: list[int]) -> None:
    assert Counter(check(lengths, 5000)) == Counter(textbook(lengths, 5000))


@given(st.lists(st.integers(1, 100), max_size=60), st.randoms(use_true_random=False))
def test_order_of_documents_changes_no_fill(lengths: list[int], rng: random.Random) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    assert Counter(check(lengths, 100)) == Counter(check(shuffled, 100))


def test_items_of_one_length_are_taken_in_index_order() -> None:
    assert best_fit_decreasing([2, 2, 2, 2, 2], 5) == [[0, 1], [2, 3], [4]]


def test_nothing_gives_no_rows() -> None:
    assert best_fit_decreasing([], 5) == []


@pytest.mark.parametrize("length", [0, -1, 6])
def test_an_item_that_no_row_holds_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"item 1 has length {length}, rows hold 1 to 5"):
        best_fit_decreasing([1, length], 5)


def test_a_hundred_thousand_documents_fill_rows_almost_whole() -> None:
    rng = random.Random(5)
    lengths = [min(32768, max(1, int(rng.lognormvariate(8.63, 1.46)))) for _ in range(100_000)]
    fills = check(lengths, 32768)
    assert sum(lengths) / (len(fills) * 32768) > 0.999
