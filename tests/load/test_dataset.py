from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shard_factory import Row, described, random_rows, write_shards
from torch.utils.data import DataLoader

from codeflow.errors import ShardError
from codeflow.load import PackedRow, ShardDataset
from codeflow.load.dataset import next_token_labels, positions

ROWS = described(random_rows(37, 24))
SHARE = 0.3
HELD_OUT = 11
PART = pytest.mark.parametrize(("part", "rows"), [("train", 37 - HELD_OUT), ("heldout", HELD_OUT)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("load") / "data", ROWS, length=24)


def naive_labels(row: Row) -> list[int]:
    """Token by token, as one would explain it."""
    target = []
    for i, run in enumerate(row.loss_runs):
        target += [i % 2 == 1] * run
    labels, start = [], 0
    for n in row.doc_lens:
        for t in range(start, start + n):
            has_next = t + 1 < start + n
            labels.append(row.ids[t + 1] if has_next and target[t + 1] else -100)
        start += n
    return labels


def ids(rows: list[PackedRow]) -> list[int]:
    return [row.row_id for row in rows]


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_labels_and_positions_agree_with_the_naive_reference(seed: int, length: int) -> None:
    (row,) = random_rows(1, length, seed)
    lens = np.array(row.doc_lens)
    found = next_token_labels(np.array(row.ids), lens, np.array(row.loss_runs))
    assert found.tolist() == naive_labels(row)
    assert positions(lens).tolist() == [p for n in row.doc_lens for p in range(n)]


def test_rows_are_what_was_written(data: Path) -> None:
    for row, written in zip(ShardDataset(data, shuffle=False), ROWS, strict=True):
        assert row.input_ids.tolist() == written.ids
        assert row.labels.tolist() == naive_labels(written)
        assert row.doc_lens.tolist() == written.doc_lens
        assert row.position_ids.tolist() == [p for n in written.doc_lens for p in range(n)]
        types = [t.dtype for t in (row.input_ids, row.labels, row.position_ids, row.doc_lens)]
        assert types == [torch.int64] * 3 + [torch.int32]


def test_ids_above_the_signed_range_survive(tmp_path: Path) -> None:
    for token_dtype, top in (("uint16", 2**16), ("uint32", 2**18)):
        row = Row([top - 1, 0, top - 2], [3], [0, 3])
        written = write_shards(
            tmp_path / token_dtype, [row], length=3, token_dtype=token_dtype, vocab_size=top
        )
        (found,) = ShardDataset(written)
        assert found.input_ids.tolist() == row.ids
        assert found.labels.tolist() == [0, top - 2, -100]


def test_every_row_once_and_epochs_differ(data: Path) -> None:
    stream = ids(list(ShardDataset(data, seed=1, epochs=2)))
    first, second = stream[:37], stream[37:]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second
    assert first != list(range(37))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_global_order_does_not_depend_on_the_world(data: Path, world: int) -> None:
    alone = ids(list(ShardDataset(data, seed=5, epochs=3)))
    ranks = [
        ids(list(ShardDataset(data, seed=5, epochs=3, rank=r, world_size=world)))
        for r in range(world)
    ]
    together = [ranks[i % world][i // world] for i in range(len(alone))]
    assert together == alone


@given(st.integers(0, 80), st.integers(0, 30))
def test_resume_is_exact(data: Path, before: int, after: int) -> None:
    whole = ids(list(islice(ShardDataset(data, seed=2, epochs=None), before + after)))
    first = ShardDataset(data, seed=2, epochs=None)
    assert ids(list(islice(first, before))) == whole[:before]
    state = json.loads(json.dumps(first.state_dict()))
    second = ShardDataset(data, seed=2, epochs=None)
    second.load_state_dict(state)
    assert ids(list(islice(second, after))) == whole[before:]


def test_resume_with_another_world_size(data: Path) -> None:
    whole = ids(list(islice(ShardDataset(data, epochs=None), 48)))
    old = [ShardDataset(data, epochs=None, rank=r, world_size=4) for r in range(4)]
    for dataset in old:
        list(islice(dataset, 6))
    states = [dataset.state_dict() for dataset in old]
    assert all(state == states[0] for state in states)
    new = [ShardDataset(data, epochs=None, rank=r, world_size=3) for r in range(3)]
    for dataset in new:
        dataset.load_state_dict(states[0])
    parts = [ids(list(islice(dataset, 8))) for dataset in new]
    assert [parts[i % 3][i // 3] for i in range(24)] == whole[24:]


def test_iterating_continues_and_starts_again_at_the_end(data: Path) -> None:
    dataset = ShardDataset(data)
    first = ids(list(islice(dataset, 10)))
    rest = ids(list(dataset))
    assert sorted(first + rest) == list(range(37))
    assert ids(list(dataset)) == first + rest


def test_epoch_counts(data: Path) -> None:
    dataset = ShardDataset(data, epochs=None)
    rows = iter(dataset)
    epochs = [(next(rows), dataset.epoch)[1] for _ in range(75)]
    assert epochs == [0] * 36 + [1] * 37 + [2] * 2


def test_state_of_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", random_rows(37, 24, seed=9), length=24)
    state = ShardDataset(other).state_dict()
    with pytest.raises(ShardError, match="manifest_sha256"):
        ShardDataset(data).load_state_dict(state)
    with pytest.raises(ShardError, match="seed"):
        ShardDataset(data, seed=1).load_state_dict(ShardDataset(data).state_dict())
    with pytest.raises(ShardError, match="version"):
        ShardDataset(data).load_state_dict({})


def test_worker_processes_are_refused(data: Path) -> None:
    loader = DataLoader(ShardDataset(data), batch_size=None, num_workers=1)
    with pytest.raises(ShardError, match="num_workers=0"):
        next(iter(loader))
    assert len(list(DataLoader(ShardDataset(data), batch_size=None))) == 37


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_impossible_rank(data: Path, rank: int, world: int) -> None:
    with pytest.raises(ShardError, match="rank"):
        ShardDataset(data, rank=rank, world_size=world)


def test_a_flipped_byte_is_never_read_as_data(tmp_path: Path) -> None:
    """Any byte of the shard: an error that names shard and row group, or the very same rows."""
    data = write_shards(tmp_path / "data", ROWS[:12], length=24, groups_per_shard=3)
    (file,) = data.glob("shards/*.parquet")
    sound = file.read_bytes()
    want = [(r.input_ids.tolist(), r.labels.tolist()) for r in ShardDataset(data, shuffle=False)]
    rng = np.random.default_rng(0)
    caught = []
    for place in rng.choice(len(sound), 400, replace=False).tolist():
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            rows = list(ShardDataset(data, shuffle=False))
        except ShardError as e:
            caught.append(str(e))
        else:
            assert [(r.input_ids.tolist(), r.labels.tolist()) for r in rows] == want
    assert len(caught) > 100
    assert all(f"{file.name}, row group " in message for message in caught)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    """Without `verify` a wrong token goes unnoticed: this is what the checksum is for."""
    tokens = np.random.default_rng(0).integers(0, 257, 1000).tolist()
    rows = [Row(tokens, [1000], [0, 1000])]
    data = write_shards(tmp_path / "data", rows, length=1000)
    (file,) = data.glob("shards/*.parquet")
    sound = file.read_bytes()
    outcomes = set()
    for place in range(200, 1000, 8):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        outcome = []
        for verify in (False, True):
            try:
                (row,) = ShardDataset(data, verify=verify)
                outcome.append("same" if row.input_ids.tolist() == rows[0].ids else "wrong")
            except ShardError:
                outcome.append("error")
        outcomes.add(tuple(outcome))
    assert ("wrong", "error") in outcomes
    assert not any(with_check == "wrong" for _, with_check in outcomes)


@pytest.mark.parametrize(
    "row",
    [
        Row([1, 2, 3], [2], [0, 3]),
        Row([1, 2, 3], [3], [0, 2]),
        Row([1, 2, 3], [3, 0], [0, 3]),
        Row([], [], []),
        Row([1, 2, 257], [3], [0, 3]),
        Row([1] * 5, [5], [0, 5]),
    ],
)
def test_rows_that_contradict_themselves(tmp_path: Path, row: Row) -> None:
    data = write_shards(tmp_path / "data", [Row([1], [1], [1]), row], length=4)
    with pytest.raises(ShardError, match="row group 0, row 1: "):
        list(ShardDataset(data, shuffle=False))


def test_another_row_count_than_the_manifest(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", ROWS[:8], length=24)
    file = data / "shards" / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0]["row_groups"] = [5, 3]
    file.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="row group 0: row count"):
        list(ShardDataset(data, shuffle=False))


@given(st.integers(0, 1000), st.integers(1, 24))
def test_cropped_rows_are_prefixes(seed: int, length: int) -> None:
    (written,) = random_rows(1, 24, seed)
    lens = np.array(written.doc_lens)
    labels = next_token_labels(np.array(written.ids), lens, np.array(written.loss_runs))
    row = PackedRow(
        0,
        torch.tensor(written.ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions(lens)),
        torch.tensor(written.doc_lens, dtype=torch.int32),
    )
    short = row.cropped(length)
    kept = min(length, len(written.ids))
    assert short.input_ids.tolist() == written.ids[:kept]
    assert short.labels.tolist() == labels[:kept].tolist()
    assert short.position_ids.tolist() == row.position_ids[:kept].tolist()
    assert int(short.doc_lens.sum()) == kept
    assert (short.doc_lens > 0).all()
    assert short.doc_lens.dtype == torch.int32
    assert short.kinds == ()
    assert short.segments == ()


def test_kinds_and_segments_are_what_was_written(data: Path) -> None:
    for row, written in zip(ShardDataset(data, shuffle=False, with_docs=True), ROWS, strict=True):
        assert row.kinds == tuple(written.kinds or ())
        assert row.segments == tuple(tuple(runs) for runs in written.segments or ())
        assert row.input_ids.tolist() == written.ids
    assert all(row.kinds == row.segments == () for row in ShardDataset(data))


def test_older_shards_have_kinds_only(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", random_rows(6, 24), length=24)
    for row in ShardDataset(data, with_docs=True):
        assert row.kinds == ("test",) * len(row.doc_lens)
        assert row.segments == ((),) * len(row.doc_lens)


@given(st.integers(0, 1000), st.integers(1, 24))
def test_cropped_segments_are_those_of_the_tokens_kept(seed: int, length: int) -> None:
    (written,) = described(random_rows(1, 24, seed), seed)
    lens, total = torch.tensor(written.doc_lens, dtype=torch.int32), torch.arange(len(written.ids))
    segments = tuple(tuple(runs) for runs in written.segments or ())
    row = PackedRow(0, total, total, total, lens, tuple(written.kinds or ()), segments)
    short = row.cropped(length)
    assert short.kinds == row.kinds[: len(short.doc_lens)]
    for kept, before, n in zip(short.segments, segments, short.doc_lens.tolist(), strict=False):
        assert by_token(kept) == by_token(before)[:n]
        assert all(tokens > 0 for _, tokens in kept)
    assert len(short.segments) == len(short.doc_lens)


def by_token(segments: Sequence[tuple[str, int]]) -> list[str]:
    return [role for role, tokens in segments for _ in range(tokens)]


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        (["a"], [[("x", 1)]]),
        (["a", "b"], [[("x", 2)], [("y", 2)]]),
        (["a", "b"], [[("x", 3), ("y", -1)], [("y", 1)]]),
    ],
)
def test_documents_that_contradict_their_lengths(
    tmp_path: Path, kinds: list[str], segments: list[list[tuple[str, int]]]
) -> None:
    row = Row([1, 2, 3], [2, 1], [0, 3], kinds, segments)
    data = write_shards(tmp_path / "data", [row], length=4)
    assert len(list(ShardDataset(data))) == 1
    with pytest.raises(ShardError, match="row group 0, row 0: docs and doc_lens disagree"):
        list(ShardDataset(data, with_docs=True))


def test_roles_that_are_null(tmp_path: Path) -> None:
    row = Row([1, 2, 3], [3], [0, 3], ["a"], [[(None, 3)]])  # type: ignore[list-item]
    data = write_shards(tmp_path / "data", [row], length=4)
    with pytest.raises(ShardError, match=r"row group 0: .*null"):
        list(ShardDataset(data, with_docs=True))


@PART
@pytest.mark.parametrize("seed", [0, 1])
def test_a_part_has_the_same_rows_for_every_seed(
    data: Path, part: str, rows: int, seed: int
) -> None:
    in_order = ids(list(ShardDataset(data, holdout=SHARE, part=part, shuffle=False)))
    assert in_order == sorted(in_order)
    assert len(in_order) == rows
    dataset = ShardDataset(data, holdout=SHARE, part=part, seed=seed, epochs=2)
    assert dataset.rows == rows
    stream = ids(list(dataset))
    assert sorted(stream[:rows]) == sorted(stream[rows:]) == in_order
    assert stream[:rows] != stream[rows:]


def test_the_parts_share_no_row(data: Path) -> None:
    train, heldout = (
        ids(list(ShardDataset(data, holdout=SHARE, part=part))) for part in ("train", "heldout")
    )
    assert sorted(train + heldout) == list(range(37))


@PART
@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_order_of_a_part_does_not_depend_on_the_world(
    data: Path, part: str, rows: int, world: int
) -> None:
    def of(rank: int, world: int) -> list[int]:
        options = {"holdout": SHARE, "part": part, "seed": 5, "epochs": 3}
        return ids(list(ShardDataset(data, rank=rank, world_size=world, **options)))  # type: ignore[arg-type]

    alone, ranks = of(0, 1), [of(rank, world) for rank in range(world)]
    assert [ranks[i % world][i // world] for i in range(3 * rows)] == alone


@PART
@given(before=st.integers(0, 60), after=st.integers(0, 30))
def test_resume_of_a_part_is_exact(
    data: Path, part: str, rows: int, before: int, after: int
) -> None:
    def fresh() -> ShardDataset:
        return ShardDataset(data, seed=2, epochs=None, holdout=SHARE, part=part)

    whole = ids(list(islice(fresh(), before + after)))
    first, second = fresh(), fresh()
    assert ids(list(islice(first, before))) == whole[:before]
    assert first.epoch == before // rows
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(list(islice(second, after))) == whole[before:]


def test_state_of_another_part_is_refused(data: Path) -> None:
    state = ShardDataset(data, holdout=SHARE).state_dict()
    with pytest.raises(ShardError, match=r"has holdout 0\.3, this stream 0\.0"):
        ShardDataset(data).load_state_dict(state)
    with pytest.raises(ShardError, match="has part 'train', this stream 'heldout'"):
        ShardDataset(data, holdout=SHARE, part="heldout").load_state_dict(state)


def test_state_of_before_parts_resumes_the_whole(data: Path) -> None:
    state = ShardDataset(data).state_dict()
    del state["holdout"], state["part"]
    ShardDataset(data).load_state_dict(state | {"position": 3})
    with pytest.raises(ShardError, match="holdout"):
        ShardDataset(data, holdout=SHARE).load_state_dict(state)


def test_no_held_out_share_changes_nothing(data: Path) -> None:
    plain, zero = ShardDataset(data, seed=3), ShardDataset(data, seed=3, holdout=0)
    assert ids(list(plain)) == ids(list(zero))
    with pytest.raises(ShardError, match="holds no rows out"):
        ShardDataset(data, part="heldout")
