"""Which licence a tree carries, as an SPDX id, from its licence file's own words.

The licence must be read at the window, not at HEAD: redis was BSD until 2024. Recognises the
licences that cover nearly all public code by phrases that only they contain; anything else is
reported as unknown, never guessed.
"""

from __future__ import annotations

import re

_FILE = re.compile(
    rb"(?:licen[cs]e|copying|unlicense)(?:[.-](?:md|txt|rst|mit|apache|bsd))?\Z", re.I
)
_SPDX_TAG = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+-]+)")

# First match wins, so narrower texts stand before the ones they quote or resemble.
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


def is_license_file(name: bytes) -> bool:
    """Is this the name of a licence file (at the root of a tree)?"""
    return _FILE.match(name) is not None


def license_of(text: bytes) -> str | None:
    """SPDX id of a licence text, None when it is none of the known ones."""
    words = " ".join(text[:100_000].decode("utf-8", "replace").split())
    if tag := _SPDX_TAG.search(words):
        return tag.group(1)
    words = words.lower()
    for spdx, phrases in _PHRASES:
        if all(phrase in words for phrase in phrases):
            return spdx
    return None
