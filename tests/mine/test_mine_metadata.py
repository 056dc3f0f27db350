"""What package metadata declares, and what is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.mine.metadata import declared_license, expression_of, is_metadata_file

MIT_CLASSIFIER = '"License :: OSI Approved :: MIT License"'
APACHE_CLASSIFIER = '"License :: OSI Approved :: Apache Software License"'


@pytest.mark.parametrize(
    ("name", "data", "spdx"),
    [
        ("pyproject.toml", '[project]\nlicense = "MIT OR Apache-2.0"', "MIT OR Apache-2.0"),
        ("pyproject.toml", '[project]\nlicense = {text = "MIT License"}', "MIT"),
        ("pyproject.toml", '[project]\nlicense = {file = "LICENSE"}', None),
        ("pyproject.toml", f"[project]\nclassifiers = [{MIT_CLASSIFIER}]", "MIT"),
        (
            "pyproject.toml",
            f"[project]\nclassifiers = [{MIT_CLASSIFIER}, {APACHE_CLASSIFIER}]",
            None,
        ),
        ("pyproject.toml", '[tool.poetry]\nlicense = "BSD-3-Clause"', "BSD-3-Clause"),
        ("pyproject.toml", '[project]\nname = "x"', None),
        ("pyproject.toml", "[project", None),
        ("pyproject.toml", "project = 3", None),
        ("setup.cfg", "[metadata]\nlicense = BSD 3-Clause\n", "BSD-3-Clause"),
        ("setup.cfg", f"[metadata]\nclassifiers =\n  A :: B\n  {MIT_CLASSIFIER[1:-1]}\n", "MIT"),
        ("setup.cfg", "[metadata]\nlicense = %(boom)s\n", None),
        ("setup.cfg", "[other]\n", None),
        ("setup.cfg", "no section", None),
        ("package.json", '{"license": "ISC"}', "ISC"),
        ("package.json", '{"license": "(MIT OR GPL-3.0-or-later)"}', "(MIT OR GPL-3.0-or-later)"),
        ("package.json", '{"license": {"type": "MIT", "url": "x"}}', "MIT"),
        ("package.json", '{"licenses": [{"type": "MIT"}, {"type": "Apache-2.0"}]}',
         "MIT OR Apache-2.0"),
        ("package.json", '{"licenses": [{"type": "MIT"}, {"type": "our own terms"}]}', None),
        ("package.json", '{"license": "SEE LICENSE IN eula.txt"}', None),
        ("package.json", '{"license": "UNLICENSED"}', None),
        ("package.json", "[1]", None),
        ("package.json", '{"license": 7}', None),
        ("package.json", "[" * 100_000, None),
        ("Cargo.toml", '[package]\nlicense = "MIT/Apache-2.0"', "MIT OR Apache-2.0"),
        ("Cargo.toml", '[workspace.package]\nlicense = "MPL-2.0"', "MPL-2.0"),
        ("Cargo.toml", "[package]\nlicense.workspace = true", None),
        ("composer.json", '{"license": ["MIT", "GPL-2.0-only"]}', "MIT OR GPL-2.0-only"),
        ("composer.json", '{"license": "proprietary"}', None),
        ("pom.xml", "<licenses><license>\n<name>Apache License, Version 2.0</name></license>"
         "</licenses>", "Apache-2.0"),
        ("pom.xml", "<project><name>MIT</name></project>", None),
        ("x.gemspec", "  s.license     = 'MIT'\n", "MIT"),
        ("x.gemspec", 'spec.licenses = ["Ruby", "BSD-2-Clause"]\n', "Ruby OR BSD-2-Clause"),
        ("x.gemspec", "  # s.license = 'MIT'\n", None),
        ("x.gemspec", "  s.license = `id`\n", None),
    ],
)  # fmt: skip
def test_declarations(name: str, data: str, spdx: str | None) -> None:
    assert is_metadata_file(name.encode())
    assert declared_license(name.encode(), data.encode()) == spdx


@pytest.mark.parametrize(
    "text",
    ["BSD", "GPL", "Apache", "see LICENSE", "", "MIT OR", "MIT and more", "(MIT", "<mit>", 5, None,
     "MIT " * 99, "none", "©"],
)  # fmt: skip
def test_what_is_unclear_is_unknown(text: object) -> None:
    assert expression_of(text) is None


def test_other_files_are_no_metadata() -> None:
    for name in (b"setup.py", b"package-lock.json", b"PKG-INFO", b"cargo.toml", b"pom.xml.bak"):
        assert not is_metadata_file(name)


@given(
    st.sampled_from(["pyproject.toml", "setup.cfg", "package.json", "Cargo.toml", "composer.json",
                     "pom.xml", "x.gemspec"]),
    st.one_of(st.binary(max_size=99), st.text(max_size=99).map(str.encode)),
)  # fmt: skip
def test_no_content_breaks_it(name: str, data: bytes) -> None:
    declared = declared_license(name.encode(), data)
    assert declared is None or expression_of(declared) == declared
