"""The list of repositories a user writes, and what each entry means.

One entry a line; `#` starts a comment. An entry is an https or ssh URL, `owner/name` on GitHub, a
path to a local repository, or a path to a git bundle. Everything that can be checked without
reading history is checked here, before any work starts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codeflow.errors import RepositoryError, SourceListError
from codeflow.mine.refs import find_git_dir

Kind = Literal["url", "path", "bundle"]

_OWNER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_URL = re.compile(r"(https|ssh)://([^/\s@]+@)?([A-Za-z0-9.-]+(?::\d+)?)/(\S+)\Z")
_SCP = re.compile(r"([A-Za-z0-9._-]+)@([A-Za-z0-9.-]+):(?!//)(\S+)\Z")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)::?/?/?")


@dataclass(frozen=True)
class Source:
    """One repository to mine.

    Attributes:
        location: What git is given: a URL, or an absolute path.
        repo_id: Unique in a dataset, safe as a file name: readable name plus a short hash.
        name: What a person calls it, `owner/name` where there is an owner.
    """

    kind: Kind
    location: str
    repo_id: str
    name: str


def read_sources(path: Path) -> list[Source]:
    """Read a list file.

    Raises:
        SourceListError: The file cannot be read, holds no entry, or has bad lines (all are named).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise SourceListError(
            f"no list of repositories at {path}: write one entry a line, e.g. pallets/flask"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise SourceListError(f"cannot read the list of repositories {path}: {e}") from e
    return parse_sources(text.splitlines(), str(path))


def parse_sources(lines: Iterable[str], where: str) -> list[Source]:
    """Parse list entries; an entry named twice counts once.

    Raises:
        SourceListError: Nothing in it, or bad lines; each is named with its number.
    """
    found: dict[str, Source] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        entry = re.sub(r"(^|\s)#.*", "", line).strip()
        if not entry:
            continue
        try:
            source = parse_source(entry)
            found.setdefault(source.location, source)
        except SourceListError as e:
            problems.append(f"{where}:{number}: {e}")
    if problems:
        raise SourceListError("\n".join(problems))
    if not found:
        raise SourceListError(
            f"{where} names no repository: write one entry a line, e.g. pallets/flask"
        )
    return list(found.values())


def parse_source(entry: str) -> Source:
    """Understand one entry; the message of a `SourceListError` says how to write it instead."""
    if any(c.isspace() for c in entry) and not os.path.exists(entry):
        raise SourceListError(f"`{entry}` has spaces: write one entry a line")
    if entry.startswith("-"):
        raise SourceListError(f"`{entry}` looks like an option, not a repository")
    if match := _URL.match(entry):
        scheme, user, host, path = match.groups()
        if user is not None and (scheme == "https" or ":" in user):
            raise SourceListError(
                f"the URL of {host}/{path} holds credentials, which would be stored with the "
                "data: leave them out and use ~/.netrc or an SSH key"
            )
        path = path.rstrip("/").removesuffix(".git")
        return _remote(f"{scheme}://{user or ''}{host.lower()}/{path}", f"{host.lower()}/{path}")
    if match := _SCP.match(entry):
        user, host, path = match.groups()
        path = path.rstrip("/").removesuffix(".git")
        return _remote(f"ssh://{user}@{host.lower()}/{path}", f"{host.lower()}/{path}")
    if "://" in entry or "::" in entry:
        match = _SCHEME.match(entry)
        scheme = match.group(1) if match else entry
        if scheme.lower() in ("https", "ssh"):  # not repeated here: it may hold a password
            raise SourceListError(
                f"malformed {scheme} URL: write it as {scheme.lower()}://host/owner/name, "
                "without a password in it"
            )
        raise SourceListError(f"`{entry}`: `{scheme}` URLs are not allowed; use https or ssh")
    if _OWNER_NAME.match(entry):
        if os.path.exists(entry):
            raise SourceListError(
                f"`{entry}` is a folder here and could be a GitHub repository too: write "
                f"./{entry} or https://github.com/{entry}"
            )
        entry = entry.removesuffix(".git")
        return _remote(f"https://github.com/{entry}", f"github.com/{entry}")
    return _local(entry)


def _remote(url: str, identity: str) -> Source:
    name = "/".join(identity.split("/")[1:][-2:])
    return Source("url", url, _repo_id(name, identity), name)


def _local(entry: str) -> Source:
    try:
        return _local_source(entry, Path(entry).expanduser().resolve())
    except (RepositoryError, OSError, RuntimeError, ValueError) as e:
        # Not permitted, too long, a NUL in it, or `~user` of nobody.
        raise SourceListError(f"`{entry}`: {e}") from e


def _local_source(entry: str, absolute: Path) -> Source:
    if not absolute.exists():
        hint = "" if "/" in entry else " (a GitHub repository is written owner/name)"
        raise SourceListError(f"`{entry}`: no such folder or bundle: {absolute}{hint}")
    if absolute.is_file():
        with open(absolute, "rb") as f:
            if not f.read(16).startswith((b"# v2 git bundle", b"# v3 git bundle")):
                raise SourceListError(f"`{entry}` is a file, but not a git bundle")
        name = absolute.name.removesuffix(".bundle")
        return Source("bundle", str(absolute), _repo_id(name, str(absolute)), name)
    find_git_dir(absolute)
    name = absolute.name.removesuffix(".git") or "repository"
    return Source("path", str(absolute), _repo_id(name, str(absolute)), name)


def _repo_id(name: str, identity: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "repository"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=4)
    return f"{readable}-{digest.hexdigest()}"
