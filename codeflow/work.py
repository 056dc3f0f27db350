"""What a unit's function is given: its inputs, a way to write tables, and nothing else.

A stage is a pure function `run(work, recipe) -> counts`. `run_unit` is what an executor calls: it
builds the `Work`, calls the stage, and commits the marker from inside the worker, so that a
finished unit survives the death of the driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from codeflow.dataset import DataFile, Dataset, Marker, remake
from codeflow.errors import DatasetError
from codeflow.recipe import recipe_from_mapping
from codeflow.storage import AnyPath, ObjectPath, parse_root, relative_name, writing
from codeflow.tables import TABLES, Table

Counts = dict[str, int]


@dataclass
class Work:
    """One unit at work.

    Attributes:
        root: The dataset.
        unit: The unit's name: a repository's id, or `all`.
        fingerprint: Identity of what is being computed; part of every file name.
        inputs: Committed input files by table, absolute, in unit order.
        facts: JSON-able values the plan passes in; a stage may add its own for later steps.
    """

    root: AnyPath
    unit: str
    fingerprint: str
    inputs: Mapping[str, Sequence[AnyPath]]
    facts: dict[str, Any] = field(default_factory=dict)
    written: list[DataFile] = field(default_factory=list)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """All rows of an input table; zero rows when no input unit wrote it."""
        return read_files(self.inputs.get(table, ()), table, columns)

    def batches(self, table: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """An input table row group by row group, for tables that need not fit into memory."""
        for path in self.inputs.get(table, ()):
            with _open_parquet(path) as file:
                for group in range(file.num_row_groups):
                    with _blaming(path):
                        rows = file.read_row_group(group, columns)
                    yield from (batch for batch in rows.to_batches() if batch.num_rows)

    def write(self, table: str, rows: pa.Table | Mapping[str, Any]) -> None:
        """Write one table of this unit, whole: an Arrow table, or columns as lists."""
        schema = TABLES[table].schema
        data = rows if isinstance(rows, pa.Table) else pa.table(dict(rows), schema=schema)
        self.write_batches(TABLES[table], f"tables/{table}/{self.unit}", data.to_batches())

    def write_batches(self, table: Table, stem: str, batches: Iterable[pa.RecordBatch]) -> DataFile:
        """Write record batches as one Parquet file named `<stem>.<fingerprint>.parquet`."""
        path = self.root / f"{stem}.{self.fingerprint[:12]}.parquet"
        rows = 0
        with writing(path) as temporary:
            with pq.ParquetWriter(temporary, table.schema, **parquet_options(table)) as writer:
                for batch in batches:
                    rows += batch.num_rows
                    writer.write_batch(batch, row_group_size=table.row_group_rows)
            record = self._record(temporary, path, table.name, rows)
        self.written.append(record)
        return record

    def write_file(self, kind: str, stem: str, suffix: str, data: bytes) -> DataFile:
        """Write a file that is no table, named `<stem>.<fingerprint><suffix>`."""
        path = self.root / f"{stem}.{self.fingerprint[:12]}{suffix}"
        with writing(path) as temporary:
            temporary.write_bytes(data)
            record = self._record(temporary, path, kind, 1)
        self.written.append(record)
        return record

    def _record(self, temporary: Path, path: AnyPath, table: str, rows: int) -> DataFile:
        with open(temporary, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        name = relative_name(path, self.root)
        return DataFile(table, name, rows, temporary.stat().st_size, sha256)


def parquet_options(table: Table) -> dict[str, Any]:
    """How codeflow writes Parquet.

    Dictionaries only on text columns: on token ids and contents they cost 38 % more bytes with
    zstd. Large pages let zstd see neighbouring versions of a file. Page checksums, because without
    them 27 of 30 flipped bits went unnoticed.
    """
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [c.name for c in table.columns if c.type == pa.string()],
        "data_page_size": 8 << 20,
        "write_page_checksum": True,
        "write_statistics": [c.name for c in table.columns if not pa.types.is_large_binary(c.type)],
        "store_schema": True,
    }


def read_files(paths: Sequence[AnyPath], table: str, columns: list[str] | None = None) -> pa.Table:
    """Concatenate Parquet files of one table, verifying page checksums.

    Raises:
        DatasetError: A file is missing or damaged; names it and how to mend it.
    """
    parts = []
    for path in paths:
        with _open_parquet(path) as file, _blaming(path):
            parts.append(file.read(columns))
    if not parts:
        schema = TABLES[table].schema
        return schema.empty_table() if columns is None else schema.empty_table().select(columns)
    return pa.concat_tables(parts)


def _open_parquet(path: AnyPath) -> pq.ParquetFile:
    with _blaming(path):
        source = path.open_input() if isinstance(path, ObjectPath) else path
        return pq.ParquetFile(source, page_checksum_verification=True)


@contextlib.contextmanager
def _blaming(path: AnyPath) -> Iterator[None]:
    """Turn what Arrow says about a damaged file into an error that names the file."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as e:
        raise DatasetError(f"{path} cannot be read ({e}): {_remedy(path)}") from e


def _remedy(path: AnyPath) -> str:
    """How to get a file of a dataset again: a unit whose file is gone is not done."""
    folder = "/shards/" if path.name.startswith("shard-") else "/tables/"
    command = remake(str(path).rpartition(folder)[0])
    if isinstance(path, ObjectPath):
        return f"run the command again; if it stays so, delete the object, then run {command}"
    return f"delete it, then run {command}" if path.exists() else f"run {command}"


def run_unit(args: dict[str, Any]) -> dict[str, Any]:
    """Executor entry point: compute one unit and commit it.

    Args:
        args: `root`, `step`, `unit`, `fingerprint`, `run` (`module:function`), `inputs` (table ->
            paths relative to root), `facts`, `recipe` (as a mapping).

    Returns:
        `counts`, as stored in the marker.
    """
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    root = parse_root(args["root"])
    inputs = {table: [root / p for p in paths] for table, paths in args["inputs"].items()}
    work = Work(root, args["unit"], args["fingerprint"], inputs, dict(args["facts"]))
    module, _, name = args["run"].partition(":")
    run = getattr(importlib.import_module(module), name)
    counts: Counts = run(work, recipe_from_mapping(args["recipe"], "recipe"))
    marker = Marker(
        args["step"],
        work.unit,
        work.fingerprint,
        files=tuple(sorted(work.written, key=lambda f: f.path)),
        counts=counts,
        facts={k: v for k, v in work.facts.items() if k not in args["facts"]},
    )
    Dataset(root).commit(marker)
    return {"counts": counts}
