"""Exact best-fit-decreasing packing of whole documents into rows.

Walks distinct lengths, longest first; each document goes into the row with the smallest room that
still holds it. Because a row just used has the smallest sufficient room again, as many copies of
one length as fit go in at once; rooms are found in a two-level bit set. Result and row count are
those of textbook best-fit-decreasing, at millions of documents per second instead of thousands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

_BLOCK_BITS = 10
_BLOCK_MASK = (1 << _BLOCK_BITS) - 1


class _Rooms:
    """Which amounts of free room exist, with the smallest one >= n found in two steps."""

    def __init__(self) -> None:
        self._blocks: defaultdict[int, int] = defaultdict(int)
        self._summary = 0

    def add(self, room: int) -> None:
        self._blocks[room >> _BLOCK_BITS] |= 1 << (room & _BLOCK_MASK)
        self._summary |= 1 << (room >> _BLOCK_BITS)

    def discard(self, room: int) -> None:
        block = room >> _BLOCK_BITS
        self._blocks[block] &= ~(1 << (room & _BLOCK_MASK))
        if not self._blocks[block]:
            self._summary &= ~(1 << block)

    def smallest(self, least: int) -> int | None:
        block, bit = least >> _BLOCK_BITS, least & _BLOCK_MASK
        found = self._blocks.get(block, 0) >> bit
        if found:
            return least + _lowest_bit(found)
        later = self._summary >> (block + 1)
        if not later:
            return None
        block += 1 + _lowest_bit(later)
        return (block << _BLOCK_BITS) + _lowest_bit(self._blocks[block])


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into rows.

    Args:
        lengths: Length of each item, 1 to `capacity` tokens.
        capacity: Room of a row, tokens.

    Returns:
        Rows as lists of item indices; each item is in exactly one row. Items of equal length are
        taken in index order, so the result depends on nothing but the arguments.

    Raises:
        ValueError: An item is empty or longer than a row.
    """
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"item {index} has length {length}, rows hold 1 to {capacity}")
        by_length[length].append(index)
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = _Rooms()
    for length in sorted(by_length, reverse=True):
        items = by_length[length]
        at = 0
        while at < len(items):
            room = rooms.smallest(length)
            if room is None:
                room, row = capacity, len(rows)
                rows.append([])
            else:
                row = with_room[room].pop()
                if not with_room[room]:
                    rooms.discard(room)
            count = min(room // length, len(items) - at)
            rows[row] += items[at : at + count]
            at += count
            left = room - count * length
            if left:
                with_room[left].append(row)
                rooms.add(left)
    return rows


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1
