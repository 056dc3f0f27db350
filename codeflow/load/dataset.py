"""Packed rows for a training loop, read from shards in a reproducible order with exact resume.

Rows are decoded in the process that asks for them: one core delivers some hundred times what a
training step consumes, so worker processes would only add copies and unclear state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from codeflow.errors import ShardError
from codeflow.load.documents import (
    DocumentsOfGroup,
    Segments,
    document_columns,
    first_tokens,
    fit,
)
from codeflow.load.manifest import Manifest, Shard, read_manifest
from codeflow.load.order import EpochOrder, epoch_order, part_rows

IGNORE = -100
_COLUMNS = ["row_id", "input_ids", "doc_lens", "loss_runs", "n_tokens"]
_STATE_VERSION = 1
_BEFORE_PARTS: dict[str, Any] = {
    "holdout": 0.0,
    "part": "train",
}  # what states of older releases do not say


@dataclass(frozen=True, eq=False, slots=True)
class PackedRow:
    """Documents laid one after another on a token axis of length T.

    Attributes:
        row_id: Number of the row in the whole set.
        input_ids: int64 (T,).
        labels: int64 (T,), already shifted: the token to predict at each place, or -100 at the
            last token of a document and where the next token is not a training target.
        position_ids: int64 (T,), from 0 in every document.
        doc_lens: int32 (documents,), adds up to T.
        kinds: What each document is (`transition`, `snapshot`, …), as its packer named it; empty
            unless asked for.
        segments: For each document runs of (role, tokens) that add up to its length; empty for a
            document packed without them, and altogether unless asked for.
    """

    row_id: int
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    doc_lens: Tensor
    kinds: tuple[str, ...] = ()
    segments: tuple[Segments, ...] = ()

    def cropped(self, length: int) -> PackedRow:
        """The first `length` tokens; the last document may lose its end."""
        if length >= len(self.input_ids):
            return self
        ends = torch.cumsum(self.doc_lens, 0).clamp(max=length)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int32)
        lengths = lengths[lengths > 0]
        # All segments but those of the last document are whole; cropping leaves these as they are.
        segments = zip(self.segments, lengths.tolist(), strict=False)
        return PackedRow(
            self.row_id,
            self.input_ids[:length],
            self.labels[:length],
            self.position_ids[:length],
            lengths,
            self.kinds[: len(lengths)],
            tuple(first_tokens(runs, n) for runs, n in segments),
        )


class ShardDataset(IterableDataset[PackedRow]):
    """The rows of a set of shards as a stream of `PackedRow`.

    The global order depends on the manifest, the seed and the epoch alone; rank r takes every
    `world_size`-th position, so any number of ranks sees the same global batches. An iterator
    continues where the last one stopped (or where `load_state_dict` says) and a finished
    stream starts again from its first epoch. With a finite number of epochs, ranks may differ by
    one row at the end; use `epochs=None` and count steps where ranks must stay together.

    Args:
        path: Dataset folder, shards folder, manifest file, or a manifest already read.
        seed: Of the shuffle.
        shuffle: False gives the rows in file order.
        rank: Of this process.
        world_size: Number of processes that share the stream.
        epochs: How often to go through the data; None for ever.
        verify: Check the checksum of every page that is read (a fifth of the decoding time).
        holdout: Share of the rows that is held out, the same rows for every seed; see `part_rows`.
        part: `train` reads the other rows, `heldout` these.
        with_docs: Read kinds and segments of the documents, which training does not need.

    Raises:
        ShardError: Manifest or shards missing, damaged, or of another version; a part that does
            not exist or has no rows.
    """

    def __init__(
        self,
        path: str | Path | Manifest,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = 1,
        verify: bool = True,
        holdout: float = 0.0,
        part: str = "train",
        with_docs: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ShardError(f"rank {rank} of world_size {world_size}: rank counts from 0")
        self.manifest = path if isinstance(path, Manifest) else read_manifest(path)
        self.seed, self.shuffle, self.verify = seed, shuffle, verify
        self.rank, self.world_size, self.epochs = rank, world_size, epochs
        self.holdout, self.part, self.with_docs = float(holdout), part, with_docs
        self._part = part_rows(self.manifest, holdout, part)
        self._groups = [(s, i) for s in self.manifest.shards for i in range(len(s.row_groups))]
        self._position = 0  # global rows consumed by all ranks, over all epochs

    @property
    def rows(self) -> int:
        """Rows of one epoch, over all ranks."""
        return len(self._part)

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self._position // self.rows

    def __iter__(self) -> Iterator[PackedRow]:
        if get_worker_info() is not None:
            raise ShardError(
                "ShardDataset does not split rows between DataLoader worker processes; "
                "use num_workers=0 (one core decodes far more than a training step consumes)"
            )
        return self._rows()

    def _rows(self) -> Iterator[PackedRow]:
        rows = self.rows
        end = None if self.epochs is None else self.epochs * rows
        epoch, window, order = -1, -1, None
        decoded: dict[int, _Group] = {}
        while end is None or self._position + self.rank < end:
            mine = self._position + self.rank
            if order is None or mine // rows != epoch:
                epoch, window, order = mine // rows, -1, self._order(mine // rows)
            place = mine % rows
            if order.window[place] != window:
                window = order.window[place]
                decoded.clear()
            number = int(order.group[place])
            if number not in decoded:
                decoded[number] = _Group(
                    *self._groups[number], self.manifest, self.verify, self.with_docs
                )
            # Counted before the row is handed over: a state taken after `next` includes it.
            self._position += self.world_size
            yield decoded[number].row(int(order.row[place]))
        self._position = 0

    def _order(self, epoch: int) -> EpochOrder:
        return epoch_order(self._part, self.seed, epoch, shuffle=self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        """What resumes the stream exactly after the last row handed out; the same on all ranks."""
        return {
            "version": _STATE_VERSION,
            "manifest_sha256": self.manifest.sha256,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "holdout": self.holdout,
            "part": self.part,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, also with another world size than the one that saved it.

        Raises:
            ShardError: The state belongs to other shards, another part of them, another seed or
                another order.
        """
        mine, state = self.state_dict(), _BEFORE_PARTS | state
        for key in ("version", "manifest_sha256", "seed", "shuffle", "holdout", "part"):
            if state.get(key) != mine[key]:
                raise ShardError(
                    f"{self.manifest.folder}: the saved loader state has {key} "
                    f"{state.get(key)!r}, this stream {mine[key]!r}. Resume with the data and "
                    "settings of the first run, or start a new run."
                )
        self._position = int(state["position"])


class _Group:
    """One decoded row group; columns stay in their stored width until a row is asked for."""

    def __init__(
        self, shard: Shard, number: int, manifest: Manifest, verify: bool, with_docs: bool
    ) -> None:
        self._where = f"{shard.path}, row group {number}"
        self._manifest = manifest
        try:
            with pq.ParquetFile(shard.path, page_checksum_verification=verify) as file:
                columns = _COLUMNS + (document_columns(file) if with_docs else [])
                table = file.read_row_group(number, columns=columns, use_threads=False)
            column = {name: table.column(name).combine_chunks() for name in _COLUMNS}
            self._row_id = column["row_id"].to_numpy()
            self._n_tokens = column["n_tokens"].to_numpy()
            self._lists = {
                name: (column[name].offsets.to_numpy(), column[name].values.to_numpy())
                for name in ("input_ids", "doc_lens", "loss_runs")
            }
            self._docs: DocumentsOfGroup | None = None
            if "docs" in table.column_names:
                self._docs = DocumentsOfGroup(table.column("docs").combine_chunks())
        # pyarrow has no one error for damage: the class depends on which byte is wrong.
        except (pa.ArrowException, OSError, LookupError, AttributeError, UnicodeError) as e:
            raise ShardError(f"{self._where}: {_reason(e)} Copy the shard again.") from e
        if len(self._row_id) != shard.row_groups[number]:
            raise ShardError(f"{self._where}: row count differs from the manifest's. Pack again.")

    def _values(self, name: str, row: int) -> npt.NDArray[np.int64]:
        offsets, values = self._lists[name]
        part: npt.NDArray[np.int64] = values[offsets[row] : offsets[row + 1]].astype(np.int64)
        return part

    def row(self, row: int) -> PackedRow:
        ids, doc_lens = self._values("input_ids", row), self._values("doc_lens", row)
        runs = self._values("loss_runs", row)
        sums = {len(ids), int(doc_lens.sum()), int(runs.sum()), int(self._n_tokens[row])}
        if len(sums) != 1 or not len(ids) or doc_lens.min() < 1 or runs.min() < 0:
            raise ShardError(
                f"{self._where}, row {row}: input_ids, doc_lens, loss_runs and n_tokens disagree "
                f"on the number of tokens ({sorted(sums)}). Pack again."
            )
        if ids.max() >= self._manifest.vocab_size or len(ids) > self._manifest.length:
            raise ShardError(
                f"{self._where}, row {row}: a token id or the row's length is above the manifest's "
                f"(vocab_size {self._manifest.vocab_size}, length {self._manifest.length})."
            )
        kinds: tuple[str, ...] = ()
        segments: tuple[Segments, ...] = ()
        if self._docs is not None:
            kinds, segments = self._docs.kinds(row), self._docs.segments(row)
            if not fit(segments, doc_lens.tolist()) or len(kinds) not in (0, len(doc_lens)):
                raise ShardError(
                    f"{self._where}, row {row}: docs and doc_lens disagree on the documents or "
                    "their tokens. Pack again."
                )
        return PackedRow(
            row_id=int(self._row_id[row]),
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(next_token_labels(ids, doc_lens, runs)),
            position_ids=torch.from_numpy(positions(doc_lens)),
            doc_lens=torch.from_numpy(doc_lens.astype(np.int32)),
            kinds=kinds,
            segments=segments,
        )


def positions(doc_lens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions that start from 0 in every document: (documents,) lengths to (T,)."""
    starts = np.cumsum(doc_lens) - doc_lens
    return np.arange(int(doc_lens.sum())) - np.repeat(starts, doc_lens)


def next_token_labels(
    ids: npt.NDArray[np.int64], doc_lens: npt.NDArray[np.int64], runs: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Next-token targets that neither cross a document's end nor leave the training runs.

    Args:
        ids: Tokens, (T,).
        doc_lens: Lengths of the documents, adding up to T.
        runs: Alternating lengths of runs that are not (first) and are targets, adding up to T.

    Returns:
        (T,): at t the token t+1, or -100 where that is no target or begins another document.
    """
    is_target = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(is_target[1:], ids[1:], IGNORE)
    labels[np.cumsum(doc_lens) - 1] = IGNORE
    return labels


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"cannot be decoded ({text[0] if text else type(error).__name__})."
