"""Where a dataset lives: a local folder, or a prefix of an object store (`s3://bucket/prefix`).

`ObjectPath` is the part of `pathlib.Path` that datasets need, over `pyarrow.fs`. Both kinds keep
the one promise the commit protocol rests on: a file appears whole or not at all. Locally by a
rename in the same folder, after fsync; in an object store because an object becomes visible only
when its upload is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from codeflow.errors import DatasetError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SCHEMES = ("s3",)
_COPY_BYTES = 8 << 20


class ObjectPath:
    """A key of an object store, written and combined like a path."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")

    def __truediv__(self, part: str) -> ObjectPath:
        return ObjectPath(f"{self._uri}/{part}")

    def __str__(self) -> str:
        return self._uri

    def __repr__(self) -> str:
        return f"ObjectPath({self._uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and other._uri == self._uri

    def __hash__(self) -> int:
        return hash(self._uri)

    @property
    def name(self) -> str:
        return self._uri.rpartition("/")[2]

    @property
    def key(self) -> str:
        """Bucket and key, as `pyarrow.fs` names it."""
        return self._uri.partition("://")[2]

    def exists(self) -> bool:
        from pyarrow.fs import FileType

        with _explained(self):
            return bool(_filesystem().get_file_info(self.key).type == FileType.File)

    def read_bytes(self) -> bytes:
        """Content of the object. FileNotFoundError when there is none."""
        with _explained(self), _filesystem().open_input_stream(self.key) as stream:
            return bytes(stream.read())

    def read_text(self) -> str:
        return self.read_bytes().decode("utf-8")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _explained(self):
                _filesystem().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def open_input(self) -> Any:
        """A seekable file of the object, for Arrow's readers."""
        with _explained(self):
            return _filesystem().open_input_file(self.key)


AnyPath = Path | ObjectPath


def parse_root(text: str | Path) -> AnyPath:
    """The place a user names with `--out`: a folder, or a URI of an object store.

    Raises:
        DatasetError: A scheme that is not supported, no bucket, or an empty part in the prefix.
    """
    scheme, separator, rest = str(text).partition("://")
    if isinstance(text, Path) or not separator:
        return Path(text)
    if scheme not in _SCHEMES:
        raise DatasetError(f"`{text}`: datasets live in a folder or under s3://, not {scheme}://")
    if not rest.partition("/")[0]:
        raise DatasetError(f"`{text}` names no bucket: write s3://bucket/prefix")
    if "//" in rest.rstrip("/"):
        raise DatasetError(f"`{text}` has an empty part between two slashes: remove one of them")
    return ObjectPath(str(text))


def relative_name(path: AnyPath, root: AnyPath) -> str:
    """Name of a file below a root, with forward slashes."""
    if isinstance(path, Path) and isinstance(root, Path):
        return path.relative_to(root).as_posix()
    return str(path).removeprefix(f"{root}/")


def absolute(root: AnyPath) -> str:
    """A root as text that means the same in another process, whatever its working folder."""
    return str(root.resolve()) if isinstance(root, Path) else str(root)


def sha256_of(path: AnyPath) -> str | None:
    """Checksum of a file, None when there is none or the disk cannot read it.

    Raises:
        DatasetError: The object store does not answer, which says nothing about the file.
    """
    digest = hashlib.sha256()
    try:
        with (
            _explained(path),
            open(path, "rb") if isinstance(path, Path) else path.open_input() as source,
        ):
            while chunk := source.read(_COPY_BYTES):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def files_below(folder: AnyPath) -> list[AnyPath]:
    """All files below a folder, by name; none when there is no such folder."""
    if isinstance(folder, Path):
        found: list[AnyPath] = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return found
    from pyarrow.fs import FileSelector, FileType

    with _explained(folder):
        selector = FileSelector(folder.key, allow_not_found=True, recursive=True)
        infos = _filesystem().get_file_info(selector)
    scheme = str(folder).partition("://")[0]
    return [
        ObjectPath(f"{scheme}://{info.path}")
        for info in sorted(infos, key=lambda i: str(i.path))
        if info.type == FileType.File
    ]


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[Path]:
    """Give a local temporary file to write; it becomes `path`, whole, when the block succeeds.

    Nothing is left behind when it fails. A kill can leave the temporary file, whose name says so.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
        try:
            yield temporary
            with open(temporary, "r+b") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        return
    with tempfile.TemporaryDirectory(prefix="codeflow-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        _upload(temporary, path)


def write_atomically(path: AnyPath, data: bytes) -> None:
    """Write a small file, whole or not at all, durably."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def _upload(source: Path, target: ObjectPath) -> None:
    """Copy a local file into the store, whole or not at all.

    Arrow completes an upload when its stream is closed, for whatever reason: an exception between
    two writes would publish half an object. So there is one write, and it is made in a thread,
    where no Ctrl-C arrives. (`pyarrow.fs.copy_files` does not report a part that failed.)
    """
    import pyarrow as pa

    def send() -> None:
        with pa.memory_map(str(source)) as mapped:
            content = mapped.read_buffer()
            with _filesystem().open_output_stream(target.key) as stream:
                stream.write(content)

    with _explained(target), ThreadPoolExecutor(1) as pool:
        pool.submit(send).result()


def _sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _filesystem() -> FileSystem:
    """The S3 client of this process; credentials, region and endpoint come from AWS_* variables.

    Time-outs are longer and retries more than Arrow's defaults, which give up on a busy store. Ten
    attempts, each after twice the wait of the one before, take about 100 s when nobody answers.
    """
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    options: dict[str, Any] = {}
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "10")
    if not attempts.isdecimal() or int(attempts) < 1:
        raise DatasetError(f"AWS_MAX_ATTEMPTS must be a whole number from 1, not `{attempts}`")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options = {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    return S3FileSystem(
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        request_timeout=60,
        connect_timeout=10,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=int(attempts)),
        **options,
    )


@contextlib.contextmanager
def _explained(path: AnyPath) -> Iterator[None]:
    """Turn the store's refusals into a sentence; a missing object stays FileNotFoundError."""
    try:
        yield
    except OSError as e:
        if isinstance(path, Path) or isinstance(e, FileNotFoundError):
            raise
        raise DatasetError(
            f"{path}: {e} (credentials, region and endpoint come from AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)"
        ) from e
