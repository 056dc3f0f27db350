"""Licences recognised in the texts that this machine has, however they are dressed."""

from __future__ import annotations

import re
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repo_builder import LINK, Files, Repo, objects_of

from codeflow.licenses import license_rank
from codeflow.mine.fingerprints import KNOWN, SAMPLE, compare, fingerprint, fingerprints, trigrams
from codeflow.mine.license import License, is_license_file, license_of, license_of_tree

COMMON = Path("/usr/share/common-licenses")
PACKAGES = Path(sysconfig.get_path("purelib"))
#: Where a copy of each licence is found: a shared text, or a package's own file (newest if many).
SOURCES = {
    "Apache-2.0": COMMON / "Apache-2.0",
    "CC0-1.0": COMMON / "CC0-1.0",
    "GPL-1.0-only": COMMON / "GPL-1",
    "GPL-2.0-only": COMMON / "GPL-2",
    "GPL-3.0-only": COMMON / "GPL-3",
    "LGPL-2.0-only": COMMON / "LGPL-2",
    "LGPL-2.1-only": COMMON / "LGPL-2.1",
    "LGPL-3.0-only": COMMON / "LGPL-3",
    "MPL-1.1": COMMON / "MPL-1.1",
    "MPL-2.0": COMMON / "MPL-2.0",
    "Artistic-1.0-Perl": COMMON / "Artistic",
    "BSD-3-Clause": COMMON / "BSD",
    "MIT": "pluggy-*.dist-info/licenses/LICENSE",
    "MIT-0": "cffi-*.dist-info/licenses/LICENSE",
    "BSD-2-Clause": "packaging-*.dist-info/licenses/LICENSE.BSD",
    "Python-2.0": "typing_extensions-*.dist-info/licenses/LICENSE",
    "Zlib": "numpy-*.dist-info/licenses/**/libdivide/LICENSE.txt",
    "0BSD": "numpy-*.dist-info/licenses/**/pythoncapi-compat/COPYING",
}
#: A wording of its own, and one with the second half of a file about other code.
OTHERS = {
    "requests-*.dist-info/licenses/LICENSE": "Apache-2.0",  # without the appendix
    "jinja2-*.dist-info/licenses/LICENSE.txt": "BSD-3-Clause",
    "pygments-*.dist-info/licenses/LICENSE": "BSD-2-Clause",
    "hypothesis-*.dist-info/licenses/LICENSE.txt": "MPL-2.0",
    "jsonpointer-*.dist-info/licenses/LICENSE.txt": "BSD-3-Clause",
    "certifi-*.dist-info/licenses/LICENSE": "MPL-2.0",  # a notice, not the text
    "pygit2-*.dist-info/licenses/COPYING": "GPL-2.0-only",
    "packaging-*.dist-info/licenses/LICENSE": None,  # prose that points at two other files
}


def text_of(source: Path | str) -> bytes:
    if isinstance(source, Path):
        found = [source] if source.is_file() else []
    else:
        found = sorted(PACKAGES.glob(source))
    if not found:
        pytest.skip(f"no {source} on this machine")
    return found[-1].read_bytes()


def dressed(text: bytes) -> list[bytes]:
    """The same licence, wrapped, marked up, shouted, commented, and under another name."""
    plain = text.decode("utf-8", "replace")
    paragraphs = re.split(r"\n\s*\n", plain)
    wrapped = "\n\n".join(textwrap.fill(" ".join(p.split()), 50) for p in paragraphs)
    return [
        wrapped.encode(),
        ("# License\n\n" + "\n\n".join(" ".join(p.split()) for p in paragraphs)).encode(),
        "\n".join(" * " + line for line in plain.splitlines()).encode(),
        plain.replace("\n", "\r\n").encode(),
        plain.upper().encode(),
        ("\ufeffCopyright (c) 1999-2024, Ada & Sons\nAll rights reserved.\n\n" + plain).encode(),
    ]


@pytest.mark.parametrize("spdx", SOURCES)
def test_a_licence_in_any_dress(spdx: str) -> None:
    text = text_of(SOURCES[spdx])
    assert license_of(text) == spdx
    assert [license_of(t) for t in dressed(text)] == [spdx] * 6


@pytest.mark.parametrize("source", OTHERS)
def test_other_wordings(source: str) -> None:
    assert license_of(text_of(source)) == OTHERS[source]


def test_the_fingerprints_hold_what_they_say() -> None:
    found = {f.spdx: f for f in fingerprints()}
    assert tuple(found) == KNOWN
    for known in found.values():
        assert 50 <= len(known.hashes) <= SAMPLE
        assert max(known.hashes) <= known.limit
    for spdx in ("GPL-2.0-only", "MPL-2.0", "CC0-1.0", "Apache-2.0"):  # the sources agree
        text = text_of(SOURCES[spdx]).decode()
        assert len(fingerprint(spdx, text).hashes & found[spdx].hashes) > 0.9 * SAMPLE


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["a", "b", "c", "word", "other"]), min_size=3, max_size=60))
def test_likeness_lies_between_none_and_all(words: list[str]) -> None:
    hashes = trigrams(" ".join(words))
    assert len(hashes) == len({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    for likeness in compare(hashes):
        assert 0 <= likeness.dice <= 1
        assert 0 <= likeness.contained <= 1


MIT = "pluggy-*.dist-info/licenses/LICENSE"
BSD2 = "packaging-*.dist-info/licenses/LICENSE.BSD"


def test_several_licences_in_one_file_all_bind() -> None:
    both = text_of(MIT) + b"\n\nParts are under:\n\n" + text_of(COMMON / "GPL-2")
    assert license_of(both) == "GPL-2.0-only AND MIT"
    assert license_rank(license_of(both)) == 2


@pytest.mark.parametrize(
    "addition",
    [b'"Commons Clause" License Condition v1.0', b"Redis Source Available License 2.0 (RSALv2)",
     b"Server Side\nPublic License", b"Business Source License 1.1"],
)  # fmt: skip
@pytest.mark.parametrize("source", [MIT, COMMON / "Apache-2.0"], ids=["MIT", "Apache-2.0"])
def test_a_restriction_outweighs_the_licence_beside_it(source: Path | str, addition: bytes) -> None:
    found = license_of(addition + b"\n\n" + text_of(source))
    assert found is not None
    assert " AND " in found
    assert license_rank(found) > 0


def test_three_licences_of_which_none_is_permissive() -> None:
    """As redis since 2025: a choice of RSALv2, SSPLv1 and the AGPLv3, all in one file."""
    words = (
        b"Redis is licensed, at your option, under (a) the Redis Source Available License 2.0\n"
        b"(RSALv2), (b) the Server Side Public License v1 (SSPLv1), or (c) the GNU Affero General\n"
        b"Public License version 3.\n\n"
    )
    for text in (words, words + text_of(COMMON / "GPL-3")):
        found = license_of(text)
        assert found is not None
        assert {"LicenseRef-RSAL-2.0", "SSPL-1.0"} <= set(found.split(" AND "))
        assert license_rank(found) == 2


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        (b"SPDX-License-Identifier: MIT\n", "MIT"),
        (b"// SPDX-License-Identifier:  GPL-2.0 WITH Linux-syscall-note\n\nSee.",
         "GPL-2.0 WITH Linux-syscall-note"),
        (b"SPDX-License-Identifier: MIT OR Apache-2.0\nor ask us", "MIT OR Apache-2.0"),
        (b"SPDX-License-Identifier: OR\n", None),
        (b"All rights reserved.", None),
        (b"", None),
        (b"\0\xff" * 1000, None),
    ],
)  # fmt: skip
def test_tags_and_texts_that_say_nothing(text: bytes, spdx: str | None) -> None:
    assert license_of(text) == spdx


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "LICENCE.md", "license.txt", "COPYING", "COPYING.LESSER", "UNLICENSE", "LICENSES",
     "LICENSE-MIT", "LICENSE-APACHE.md", "LICENSE.Apache-2.0", "LICENSE_BSD.txt", "Copying.rst"],
)  # fmt: skip
def test_names_of_licence_files(name: str) -> None:
    assert is_license_file(name.encode())


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSEE", "my-license", "LICENSE-3RD-PARTY", "LICENSE-THIRD-PARTY.txt",
     "LICENSE.docs", "licenses.vendored", "copyingx", "LICENSE_HEADER", ""],
)  # fmt: skip
def test_names_of_other_files(name: str) -> None:
    assert not is_license_file(name.encode())


# -- trees ----------------------------------------------------------------------------------------


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "r.git")


def found_in(repo: Repo, files: Files) -> tuple[str | None, str]:
    found = license_of_tree(objects_of(repo), repo.tree({b"a.py": b"x\n", **files}))
    assert found.permissive == (license_rank(found.spdx) == 0)
    return found.spdx, found.source


def test_trees(repo: Repo) -> None:
    mit, bsd = text_of(MIT), text_of(BSD2)
    apache, gpl, lgpl = (text_of(COMMON / n) for n in ("Apache-2.0", "GPL-3", "LGPL-3"))
    npm = b'{"license": "ISC"}'
    cases: list[tuple[dict[bytes, Any], str | None, str]] = [
        ({}, None, ""),
        ({b"LICENSE": mit}, "MIT", "LICENSE"),
        ({b"LICENSE": mit, b"package.json": npm}, "MIT", "LICENSE"),
        ({b"LICENSE": b"ask us", b"package.json": npm}, "ISC", "package.json"),
        ({b"package.json": npm, b"Cargo.toml": b"[package]\nlicense='MIT/Apache-2.0'"},
         "MIT OR Apache-2.0", "Cargo.toml"),
        ({b"LICENSE-MIT": mit, b"LICENSE-APACHE": apache}, "Apache-2.0 OR MIT",
         "LICENSE-APACHE + LICENSE-MIT"),
        ({b"LICENSE": b"either of LICENSE.APACHE or LICENSE.BSD", b"LICENSE.APACHE": apache,
          b"LICENSE.BSD": bsd}, "Apache-2.0 OR BSD-2-Clause", "LICENSE.APACHE + LICENSE.BSD"),
        ({b"LICENSE": mit, b"LICENSE-3RD-PARTY": gpl}, "MIT", "LICENSE"),
        ({b"LICENSE": mit + b"\n\n" + apache, b"LICENSE-MIT": mit, b"LICENSE-APACHE": apache},
         "Apache-2.0 AND MIT", "LICENSE + LICENSE-APACHE + LICENSE-MIT"),
        ({b"UNLICENSE": b"SPDX-License-Identifier: Unlicense", b"LICENSE-MIT": mit},
         "MIT OR Unlicense", "LICENSE-MIT + UNLICENSE"),
        ({b"LICENSE": mit, b"COPYING": gpl}, "GPL-3.0-only AND MIT", "COPYING + LICENSE"),
        ({b"COPYING": gpl, b"COPYING.LESSER": lgpl}, "LGPL-3.0-only", "COPYING + COPYING.LESSER"),
        ({b"LICENSES/MIT.txt": mit, b"LICENSES/CC0-1.0.txt": b"x"}, "CC0-1.0 AND MIT",
         "LICENSES/CC0-1.0.txt + LICENSES/MIT.txt"),
        ({b"LICENSES/MIT.txt": mit, b"LICENSE": apache}, "Apache-2.0", "LICENSE"),
        ({b"src/LICENSE": mit}, None, ""),
        ({b"LICENSE": (LINK, b"src/LICENSE"), b"src/LICENSE": mit}, None, ""),
        ({b"LICENSE/x": mit}, None, ""),
    ]  # fmt: skip
    for files, spdx, source in cases:
        assert found_in(repo, files) == (spdx, source), files.keys()


def test_damage_is_as_good_as_absence(repo: Repo) -> None:
    objects = objects_of(repo)
    missing = "12" * 20
    assert license_of_tree(objects, missing) == License(None, False, "")
    tree = repo.raw_tree((0o100644, b"LICENSE", missing), (0o100644, b"package.json", missing))
    assert license_of_tree(objects, tree) == License(None, False, "")
    assert license_of_tree(objects, repo.blob(b"no tree")) == License(None, False, "")
    tree = repo.raw_tree((0o040000, b"LICENSES", missing))
    assert license_of_tree(objects, tree) == License(None, False, "")
