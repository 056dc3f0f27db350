"""A dataset: where things live, what counts as done, and how it is read back.

A dataset is a local folder or a prefix of an object store; both look the same inside:

    data/
      codeflow.json          marks the folder as a dataset: format version
      recipe.toml            the resolved recipe
      sources.json           the canonical list of repositories
      clones/<repo>.git      bare clones of remote sources (a cache; not part of the data; for a
                             dataset on an object store they are in a local cache folder)
      markers/<step>/<unit>.json   a finished unit: its fingerprint, files, counts
      tables/<table>/<unit>.<fp>.parquet
      shards/                manifest.json, tokenizer.json, shard-NNNNN.<fp>.parquet
      manifest.json          every data file with rows, bytes and sha256; written when a run ends
      journal.jsonl          what ran when, how long, how much memory (never part of the data; on an
                             object store, where nothing can be appended, one file a run)

Commit protocol: a unit writes its files under temporary names, renames each to a name that holds
the unit's fingerprint, then writes its marker, atomically. Only files named by a marker exist for
readers, so a killed worker leaves nothing that counts, and the same unit done twice is the same
bytes under the same name. A marker whose files are gone does not count either: the unit is done
again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeflow.errors import DatasetError, did_you_mean
from codeflow.recipe import Recipe, recipe_from_mapping, to_toml
from codeflow.settings import read_toml
from codeflow.storage import AnyPath, files_below, relative_name, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
_REQUESTS = 16  # to an object store at a time
_BESIDE_SHARDS = ("shards/manifest.json", "shards/tokenizer.json")  # under fixed names, for readers


@dataclass(frozen=True)
class DataFile:
    """One committed file. `path` is relative to the dataset folder."""

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """The record that makes a unit count.

    Attributes:
        fingerprint: Hash of the unit's inputs, its settings and its code version.
        status: `done` or `quarantined`.
        reason: Why it was quarantined.
        files: What readers may read.
        counts: Named numbers for the summary; the same for the same fingerprint.
        facts: Values that later steps need and that are no table (e.g. the pinned head).
    """

    step: str
    unit: str
    fingerprint: str
    status: str = "done"
    reason: str = ""
    files: tuple[DataFile, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Marker:
        value = json.loads(text)
        value["files"] = tuple(DataFile(**f) for f in value["files"])
        return cls(**value)


class Dataset:
    """A dataset that exists. Make one with `create` or `open`."""

    def __init__(self, root: AnyPath) -> None:
        self.root = root
        self._events: list[dict[str, Any]] = []

    @classmethod
    def create(cls, root: AnyPath) -> Dataset:
        """Open a dataset, making it when the folder is absent or empty.

        Raises:
            DatasetError: The folder holds something else, or cannot be written.
        """
        found = cls.find(root)
        if found is not None:
            return found
        marker = json.dumps({"format": "codeflow-dataset", "format_version": FORMAT_VERSION})
        try:
            write_atomically(root / "codeflow.json", marker.encode() + b"\n")
        except OSError as e:
            raise DatasetError(f"cannot write to {root}: {e.strerror}") from e
        return cls(root)

    @classmethod
    def find(cls, root: AnyPath) -> Dataset | None:
        """Open a dataset; None where there is none and nothing that is in the way of one.

        Raises:
            DatasetError: The folder holds something else, or cannot be read.
        """
        if cls.exists(root):
            return cls.open(root)
        if isinstance(root, Path) and root.is_file():
            raise DatasetError(f"{root} is a file: name a folder with --out")
        with _permitted(root):
            stranger = _stranger(root)
        if stranger is not None:
            raise DatasetError(
                f"{root} is not a codeflow dataset and not empty (it holds `{stranger}`): "
                "name an empty or new folder with --out"
            )
        return None

    @staticmethod
    def exists(root: AnyPath) -> bool:
        """Is there a dataset?

        Raises:
            DatasetError: The folder cannot be looked into.
        """
        with _permitted(root):
            return (root / "codeflow.json").exists()

    @classmethod
    def open(cls, root: AnyPath) -> Dataset:
        """Open an existing dataset.

        Raises:
            DatasetError: No dataset there, or one of a newer format.
        """
        try:
            header = json.loads((root / "codeflow.json").read_text())
        except (FileNotFoundError, NotADirectoryError) as e:
            raise DatasetError(
                f"{root} is not a codeflow dataset (no codeflow.json there): "
                "make one with `codeflow build --repos list.txt --out DIR`"
            ) from e
        except (OSError, ValueError) as e:
            raise DatasetError(f"cannot read {root / 'codeflow.json'}: {e}") from e
        if not isinstance(header, dict) or header.get("format") != "codeflow-dataset":
            raise DatasetError(
                f"{root} is not a codeflow dataset (its codeflow.json is something else's): "
                "name another folder"
            )
        if header.get("format_version", 0) > FORMAT_VERSION:
            raise DatasetError(
                f"{root} has dataset format {header['format_version']}, this codeflow reads up to "
                f"{FORMAT_VERSION}: upgrade codeflow"
            )
        return cls(root)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the dataset for writing; a second writer gets an error instead of a mess.

        An object store offers no lock. Two runs at once cost double work there, and no damage:
        units are committed whole, and the same unit is the same bytes.
        """
        if not isinstance(self.root, Path):
            yield
            return
        try:
            lock = open(self.root / ".lock", "w")  # noqa: SIM115 - closed by `with` below
        except OSError as e:
            raise DatasetError(f"cannot write to {self.root}: {e.strerror}") from e
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise DatasetError(f"{self.root} is in use by another codeflow run") from e
            yield

    # -- recipe and sources -----------------------------------------------------------------------

    def stored_recipe(self) -> Recipe | None:
        path = self.root / "recipe.toml"
        if not path.exists():
            return None
        return recipe_from_mapping(read_toml(path.read_text(), str(path)), str(path))

    def store_recipe(self, recipe: Recipe) -> None:
        write_atomically(self.root / "recipe.toml", to_toml(recipe).encode())

    def stored_sources(self) -> list[dict[str, Any]] | None:
        path = self.root / "sources.json"
        return list(json.loads(path.read_text())) if path.exists() else None

    def store_sources(self, sources: list[dict[str, Any]]) -> None:
        text = json.dumps(sources, indent=1, ensure_ascii=True) + "\n"
        write_atomically(self.root / "sources.json", text.encode())

    # -- markers ----------------------------------------------------------------------------------

    def _marker_path(self, step: str, unit: str) -> AnyPath:
        return self.root / "markers" / step / f"{unit}.json"

    def marker(self, step: str, unit: str) -> Marker | None:
        try:
            return Marker.from_json(self._marker_path(step, unit).read_text())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as e:
            path = self._marker_path(step, unit)
            raise DatasetError(
                f"{path} is damaged ({e}): delete it, then run {remake(self.root)}"
            ) from e

    def markers(self, step: str) -> list[Marker]:
        """All markers of a step, by unit name."""
        folder = self.root / "markers" / step
        names = [p.name for p in files_below(folder)]
        units = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        if isinstance(folder, Path):
            found = [self.marker(step, unit) for unit in units]
        else:  # each is a request: ask for many at a time
            with ThreadPoolExecutor(_REQUESTS) as pool:
                found = list(pool.map(lambda unit: self.marker(step, unit), units))
        return [marker for marker in found if marker is not None]

    def commit(self, marker: Marker) -> None:
        text = json.dumps(asdict(marker), indent=1, sort_keys=True)
        write_atomically(self._marker_path(marker.step, marker.unit), text.encode() + b"\n")

    def forget(self, step: str, units: Iterable[str]) -> None:
        for unit in units:
            self._marker_path(step, unit).unlink(missing_ok=True)

    def whole(self, markers: Iterable[Marker]) -> list[Marker]:
        """Those of a step's markers whose files are all there, with their recorded sizes.

        In an object store one listing a table answers for all units, and presence is enough: an
        object is there whole or not at all.
        """
        markers = list(markers)
        root = self.root
        if isinstance(root, Path):
            return [m for m in markers if all(_has_size(root, *f) for f in _expected(m))]
        folders = {path.rpartition("/")[0] for m in markers for path, _ in _expected(m)}
        listed = {relative_name(p, root) for f in sorted(folders) for p in files_below(root / f)}
        return [m for m in markers if all(path in listed for path, _ in _expected(m))]

    # -- reading ----------------------------------------------------------------------------------

    def files(self, table: str) -> list[DataFile]:
        """Committed files of a table over all finished units, in unit order."""
        every = [f for m in self.all_markers() for f in m.files]
        found = [f for f in every if f.table == table]
        if not found:
            known = {f.table for f in every}
            raise DatasetError(
                f"{self.root} has no table `{table}` yet. {did_you_mean(table, known)}"
            )
        return found

    def has(self, table: str) -> bool:
        """Has any unit written this table yet?"""
        return any(f.table == table for m in self.all_markers() for f in m.files)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table in memory, checksums verified."""
        from codeflow.work import read_files

        return read_files([self.root / f.path for f in self.files(table)], table, columns)

    # -- housekeeping -----------------------------------------------------------------------------

    def sweep(self) -> None:
        """Delete what no marker names: leftovers of killed workers and of earlier recipes."""
        named = {f.path for m in self.all_markers() for f in m.files}
        named |= set(_BESIDE_SHARDS)
        for folder in ("tables", "shards", "markers"):
            for path in files_below(self.root / folder):
                stale = folder != "markers" and relative_name(path, self.root) not in named
                if stale or ".tmp-" in path.name:
                    path.unlink()
        if isinstance(self.root, Path):
            self._sweep_folders(self.root)

    @staticmethod
    def _sweep_folders(root: Path) -> None:
        for folder in ("tables", "shards", "markers"):
            for path in sorted((root / folder).rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        for path in root.glob("*.tmp-*"):
            path.unlink()
        for path in (root / "clones").glob("*.tmp-*"):
            shutil.rmtree(path)

    def write_manifest(self, recipe: Recipe) -> None:
        """Freeze what the dataset consists of. Holds no time, no machine: same data, same bytes."""
        from codeflow import __version__

        manifest = {
            "format": "codeflow-dataset",
            "format_version": FORMAT_VERSION,
            "codeflow_version": __version__,
            "recipe": recipe.name,
            "recipe_hash": recipe.hash,
            "quarantined": [
                {"step": m.step, "unit": m.unit, "reason": m.reason}
                for m in self.all_markers()
                if m.status != "done"
            ],
            "files": sorted(
                (asdict(f) for m in self.all_markers() for f in m.files), key=lambda f: f["path"]
            ),
        }
        data = json.dumps(manifest, indent=1).encode() + b"\n"
        path = self.root / "manifest.json"
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)

    def journal(self, **event: Any) -> None:
        """Add one line to the run log."""
        if isinstance(self.root, Path):
            with open(self.root / "journal.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(event) + "\n")
        else:
            self._events.append(event)

    def close_journal(self) -> None:
        """Write what a run logged, where lines cannot be appended one by one."""
        if self._events:
            lines = "".join(json.dumps(event) + "\n" for event in self._events)
            name = f"{time.time_ns()}-{os.getpid()}.jsonl"
            write_atomically(self.root / "journal" / name, lines.encode())
            self._events.clear()

    def all_markers(self) -> Iterator[Marker]:
        """The markers of all steps, by step and unit name."""
        files = files_below(self.root / "markers")
        names = {relative_name(p, self.root).split("/")[1] for p in files}
        for step in sorted(names):
            yield from self.markers(step)


def clones_folder(root: AnyPath) -> Path:
    """Where the clones of a dataset's remote sources are kept; git needs a local disk."""
    if isinstance(root, Path):
        return root / "clones"
    cache = os.environ.get("CODEFLOW_CACHE") or str(Path.home() / ".cache" / "codeflow")
    return Path(cache) / "clones"


def remake(root: AnyPath | str) -> str:
    """The command that makes again what was deleted, and tries again what failed for its lack."""
    return f"`codeflow pack {root} --failed`"


@contextlib.contextmanager
def _permitted(root: AnyPath) -> Iterator[None]:
    """Turn the refusal of a folder into a sentence."""
    try:
        yield
    except OSError as e:
        raise DatasetError(
            f"cannot read {root}: {e.strerror}; get permission, or name another folder"
        ) from e


def _expected(marker: Marker) -> Iterator[tuple[str, int | None]]:
    """The files of a unit and their sizes, None for those that the marker does not record."""
    yield from ((f.path, f.bytes) for f in marker.files)
    if any(f.table == "shards" for f in marker.files):
        yield from ((path, None) for path in _BESIDE_SHARDS)


def _has_size(root: Path, path: str, size: int | None) -> bool:
    try:
        found = os.stat(f"{root}/{path}").st_size
    except OSError:
        return False
    return size is None or found == size


def _stranger(root: AnyPath) -> str | None:
    """Name of something in a folder that is to become a dataset, None when it is empty or new."""
    if not isinstance(root, Path):
        return next((relative_name(p, root) for p in files_below(root)), None)
    names = sorted(p.name for p in root.iterdir()) if root.exists() else []
    return next((n for n in names if ".tmp-" not in n and n != ".lock"), None)
