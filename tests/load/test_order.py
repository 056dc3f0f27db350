from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from codeflow.load import Manifest
from codeflow.load.manifest import Shard
from codeflow.load.order import WINDOW, EpochOrder, epoch_order


def manifest(groups: list[int]) -> Manifest:
    shard = Shard(Path("x"), sum(groups), 0, 0, "", tuple(groups))
    return Manifest(Path(), "", 1, "uint16", 1, {}, 0, 0, sum(groups), "", (shard,))


def pairs(order: EpochOrder) -> list[tuple[int, int]]:
    return list(zip(order.group.tolist(), order.row.tolist(), strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=150), st.integers(0, 2**64), st.booleans())
def test_every_row_once_and_windows_in_sequence(groups: list[int], seed: int, mix: bool) -> None:
    order = epoch_order(manifest(groups), seed, 0, shuffle=mix)
    every = [(g, r) for g, n in enumerate(groups) for r in range(n)]
    assert sorted(pairs(order)) == every
    assert (np.diff(order.window) >= 0).all()
    for window in set(order.window.tolist()):
        assert len(set(order.group[order.window == window].tolist())) <= WINDOW
    if not mix:
        assert pairs(order) == every


def test_is_a_function_of_seed_and_epoch() -> None:
    m = manifest([16] * 100)
    first = pairs(epoch_order(m, 3, 0, shuffle=True))
    assert first == pairs(epoch_order(m, 3, 0, shuffle=True))
    others = [pairs(epoch_order(m, s, e, shuffle=True)) for s, e in ((3, 1), (4, 0), (0, 3))]
    assert all(first != other for other in others)


def test_order_is_stable_between_releases() -> None:
    """Resuming an old run needs the old order: a change here must be a new state version."""
    order = pairs(epoch_order(manifest([2, 3, 1]), 7, 2, shuffle=True))
    assert order == [(0, 1), (1, 1), (2, 0), (0, 0), (1, 2), (1, 0)]


def test_a_rank_decodes_its_share_of_the_groups_only() -> None:
    order = epoch_order(manifest([16] * 256), 0, 0, shuffle=True)
    for world in (1, 8, 64):
        mine = [set(order.group[rank::world].tolist()) for rank in range(world)]
        assert sum(map(len, mine)) == 256


def test_neighbours_come_from_different_groups() -> None:
    order = epoch_order(manifest([16] * 256), 0, 0, shuffle=True)
    assert (np.diff(order.group) != 0).all()
    rows_of_a_group = order.row[order.group == order.group[0]]
    assert sorted(rows_of_a_group.tolist()) != rows_of_a_group.tolist()
