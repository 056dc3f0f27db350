"""What the documents of packed rows are: the `docs` column, of which only two fields are read."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Segments = tuple[tuple[str, int], ...]
"""Runs of (role, tokens) of one document, in reading order."""


def document_columns(file: pq.ParquetFile) -> list[str]:
    """Those columns of a shard that hold kinds and segments of documents.

    Leaf columns have paths such as `docs.list.element.kind`; writers differ in the two in between.
    """
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    return [
        path
        for path in paths
        if path.startswith("docs.") and path.split(".")[3:4] in (["kind"], ["segments"])
    ]


class DocumentsOfGroup:
    """Kinds and segments of the documents of a row group.

    Args:
        docs: Column of lists of structs; fields that a shard lacks are absent.

    Raises:
        pyarrow.ArrowInvalid: A kind, role or length is null.
    """

    def __init__(self, docs: pa.ListArray) -> None:
        documents: pa.StructArray = docs.values
        names = {field.name for field in documents.type}
        self._first: npt.NDArray[np.int32] = docs.offsets.to_numpy()
        self._kinds = _texts(documents.field("kind")) if "kind" in names else []
        self._runs: list[tuple[str, int]] = []
        self._first_run: npt.NDArray[np.int32] = np.zeros(len(documents) + 1, dtype=np.int32)
        if "segments" in names:
            segments: pa.ListArray = documents.field("segments")
            roles = _texts(segments.values.field("role"))
            lengths = segments.values.field("n_tokens").to_numpy()
            self._runs = list(zip(roles, lengths.tolist(), strict=True))
            self._first_run = segments.offsets.to_numpy()

    def kinds(self, row: int) -> tuple[str, ...]:
        return tuple(self._kinds[self._first[row] : self._first[row + 1]])

    def segments(self, row: int) -> tuple[Segments, ...]:
        starts = self._first_run[self._first[row] : self._first[row + 1] + 1].tolist()
        return tuple(tuple(self._runs[start:end]) for start, end in pairwise(starts))


def fit(segments: tuple[Segments, ...], doc_lens: list[int]) -> bool:
    """Whether segments are those of documents of these lengths; a document may have none."""
    return len(segments) == len(doc_lens) and all(
        not runs or (sum(n for _, n in runs) == length and min(n for _, n in runs) >= 0)
        for runs, length in zip(segments, doc_lens, strict=True)
    )


def first_tokens(segments: Segments, length: int) -> Segments:
    """The segments of a document's first `length` tokens."""
    result: list[tuple[str, int]] = []
    for role, n in segments:
        if length <= 0:
            break
        result.append((role, min(n, length)))
        length -= n
    return tuple(result)


def _texts(column: pa.StringArray) -> list[str]:
    if column.null_count:
        raise pa.ArrowInvalid(f"{column.null_count} kinds or roles are null.")
    texts: list[str] = column.to_pylist()
    return texts
