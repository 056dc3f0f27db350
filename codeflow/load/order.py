"""The rows of a stream and their order: a pure function of manifest, settings, seed and epoch.

Held-out rows are taken group by group, so that either part decodes next to nothing of the other.
The split knows neither seed nor epoch: what one run trains on, no other run evaluates on. Rows are
held out, not repositories: a repository may have documents in both parts.

For an epoch, row groups are permuted and taken in windows of `WINDOW`; rows are shuffled inside
their group and the groups of a window are dealt round robin. So neighbours in the stream come from
`WINDOW` different groups, while rank r of W, which takes every W-th position, touches only
`WINDOW / W` groups of each window when W divides `WINDOW`: every group is decoded by one rank. The
price is a shuffle that is local to a window (32 M tokens at 0.5 M tokens a group), and more
decoding when W does not divide `WINDOW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codeflow.errors import ShardError, did_you_mean
from codeflow.load.manifest import Manifest

WINDOW = 64
PARTS = ("train", "heldout")
_SALT = 0x48454C444F5554  # of the split only; no seed of a shuffle gives this stream
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a part in the order of the files; two arrays of (rows,).

    Attributes:
        group: Number of the row group, counted through all shards; never falls.
        row: Row inside the group.
    """

    group: Ints
    row: Ints

    def __len__(self) -> int:
        return len(self.row)


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


def part_rows(manifest: Manifest, holdout: float, part: str) -> Rows:
    """The rows of the training or of the held-out part.

    `holdout` of all rows, rounded, at least one, are held out: the rows of randomly drawn row
    groups until there are enough, of the last group some. A larger share holds out these rows and
    more. A share of 0 leaves everything in the training part.

    Args:
        manifest: Of the data.
        holdout: Share held out, from 0 to below 1.
        part: `train` or `heldout`.

    Raises:
        ShardError: A share or part that does not exist, or a part without rows.
    """
    if part not in PARTS:
        raise ShardError(f"part {part!r}: no such part. {did_you_mean(part, PARTS)}")
    if not 0 <= holdout < 1:
        raise ShardError(f"holdout {holdout}: must be a share from 0 to below 1, such as 0.05")
    rows = _all_rows([n for s in manifest.shards for n in s.row_groups])
    if holdout == 0:
        if part == "heldout":
            raise ShardError(
                f"{manifest.folder}: holdout 0 holds no rows out. Give a share such as 0.05, or "
                "read all rows with part `train`."
            )
        return rows
    bits = np.random.Philox(key=np.array([_SALT, 0], dtype=np.uint64))
    key_of_group = bits.random_raw(int(rows.group[-1]) + 1)
    drawn = np.lexsort((bits.random_raw(len(rows)), key_of_group[rows.group]))
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[drawn[: max(1, round(holdout * len(rows)))]] = True
    mine = held_out if part == "heldout" else ~held_out
    if not mine.any():
        raise ShardError(
            f"{manifest.folder}: holdout {holdout} of {len(rows)} rows leaves none to train on. "
            "Lower the share, or pack more documents."
        )
    return Rows(rows.group[mine], rows.row[mine])


def epoch_order(rows: Rows, seed: int, epoch: int, *, shuffle: bool) -> EpochOrder:
    """The order of one epoch; without `shuffle`, the order in the files, the same every epoch.

    Only the raw output of the Philox generator (Salmon et al., SC 2011) is used, which numpy keeps
    stable between releases; its shuffling functions it does not.
    """
    groups, number = np.unique(rows.group, return_inverse=True)
    if not shuffle:
        return EpochOrder(rows.group, rows.row, number // WINDOW)
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    slot_of_group = np.argsort(np.argsort(bits.random_raw(len(groups)), kind="stable"))
    shuffled = np.lexsort((bits.random_raw(len(rows)), rows.group))
    slot = slot_of_group[number]
    # How many rows of its group come before each; shuffling inside sorted groups keeps it.
    turn = np.arange(len(rows)) - np.searchsorted(rows.group, rows.group)
    order = np.lexsort((slot, turn, slot // WINDOW))
    return EpochOrder(rows.group[order], rows.row[shuffled][order], slot[order] // WINDOW)


def _all_rows(sizes: Sequence[int]) -> Rows:
    group = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.repeat(np.cumsum(sizes) - np.array(sizes), sizes)
    return Rows(group, np.arange(len(group)) - starts)
