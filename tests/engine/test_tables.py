"""The tables' own promises, and `schemas/`, which others read instead of Python."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from codeflow.tables import TABLES, Table, schema_json, shard_table

SCHEMAS = Path(__file__).parents[2] / "schemas"
EVERY = pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.name)


@EVERY
def test_schema_file_agrees(table: Table) -> None:
    stored = (SCHEMAS / f"{table.name}.json").read_text(encoding="utf-8")
    assert json.loads(stored) == schema_json(table), (
        "tables.py changed: run `codeflow schema --write schemas`"
    )


def test_there_is_no_other_schema_file() -> None:
    assert {p.name for p in SCHEMAS.iterdir()} == {f"{name}.json" for name in TABLES}


@EVERY
def test_every_column_has_a_meaning_and_a_plain_name(table: Table) -> None:
    assert table.meaning.endswith(".")
    assert table.row_group_rows > 0
    names = [c.name for c in table.columns]
    assert len(set(names)) == len(names)
    for column in table.columns:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", column.name)
        assert column.meaning


@EVERY
def test_arrow_schema_carries_names_types_nulls_and_meanings(table: Table) -> None:
    schema = table.schema
    assert schema.metadata[b"codeflow_table"] == table.name.encode()
    for field, column in zip(schema, table.columns, strict=True):
        assert (field.name, field.type, field.nullable) == (
            column.name,
            column.type,
            column.nullable,
        )
        assert field.metadata[b"meaning"].decode() == column.meaning
        assert field.metadata.get(b"unit", b"").decode() == column.unit


@EVERY
def test_lists_and_structs_hold_no_nulls(table: Table) -> None:
    for column in table.columns:
        if pa.types.is_list(column.type):
            assert not column.type.value_field.nullable, column.name
            if pa.types.is_struct(column.type.value_type):
                assert not any(f.nullable for f in column.type.value_type), column.name


@pytest.mark.parametrize("name", ["path", "old_path", "patch", "data", "message_raw"])
def test_bytes_of_a_repository_stay_bytes(name: str) -> None:
    found = [c for t in TABLES.values() for c in t.columns if c.name == name]
    assert found
    assert all(pa.types.is_binary(c.type) or pa.types.is_large_binary(c.type) for c in found)


def test_shards_differ_by_token_width_alone() -> None:
    narrow, wide = shard_table(pa.uint16(), 4), shard_table(pa.uint32(), 4)
    differ = [a.name for a, b in zip(narrow.columns, wide.columns, strict=True) if a != b]
    assert differ == ["input_ids"]
