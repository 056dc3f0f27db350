"""What a path alone says about a file: language, test or not, safe or hostile.

Paths are bytes as git stores them. Rules look at names only, so they cost about a microsecond.
"""

from __future__ import annotations

import functools
import re

_EXTENSIONS: dict[str, str] = {
    "Assembly": "asm s",
    "C": "c h",
    "C#": "cs",
    "C++": "cc cpp cxx c++ hh hpp hxx h++ inl ipp tpp",
    "CMake": "cmake",
    "CSS": "css",
    "Clojure": "clj cljc cljs",
    "Cuda": "cu cuh",
    "Cython": "pxd pxi pyx",
    "Dart": "dart",
    "Elixir": "ex exs",
    "Erlang": "erl hrl",
    "F#": "fs fsi fsx",
    "Fortran": "f f90 f95",
    "Go": "go",
    "Groovy": "gradle groovy",
    "HTML": "htm html",
    "Haskell": "hs",
    "JSON": "json jsonl",
    "Java": "java",
    "JavaScript": "cjs js jsx mjs",
    "Julia": "jl",
    "Kotlin": "kt kts",
    "Lua": "lua",
    "Markdown": "markdown md mdx",
    "OCaml": "ml mli",
    "Objective-C": "m mm",
    "PHP": "php",
    "Perl": "pl pm",
    "PowerShell": "ps1 psm1",
    "Protocol Buffer": "proto",
    "Python": "py pyi",
    "R": "r",
    "Ruby": "gemspec rake rb",
    "Rust": "rs",
    "SCSS": "sass scss",
    "SQL": "sql",
    "Scala": "sc scala",
    "Shell": "bash sh zsh",
    "Svelte": "svelte",
    "Swift": "swift",
    "TOML": "toml",
    "Tcl": "tcl",
    "Text": "txt",
    "TypeScript": "cts mts ts",
    "TSX": "tsx",
    "Vue": "vue",
    "XML": "xml",
    "YAML": "yaml yml",
    "Zig": "zig",
    "reStructuredText": "rst",
}
_NAMES = {
    b"CMakeLists.txt": "CMake",
    b"Dockerfile": "Dockerfile",
    b"Gemfile": "Ruby",
    b"Makefile": "Makefile",
    b"Rakefile": "Ruby",
}
_BY_EXTENSION = {
    extension.encode(): language
    for language, extensions in _EXTENSIONS.items()
    for extension in extensions.split()
}
#: Languages in which nothing is programmed: text, data and markup.
PROSE_AND_DATA = frozenset(
    {"", "HTML", "JSON", "Markdown", "Text", "TOML", "XML", "YAML", "reStructuredText"}
)

_TEST = re.compile(
    rb"(?:^|/)(?:tests?|testing|spec|specs|__tests__|testdata)/"
    rb"|(?:^|/)test_[^/]*$|(?:^|/)[^/]*_test\.[^/.]+$|(?:^|/)[^/]*_spec\.[^/.]+$"
    rb"|(?:^|/)[^/]*\.(?:test|spec)\.[^/.]+$|(?:^|/)[^/]*Tests?\.(?:java|kt|cs|scala|swift|php)$"
    rb"|(?:^|/)conftest\.py$"
)


@functools.lru_cache(maxsize=65536)
def language_of(path: bytes) -> str:
    """Programming language by name or extension; empty when the name does not say."""
    name = path.rpartition(b"/")[2]
    if name in _NAMES:
        return _NAMES[name]
    stem, dot, extension = name.rpartition(b".")
    return _BY_EXTENSION.get(extension.lower(), "") if dot and stem else ""


def is_code(path: bytes) -> bool:
    """Is the file written in a programming language, as opposed to prose, data or markup?"""
    return language_of(path) not in PROSE_AND_DATA


@functools.lru_cache(maxsize=65536)
def is_test(path: bytes) -> bool:
    """Does the path follow a usual naming rule for tests?

    Whole path components and name affixes only: `latest.py` and `contest/` are not tests.
    """
    return _TEST.search(path) is not None


def is_safe(path: bytes) -> bool:
    """Could git itself check this path out?

    Not with `..`, `.git`, empty parts, NUL, over 4 KiB, or below 250 folders: trees are walked by
    recursion.
    """
    if not path or len(path) > 4096 or path.count(b"/") > 250 or b"\0" in path:
        return False
    return all(
        part not in (b"", b".", b"..") and part.lower() not in (b".git", b"git~1")
        for part in path.split(b"/")
    )
