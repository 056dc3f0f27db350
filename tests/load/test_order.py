from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.errors import ShardError
from codeflow.load import Manifest
from codeflow.load.manifest import Shard
from codeflow.load.order import WINDOW, EpochOrder, Rows, epoch_order, part_rows


def manifest(groups: list[int]) -> Manifest:
    shard = Shard(Path("x"), sum(groups), 0, 0, "", tuple(groups))
    return Manifest(Path(), "", 1, "uint16", 1, {}, 0, 0, sum(groups), "", (shard,))


def all_rows(groups: list[int]) -> Rows:
    return part_rows(manifest(groups), 0.0, "train")


def pairs(order: EpochOrder | Rows) -> list[tuple[int, int]]:
    return list(zip(order.group.tolist(), order.row.tolist(), strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=150), st.integers(0, 2**64), st.booleans())
def test_every_row_once_and_windows_in_sequence(groups: list[int], seed: int, mix: bool) -> None:
    order = epoch_order(all_rows(groups), seed, 0, shuffle=mix)
    every = [(g, r) for g, n in enumerate(groups) for r in range(n)]
    assert sorted(pairs(order)) == every
    assert (np.diff(order.window) >= 0).all()
    for window in set(order.window.tolist()):
        assert len(set(order.group[order.window == window].tolist())) <= WINDOW
    if not mix:
        assert pairs(order) == every


def test_is_a_function_of_seed_and_epoch() -> None:
    rows = all_rows([16] * 100)
    first = pairs(epoch_order(rows, 3, 0, shuffle=True))
    assert first == pairs(epoch_order(rows, 3, 0, shuffle=True))
    others = [pairs(epoch_order(rows, s, e, shuffle=True)) for s, e in ((3, 1), (4, 0), (0, 3))]
    assert all(first != other for other in others)


def test_order_is_stable_between_releases() -> None:
    """Resuming an old run needs the old order: a change here must be a new state version."""
    order = pairs(epoch_order(all_rows([2, 3, 1]), 7, 2, shuffle=True))
    assert order == [(0, 1), (1, 1), (2, 0), (0, 0), (1, 2), (1, 0)]


def test_a_rank_decodes_its_share_of_the_groups_only() -> None:
    order = epoch_order(all_rows([16] * 256), 0, 0, shuffle=True)
    for world in (1, 8, 64):
        mine = [set(order.group[rank::world].tolist()) for rank in range(world)]
        assert sum(map(len, mine)) == 256


def test_neighbours_come_from_different_groups() -> None:
    order = epoch_order(all_rows([16] * 256), 0, 0, shuffle=True)
    assert (np.diff(order.group) != 0).all()
    rows_of_a_group = order.row[order.group == order.group[0]]
    assert sorted(rows_of_a_group.tolist()) != rows_of_a_group.tolist()


SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), SHARES, SHARES)
def test_the_parts_are_disjoint_and_together_the_whole(
    groups: list[int], share: float, other: float
) -> None:
    m, rows = manifest(groups), sum(groups)
    count = max(1, round(share * rows))
    heldout = pairs(part_rows(m, share, "heldout"))
    assert len(heldout) == count
    if count == rows:
        with pytest.raises(ShardError, match="none to train on"):
            part_rows(m, share, "train")
    else:
        train = pairs(part_rows(m, share, "train"))
        assert train == sorted(train)
        assert sorted(train + heldout) == pairs(all_rows(groups))
    assert heldout == sorted(heldout)
    more = pairs(part_rows(m, max(share, other), "heldout"))
    assert set(heldout) <= set(more)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=40), SHARES)
def test_few_groups_are_in_both_parts(groups: list[int], share: float) -> None:
    m = manifest(groups)
    if round(share * sum(groups)) < sum(groups):
        parts = [set(part_rows(m, share, part).group.tolist()) for part in ("train", "heldout")]
        assert len(parts[0] & parts[1]) <= 1


@pytest.mark.parametrize(("rows", "share", "heldout"), [(20, 0.1, 2), (20, 0.01, 1), (2, 0.5, 1)])
def test_small_data_still_has_a_held_out_row(rows: int, share: float, heldout: int) -> None:
    m = manifest([rows])
    assert len(part_rows(m, share, "heldout")) == heldout
    assert len(part_rows(m, share, "train")) == rows - heldout


def test_the_split_is_stable_between_releases() -> None:
    """Rows that an old run held out must stay out of the training of a new one."""
    assert pairs(part_rows(manifest([4, 4, 4, 3]), 0.4, "heldout")) == [
        (1, 1),
        (1, 2),
        (1, 3),
        (3, 0),
        (3, 1),
        (3, 2),
    ]


@pytest.mark.parametrize(
    ("holdout", "part", "message"),
    [
        (0.1, "hold-out", "Did you mean `heldout`"),
        (1.0, "train", "share from 0 to below 1"),
        (-0.1, "train", "share from 0 to below 1"),
        (float("nan"), "train", "share from 0 to below 1"),
        (0.0, "heldout", "Give a share such as 0.05"),
        (0.9, "train", "Lower the share"),
    ],
)
def test_impossible_parts(holdout: float, part: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        part_rows(manifest([2]), holdout, part)


@pytest.mark.parametrize("part", ["train", "heldout"])
@pytest.mark.parametrize("world", [2, 8])
def test_a_rank_decodes_little_more_than_its_share_of_a_part(part: str, world: int) -> None:
    rows = part_rows(manifest([16] * 256), 0.25, part)
    order = epoch_order(rows, 0, 0, shuffle=True)
    groups = len(set(rows.group.tolist()))
    assert groups == (192 if part == "train" else 64)
    assert sum(len(set(order.group[rank::world].tolist())) for rank in range(world)) == groups
