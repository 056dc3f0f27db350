"""From packed rows to what a training step runs on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codeflow.load import PackedRow, ShardDataset
from codeflow.train import parallel
from codeflow.train.attention import Documents, to_device
from codeflow.train.loss import IGNORE
from codeflow.train.parallel import World
from codeflow.train.resolve import StagePlan


@dataclass(frozen=True)
class Batch:
    """The rows of one step that fall to this process.

    Attributes:
        passes: `(input_ids, labels, documents)` of each forward pass, on the device.
        rows: The rows themselves.
        counts: int64 (3,) on the device, over all processes: targets, tokens, tokens cropped.
        epoch: Of the data, counted from 0.
        loader: State of the stream after these rows.
    """

    passes: list[tuple[Tensor, Tensor, Documents]]
    rows: list[PackedRow]
    counts: Tensor
    epoch: int
    loader: dict[str, Any]


def batches(
    stream: ShardDataset, plan: StagePlan, micro_rows: int, world: World
) -> Iterator[Batch]:
    """The steps of a stage, without end; every process of `world` takes the same number."""
    rows = iter(stream)
    limit = plan.row_length
    while True:
        epoch = stream.epoch
        whole = list(itertools.islice(rows, plan.batch_rows // world.world_size))
        taken = [row.cropped(limit) for row in whole]
        tokens = sum(len(row.input_ids) for row in taken)
        counts = [
            sum(int((row.labels != IGNORE).sum()) for row in taken),
            tokens,
            sum(len(row.input_ids) for row in whole) - tokens,
        ]
        yield Batch(
            passes=[
                collate(taken[i : i + micro_rows], world.device)
                for i in range(0, len(taken), micro_rows)
            ],
            rows=taken,
            counts=parallel.total(to_device(torch.tensor(counts), world.device), world),
            epoch=epoch,
            loader=stream.state_dict(),
        )


def collate(
    rows: Sequence[PackedRow], device: torch.device | str
) -> tuple[Tensor, Tensor, Documents]:
    """Lay rows one after another: `(input_ids (T,), labels (T,), documents)` on the device."""
    ids = to_device(torch.cat([row.input_ids for row in rows]), device)
    labels = to_device(torch.cat([row.labels for row in rows]), device)
    return ids, labels, Documents.of([n for row in rows for n in row.doc_lens.tolist()], device)
