"""Which licence a tree carries, as an SPDX expression, read from the tree itself.

The licence must be read at the window, not at HEAD: redis was BSD until 2024. A licence file is
recognised by its text (`fingerprints.py`), older wordings by phrases that only they contain; where
no file says it, package metadata does (`metadata.py`). Anything else is unknown, never guessed, and
what is ambiguous is read the strict way (`AND`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from codeflow.licenses import is_permissive
from codeflow.mine.fingerprints import compare, parts, trigrams
from codeflow.mine.merkle import parse_tree
from codeflow.mine.metadata import declared_license, is_metadata_file
from codeflow.mine.objects import GITLINK, SYMLINK, TREE, CorruptObject, Objects

_MAX_BYTES = 200_000
_FILE = re.compile(
    rb"(?P<stem>licen[cs]es?|copying|unlicense)(?:[._-](?P<suffix>[a-z0-9.+_-]+?))??"
    rb"(?:\.(?:md|markdown|txt|rst|html))?\Z",
    re.IGNORECASE,
)
#: Suffixes of files that hold the licences of something else.
_NOT_OURS = re.compile(
    rb"third|3rd|vendor|depend|bundled|docs?\Z|font|header|notice", re.IGNORECASE
)
_ID = r"(?!(?:OR|AND|WITH)\b)[A-Za-z0-9.+-]+"
_SPDX_TAG = re.compile(rf"SPDX-License-Identifier:\s*({_ID}(?:\s+(?:OR|AND|WITH)\s+{_ID})*)")

#: What a text with these words is, besides what else it holds: never permissive.
_RESTRICTIONS = (
    ("commons clause", "LicenseRef-Commons-Clause"),
    ("redis source available license", "LicenseRef-RSAL-2.0"),
    ("server side public license", "SSPL-1.0"),
    ("business source license 1.1", "BUSL-1.1"),
    ("confluent community license", "LicenseRef-Confluent-Community"),
    ("polyform noncommercial", "PolyForm-Noncommercial-1.0.0"),
)

#: For wordings too far from the text SPDX lists. First match wins, so narrower ones stand first.
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0-only", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0-only", ("gnu lesser general public license", "version 3, 29 june 2007")),
    ("LGPL-2.1-only", ("gnu lesser general public license", "version 2.1, february 1999")),
    ("GPL-3.0-only", ("gnu general public license", "version 3, 29 june 2007")),
    ("GPL-2.0-only", ("gnu general public license", "version 2, june 1991")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("EPL-2.0", ("eclipse public license", "2.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("BSL-1.0", ("boost software license", "version 1.0")),
    ("Zlib", ("the origin of this software must not be misrepresented",)),
    (
        "BSD-4-Clause",
        ("redistribution and use in source and binary forms", "must display the following"),
    ),
    (
        "BSD-3-Clause",
        ("redistribution and use in source and binary forms", "endorse or promote products"),
    ),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    (
        "ISC",
        ("permission to use, copy, modify, and", "distribute this software for any purpose"),
    ),
    ("MIT", ("permission is hereby granted, free of charge, to any person obtaining a copy",)),
)


@dataclass(frozen=True)
class License:
    """What a tree says about its licence.

    Attributes:
        spdx: SPDX expression, None when unknown. GPL-family ids end in `-only`: the text does not
            say whether later versions may be used.
        permissive: Does the expression offer a permissive choice?
        source: The files that said so, joined by ` + `; empty when none did.
    """

    spdx: str | None
    permissive: bool
    source: str


@dataclass(frozen=True)
class _Found:
    name: bytes
    spdx: str
    suffixed: bool


def is_license_file(name: bytes) -> bool:
    """Is this the name of a licence file (at the root of a tree)?"""
    match = _FILE.match(name)
    return match is not None and not _NOT_OURS.search(match["suffix"] or b"")


def license_of(text: bytes) -> str | None:
    """SPDX expression of a licence text, None when it is none of the known ones.

    A text that holds several licences is bound by all of them (`AND`), whatever it says around
    them: the prose that offers a choice is not understood.
    """
    plain = text[:_MAX_BYTES].decode("utf-8", "replace")
    words = " ".join(plain.lower().replace("licence", "license").split())
    hashes = trigrams(plain)
    found = set(parts(compare(hashes), hashes))
    if found == {"GPL-3.0-only", "LGPL-3.0-only"}:
        found = {"LGPL-3.0-only"}  # which is written as an addition to the GPL's text
    if found == {"BSD-2-Clause"} and "endorse or promote products" in words:
        found = {"BSD-3-Clause"}  # in words of its own
    found |= {spdx for phrase, spdx in _RESTRICTIONS if phrase in words}
    if found:
        return " AND ".join(sorted(found))
    if tag := _SPDX_TAG.search(plain):
        return " ".join(tag.group(1).split())
    return next((i for i, phrases in _PHRASES if all(p in words for p in phrases)), None)


def license_of_tree(objects: Objects, root_tree: str) -> License:
    """The licence of the state with this root tree.

    Licence files at the root come first; then a `LICENSES` folder (the REUSE convention); then
    package metadata. Unreadable objects are as good as absent.
    """
    try:
        entries = {name: (mode, i) for name, mode, i in parse_tree(objects.tree(root_tree))}
    except (KeyError, ValueError):
        return License(None, False, "")
    files = {n: i for n, (mode, i) in entries.items() if mode not in (TREE, GITLINK, SYMLINK)}
    found = _license_files(objects, files)
    if not found and entries.get(b"LICENSES", (0, ""))[0] == TREE:
        found = _reuse_folder(objects, entries[b"LICENSES"][1])
    if found:
        expression, named = _combined(found)
        return _license(expression, named)
    for name in sorted(filter(is_metadata_file, files)):
        declared = declared_license(name, _content(objects, files[name]))
        if declared is not None:
            return _license(declared, [name])
    return License(None, False, "")


def _license(expression: str, names: list[bytes]) -> License:
    source = b" + ".join(names).decode("utf-8", "replace")
    return License(expression, is_permissive(expression), source)


def _license_files(objects: Objects, files: dict[bytes, str]) -> list[_Found]:
    found = []
    for name in sorted(filter(is_license_file, files)):
        spdx = license_of(_content(objects, files[name]))
        match = _FILE.match(name)
        if spdx is not None and match is not None:
            suffixed = match["suffix"] is not None or match["stem"].lower() == b"unlicense"
            found.append(_Found(name, spdx, suffixed))
    return found


def _reuse_folder(objects: Objects, tree: str) -> list[_Found]:
    """Each file of the folder is named after the id of the licence it holds; all of them apply."""
    try:
        names = [name for name, mode, _ in parse_tree(objects.tree(tree)) if mode != TREE]
    except (KeyError, ValueError):
        return []
    ids = [(n, n.removesuffix(b".txt").decode("ascii", "replace")) for n in sorted(names)]
    return [_Found(b"LICENSES/" + n, i, False) for n, i in ids if re.fullmatch(_ID, i)]


def _combined(found: list[_Found]) -> tuple[str, list[bytes]]:
    """One expression for all licence files, and the names of those it rests on.

    A file of each licence beside the other (`LICENSE-MIT`, `LICENSE-APACHE`, `UNLICENSE`) offers a
    choice. Anything else binds to all, but for the LGPL, which is an addition to the GPL's text.
    """
    names = [f.name for f in found]
    ids = sorted({f.spdx for f in found})
    lesser = [i for i in ids if i.startswith("LGPL-3")]
    if lesser and set(ids) <= {"GPL-3.0-only", *lesser}:
        ids = lesser
    choice = all(f.suffixed for f in found)
    if choice and len(ids) > 1:
        return " OR ".join(f"({i})" if " AND " in i else i for i in ids), names
    plain = {f.spdx for f in found if not f.suffixed}
    if len(plain) == 1 and plain < set(ids) and " AND " in (compound := next(iter(plain))):
        ids = [compound]  # one file that repeats the others
    return " AND ".join(f"({i})" if " OR " in i and len(ids) > 1 else i for i in ids), names


def _content(objects: Objects, blob: str) -> bytes:
    try:
        return objects.blob(blob)
    except (KeyError, CorruptObject):
        return b""
