"""The licence that a package's own metadata declares, as an SPDX expression.

Only fields whose meaning is fixed are read, and only what is an SPDX expression, a well-known old
spelling of one, or a trove classifier is believed. Files that are programs (`*.gemspec`) are
searched for the one assignment that is usual there, never run.
"""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

_ID = r"[A-Za-z][A-Za-z0-9.+-]*|0BSD"
_EXPRESSION = re.compile(rf"\(*(?:{_ID})\)*(?:\s+(?:OR|AND|WITH)\s+\(*(?:{_ID})\)*)*\Z")
#: Old spellings that can mean only one licence, lower case. "BSD" and "GPL" name no version.
_SPELLINGS = {
    "mit license": "MIT", "the mit license": "MIT", "the mit license (mit)": "MIT",
    "apache 2": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache license version 2.0": "Apache-2.0",
    "the apache license, version 2.0": "Apache-2.0", "apache2": "Apache-2.0",
    "the apache software license, version 2.0": "Apache-2.0", "isc license": "ISC",
    "apache software license 2.0": "Apache-2.0", "bsd 3-clause": "BSD-3-Clause",
    "bsd-3-clause license": "BSD-3-Clause", "3-clause bsd": "BSD-3-Clause",
    "new bsd license": "BSD-3-Clause", "bsd 2-clause": "BSD-2-Clause", "mpl 2.0": "MPL-2.0",
    "simplified bsd license": "BSD-2-Clause", "mozilla public license 2.0": "MPL-2.0",
    "gplv2": "GPL-2.0-only", "gplv3": "GPL-3.0-only", "agplv3": "AGPL-3.0-only",
    "eclipse public license 2.0": "EPL-2.0", "eclipse public license v2.0": "EPL-2.0",
    "gnu general public license v3": "GPL-3.0-only", "the unlicense": "Unlicense",
}  # fmt: skip
_CLASSIFIERS = {
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "License :: OSI Approved :: GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "License :: OSI Approved :: GNU General Public License v3 or later (GPLv3+)":
        "GPL-3.0-or-later",
    "License :: OSI Approved :: GNU Affero General Public License v3": "AGPL-3.0-only",
    "License :: OSI Approved :: The Unlicense (Unlicense)": "Unlicense",
    "License :: OSI Approved :: zlib/libpng License": "Zlib",
}  # fmt: skip
#: Not expressions, though they look like one id.
_TOO_VAGUE = "unlicensed proprietary bsd gpl lgpl agpl apache none unknown other"
_NO_LICENSE = frozenset(_TOO_VAGUE.split())
_MAX_BYTES = 1 << 20


def is_metadata_file(name: bytes) -> bool:
    """Is this a file (at the root of a tree) in which packages declare their licence?"""
    return name in _READERS or name.endswith(b".gemspec")


def declared_license(name: bytes, data: bytes) -> str | None:
    """The licence a metadata file declares, None when it declares none that is understood."""
    read = _READERS.get(name, _gemspec)
    try:
        return read(data[:_MAX_BYTES].decode("utf-8", "replace"))
    except (ValueError, RecursionError, configparser.Error):  # malformed: it declares nothing
        return None


def expression_of(text: object) -> str | None:
    """An SPDX expression from what people write into licence fields; None when it is unclear."""
    if not isinstance(text, str) or len(text) > 200:
        return None
    plain = " ".join(text.split())
    if spelled := _SPELLINGS.get(plain.lower()):
        return spelled
    if re.fullmatch(rf"(?:{_ID})(?:\s*/\s*(?:{_ID}))+", plain):  # Cargo's spelling before SPDX
        plain = " OR ".join(part.strip() for part in plain.split("/"))
    if plain.lower() in _NO_LICENSE or not _EXPRESSION.match(plain):
        return None
    return plain if plain.count("(") == plain.count(")") else None


def _any_of(values: Iterable[object]) -> str | None:
    """A choice between several declared licences; None when one is not understood."""
    found = [expression_of(value) for value in values]
    return " OR ".join(v for v in found if v) if found and all(found) else None


def _classified(classifiers: Iterable[object]) -> str | None:
    found = [_CLASSIFIERS.get(str(c)) for c in classifiers if str(c).startswith("License ::")]
    return found[0] if len(found) == 1 else None


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _pyproject(text: str) -> str | None:
    data = tomllib.loads(text)
    project = _table(data.get("project"))
    poetry = _table(_table(data.get("tool")).get("poetry"))
    declared = project.get("license", poetry.get("license"))
    named = expression_of(_table(declared).get("text", declared))
    return named or _classified(_list(project.get("classifiers", poetry.get("classifiers"))))


def _setup_cfg(text: str) -> str | None:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read_string(text)
    if not parser.has_section("metadata"):
        return None
    section = parser["metadata"]
    lines = section.get("classifiers", section.get("classifier", "")).splitlines()
    return expression_of(section.get("license", "")) or _classified(c.strip() for c in lines)


def _package_json(text: str) -> str | None:
    data = _table(json.loads(text))
    declared = data.get("license", data.get("licenses"))
    if isinstance(declared, list):
        return _any_of(_table(d).get("type", d) for d in declared)
    return expression_of(_table(declared).get("type", declared))


def _composer(text: str) -> str | None:
    declared = _table(json.loads(text)).get("license")
    return _any_of(declared) if isinstance(declared, list) else expression_of(declared)


def _cargo(text: str) -> str | None:
    data = tomllib.loads(text)
    package = _table(data.get("package")) or _table(_table(data.get("workspace")).get("package"))
    return expression_of(package.get("license"))


def _pom(text: str) -> str | None:
    """Names inside `<licenses>`; read without an XML parser, which entities could blow up."""
    block = re.search(r"<licenses>(.*?)</licenses>", text, re.DOTALL)
    return _any_of(re.findall(r"<name>([^<]*)</name>", block.group(1))) if block else None


def _gemspec(text: str) -> str | None:
    one = re.search(r"""^\s*\w+\.license\s*=\s*["']([^"'\n]+)["']""", text, re.MULTILINE)
    if one:
        return expression_of(one.group(1))
    many = re.search(r"^\s*\w+\.licenses\s*=\s*\[([^\]\n]*)\]", text, re.MULTILINE)
    return _any_of(re.findall(r"""["']([^"']+)["']""", many.group(1))) if many else None


_READERS: dict[bytes, Callable[[str], str | None]] = {
    b"pyproject.toml": _pyproject,
    b"setup.cfg": _setup_cfg,
    b"package.json": _package_json,
    b"Cargo.toml": _cargo,
    b"composer.json": _composer,
    b"pom.xml": _pom,
}
