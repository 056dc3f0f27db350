"""The order of rows in an epoch: a pure function of (manifest, seed, epoch), for any world size.

Row groups are permuted and taken in windows of `WINDOW`; rows are shuffled inside their group and
the groups of a window are dealt round robin. So neighbours in the stream come from `WINDOW`
different groups, while rank r of W, which takes every W-th position, touches only `WINDOW / W`
groups of each window when W divides `WINDOW`: every group is decoded by one rank. The price is a
shuffle that is local to a window (32 M tokens at 0.5 M tokens a group), and more decoding when W
does not divide `WINDOW`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codeflow.load.manifest import Manifest

WINDOW = 64
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Where each row of an epoch lies, in the order of delivery; three arrays of (rows,).

    Attributes:
        group: Number of the row group, counted through all shards.
        row: Row inside the group.
        window: Window the group belongs to; groups of earlier windows are not needed again.
    """

    group: Ints
    row: Ints
    window: Ints


def epoch_order(manifest: Manifest, seed: int, epoch: int, *, shuffle: bool) -> EpochOrder:
    """The order of one epoch; without `shuffle`, the order in the files, the same every epoch.

    Only the raw output of the Philox generator (Salmon et al., SC 2011) is used, which numpy keeps
    stable between releases; its shuffling functions it does not.
    """
    sizes = np.array([n for s in manifest.shards for n in s.row_groups], dtype=np.int64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = np.arange(manifest.rows) - starts
    if not shuffle:
        return EpochOrder(group, row, group // WINDOW)
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    slot_of_group = np.argsort(np.argsort(bits.random_raw(len(sizes)), kind="stable"))
    shuffled = np.lexsort((bits.random_raw(manifest.rows), group))
    turn, row = row, row[shuffled]  # `group` is sorted, so shuffling inside groups keeps it
    slot = slot_of_group[group]
    order = np.lexsort((slot, turn, slot // WINDOW))
    return EpochOrder(group[order], row[order], slot[order] // WINDOW)
