"""A dataset folder: what it refuses to be, who may write, what counts, what is swept away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.dataset import FORMAT_VERSION, DataFile, Dataset, Marker, write_atomically
from codeflow.errors import DatasetError
from codeflow.recipe import Recipe, load_recipe
from codeflow.storage import ObjectPath
from codeflow.work import Work


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data")


def write_changes(dataset: Dataset, unit: str, fingerprint: str = "f" * 24) -> Marker:
    """A finished unit with one table of one row."""
    work = Work(dataset.root, unit, fingerprint, {})
    row = {"triple_id": unit, "reason": "too_long", "detail": "9 tokens"}
    work.write("rejects", {name: [value] for name, value in row.items()})
    marker = Marker("compose", unit, fingerprint, files=tuple(work.written), counts={"n": 1})
    dataset.commit(marker)
    return marker


# -- create and open ------------------------------------------------------------------------------


def test_create_makes_folders_above_and_opens_what_it_made(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    Dataset.create(root)
    before = (root / "codeflow.json").read_bytes()
    Dataset.create(root)
    assert Dataset.open(root).root == root
    assert [p.name for p in root.iterdir()] == ["codeflow.json"]
    assert (root / "codeflow.json").read_bytes() == before


def test_create_takes_a_folder_that_a_killed_creation_left(tmp_path: Path) -> None:
    (tmp_path / "codeflow.json.tmp-17").write_text("{")
    (tmp_path / ".lock").touch()
    Dataset.create(tmp_path)
    assert Dataset.open(tmp_path)


def test_create_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file is a file: name a folder with --out"):
        Dataset.create(tmp_path / "file")
    with pytest.raises(DatasetError, match=r"cannot write to .*file/below: Not a directory"):
        Dataset.create(tmp_path / "file" / "below")


def test_create_refuses_a_folder_with_other_things_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DatasetError, match=r"not empty \(it holds `thesis\.tex`\).*--out"):
        Dataset.create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("method", ["exists", "iterdir"])
@pytest.mark.parametrize("action", ["create", "find"])
def test_a_folder_that_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, method: str
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, denied)
    with pytest.raises(DatasetError, match=f"cannot read {tmp_path}: Permission denied; get"):
        getattr(Dataset, action)(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_create_says_why_it_cannot_write() -> None:
    with pytest.raises(DatasetError, match="cannot write to /proc/codeflow: "):
        Dataset.create(Path("/proc/codeflow"))


def test_open_refuses_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no codeflow\.json there.*codeflow build --repos"):
        Dataset.open(tmp_path / "absent")
    with pytest.raises(DatasetError, match="is not a codeflow dataset"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"format_version": 1}', '{"format": "other"}', "3"])
def test_open_refuses_a_header_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "codeflow.json").write_text(content)
    with pytest.raises(DatasetError, match="is something else's"):
        Dataset.open(tmp_path)


def test_open_names_a_damaged_header(tmp_path: Path) -> None:
    (tmp_path / "codeflow.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cannot read .*codeflow\.json"):
        Dataset.create(tmp_path)


def test_open_refuses_a_newer_format(dataset: Dataset) -> None:
    header = {"format": "codeflow-dataset", "format_version": FORMAT_VERSION + 1}
    (dataset.root / "codeflow.json").write_text(json.dumps(header))
    with pytest.raises(DatasetError, match=f"format {FORMAT_VERSION + 1}.*upgrade codeflow"):
        Dataset.open(dataset.root)


# -- one writer -----------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from codeflow.dataset import Dataset
with Dataset.open(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(dataset: Dataset) -> None:
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(dataset.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DatasetError, match="in use by another"), dataset.locked():
            pytest.fail("two writers at a time")
        other.kill()  # a lock held by a dead process is no lock
        other.wait()
        with dataset.locked():
            pass


# -- markers --------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("abcxyz-_.09"), min_size=1, max_size=12).map("u{}".format)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
MARKERS = st.builds(
    Marker,
    st.just("mine"), NAMES, st.text(max_size=24), st.sampled_from(["done", "quarantined"]),
    st.text(max_size=20),
    st.lists(
        st.builds(DataFile, st.text(), st.text(), st.integers(), st.integers(), st.text()),
        max_size=2,
    ).map(tuple),
    st.dictionaries(st.text(), st.integers(), max_size=3),
    st.dictionaries(st.text(), JSONS, max_size=3),
)  # fmt: skip


@given(MARKERS)
def test_markers_round_trip(tmp_path_factory: pytest.TempPathFactory, marker: Marker) -> None:
    dataset = Dataset(tmp_path_factory.mktemp("data"))
    dataset.commit(marker)
    assert dataset.marker("mine", marker.unit) == marker
    assert dataset.markers("mine") == [marker]
    dataset.forget("mine", [marker.unit, "never there"])
    assert dataset.markers("mine") == []


def test_a_damaged_marker_is_named(dataset: Dataset) -> None:
    write_changes(dataset, "a")
    path = dataset.root / "markers/compose/a.json"
    for content in ("{", "[]", "{}", '{"files": [{"x": 1}]}'):
        path.write_text(content)
        with pytest.raises(DatasetError, match=r"compose/a\.json is damaged .*delete it"):
            dataset.marker("compose", "a")


def test_tables_are_read_over_all_units_in_their_order(dataset: Dataset) -> None:
    for unit in ("b", "a", "c"):
        write_changes(dataset, unit)
    assert dataset.read("rejects")["triple_id"].to_pylist() == ["a", "b", "c"]
    assert dataset.has("rejects")
    assert not dataset.has("triples")
    with pytest.raises(DatasetError, match=r"no table `reject` yet\. Did you mean `rejects`"):
        dataset.read("reject")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_table_is_named(dataset: Dataset, damage: str) -> None:
    (file,) = write_changes(dataset, "a").files
    path = dataset.root / file.path
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data[40] ^= 1  # inside the first data page
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert dataset.whole(dataset.markers("compose")) == (
        dataset.markers("compose") if damage == "flipped" else []
    )
    advice = "" if damage == "missing" else "delete it, then "
    advice = re.escape(f": {advice}run `codeflow pack {dataset.root} --failed`")
    with pytest.raises(DatasetError, match=rf"(?s){path.name} cannot be read \(.*\){advice}"):
        dataset.read("rejects")
    work = Work(dataset.root, "x", "0" * 24, {"rejects": [path]})
    with pytest.raises(DatasetError, match=f"{path.name} cannot be read"):
        list(work.batches("rejects"))


def test_an_object_store_is_asked_once_a_table(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    markers = [write_changes(dataset, unit) for unit in ("a", "b", "c")]
    remote = Dataset(ObjectPath("s3://bucket/data"))
    asked = []

    def listing(folder: ObjectPath) -> list[ObjectPath]:
        asked.append(str(folder))
        return [remote.root / f.path for m in markers[1:] for f in m.files]

    monkeypatch.setattr("codeflow.dataset.files_below", listing)
    assert remote.whole(markers) == markers[1:]
    assert asked == ["s3://bucket/data/tables/rejects"]


# -- atomic writes and housekeeping ---------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_sweep_removes_leftovers_and_nothing_else(dataset: Dataset) -> None:
    kept = write_changes(dataset, "a")
    root = dataset.root
    dataset.store_recipe(Recipe())
    dataset.store_sources([])
    dataset.write_manifest(Recipe())
    for name in ("shards/manifest.json", "shards/tokenizer.json", "clones/r.git/HEAD"):
        write_atomically(root / name, b"{}")
    dataset.journal(step="mine")
    before = {p for p in root.rglob("*") if p.is_file()}
    for name in (
        "tables/rejects/a.000000000000.parquet",
        "tables/rejects/b.ffffffffffff.parquet",
        f"{kept.files[0].path}.tmp-9",
        "tables/gone/x.parquet",
        "shards/shard-00000.000000000000.parquet",
        "markers/compose/b.json.tmp-9",
        "clones/s.git.tmp-9/objects/pack",
        "recipe.toml.tmp-9",
        "manifest.json.tmp-9",
    ):
        write_atomically(root / name, b"x")
    dataset.sweep()
    assert {p for p in root.rglob("*") if p.is_file()} == before
    assert not (root / "tables" / "gone").exists()
    assert not (root / "clones" / "s.git.tmp-9").exists()


def test_recipe_sources_and_manifest_are_read_back(dataset: Dataset) -> None:
    assert dataset.stored_recipe() is None
    assert dataset.stored_sources() is None
    recipe = load_recipe(None, ["pack.length=256", "name=mine"])
    dataset.store_recipe(recipe)
    dataset.store_sources([{"repo_id": "é", "name": "x"}])
    assert dataset.stored_recipe() == recipe
    assert dataset.stored_sources() == [{"repo_id": "é", "name": "x"}]
    marker = write_changes(dataset, "a")
    dataset.commit(Marker("compose", "z", "0", status="quarantined", reason="crash: …"))
    dataset.write_manifest(recipe)
    manifest = json.loads((dataset.root / "manifest.json").read_text())
    assert manifest["recipe_hash"] == recipe.hash
    assert manifest["quarantined"] == [{"step": "compose", "unit": "z", "reason": "crash: …"}]
    assert [f["sha256"] for f in manifest["files"]] == [f.sha256 for f in marker.files]
