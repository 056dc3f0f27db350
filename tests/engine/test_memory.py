"""A unit's memory does not grow with the size of its history's contents."""

from __future__ import annotations

import json
from pathlib import Path

import pygit2
import pytest
from engine_builds import run_build

from codeflow.pipeline import RunOptions

FILES, LINES = 8, 16_000


@pytest.mark.slow
def test_a_history_larger_than_the_limit_is_mined_under_it(tmp_path: Path) -> None:
    """More than 340 MiB of file versions, full states stored, in 340 MiB of private memory."""
    repo = pygit2.init_repository(str(tmp_path / "large.git"), bare=True)
    contents = [[f"file {f} line {n}: " + "x" * 24 for n in range(LINES)] for f in range(FILES)]
    parents: list[pygit2.Oid] = []
    total = 0
    for i in range(70):
        builder = repo.TreeBuilder()
        for f, lines in enumerate(contents):
            lines[i * 97 % LINES] = f"file {f} changed by commit {i}"
            lines[i * 89 % LINES] = f"file {f} changed again by commit {i}"
            data = "\n".join(lines).encode()
            total += len(data)
            blob = repo.create_blob(data)
            builder.insert(f"module_{f}.py", blob, pygit2.enums.FileMode.BLOB)
        who = pygit2.Signature("Ana", "ana@example.org", 1_600_000_000 + i, 0)
        tree = builder.write()
        parents = [
            repo.create_commit("HEAD", who, who, f"Change all of it, part {i}", tree, parents)
        ]
    assert total > 340 << 20
    run_build(
        tmp_path / "data",
        [tmp_path / "large.git"],
        "run.unit_memory_mib=340",
        "mine.window_from=0",
        "mine.window_to=1",
        options=RunOptions(workers=1),
        until="mine",
    )
    journal = (tmp_path / "data/journal.jsonl").read_text().splitlines()
    assert {json.loads(line)["status"] for line in journal} == {"done"}
