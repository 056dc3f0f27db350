"""The algebra of SPDX expressions, and the two parts that use it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow import licenses
from codeflow.dedup import keys
from codeflow.filter import provenance
from codeflow.licenses import COPYLEFT, PERMISSIVE, UNKNOWN, is_permissive, license_rank

IDS = st.sampled_from(["MIT", "bsd-3-clause", "GPL-3.0-only", "MPL-2.0", "LicenseRef-X", "Foo"])
EXPRESSIONS = st.recursive(
    IDS,
    lambda parts: st.one_of(
        st.builds("({} OR {})".format, parts, parts),
        st.builds("({} and {})".format, parts, parts),
        st.builds("({})".format, parts),
    ),
    max_leaves=8,
)


def test_there_is_one_list() -> None:
    assert keys.license_rank is licenses.license_rank
    assert provenance.is_permissive is licenses.is_permissive


@pytest.mark.parametrize(
    ("expression", "rank"),
    [
        ("MIT", PERMISSIVE),
        ("mit", PERMISSIVE),
        ("PSF-2.0", PERMISSIVE),
        ("GPL-2.0-only", COPYLEFT),
        ("SSPL-1.0", COPYLEFT),
        ("AGPL-3.0-or-later", COPYLEFT),
        ("EPL-2.0", COPYLEFT),
        ("BUSL-1.1", UNKNOWN),
        ("LicenseRef-RSAL-2.0", UNKNOWN),
        ("MIT OR GPL-3.0-only", PERMISSIVE),
        ("MIT AND GPL-3.0-only", COPYLEFT),
        ("MIT AND Foo", UNKNOWN),
        ("Foo AND GPL-3.0-only", COPYLEFT),
        ("MIT AND ISC OR GPL-3.0-only", PERMISSIVE),  # AND binds closer
        ("MIT AND (ISC OR GPL-3.0-only)", PERMISSIVE),
        ("GPL-3.0-only AND (MIT OR ISC)", COPYLEFT),
        ("(MIT OR GPL-3.0-only) AND LGPL-2.1-only", COPYLEFT),
        ("Apache-2.0 WITH LLVM-exception", PERMISSIVE),
        ("GPL-2.0-only WITH Classpath-exception-2.0 OR MIT", PERMISSIVE),
        ("GPL-2.0-only WITH Classpath-exception-2.0", COPYLEFT),
    ],
)
def test_ranks(expression: str, rank: int) -> None:
    assert license_rank(expression) == rank
    assert is_permissive(expression) == (rank == PERMISSIVE)


@pytest.mark.parametrize(
    "expression",
    [None, "", " ", "OR", "MIT OR", "OR MIT", "MIT MIT", "(MIT", "MIT)", "()", "MIT WITH",
     "MIT AND", "( OR MIT)", "(" * 10_000 + "MIT" + ")" * 10_000, "MIT, Apache-2.0"],
)  # fmt: skip
def test_what_is_no_expression_is_unknown(expression: str | None) -> None:
    assert license_rank(expression) == UNKNOWN
    assert not is_permissive(expression)


@given(EXPRESSIONS, EXPRESSIONS)
def test_or_is_the_freest_and_and_the_strictest(a: str, b: str) -> None:
    assert license_rank(f"{a} OR {b}") == min(license_rank(a), license_rank(b))
    assert license_rank(f"{a} AND {b}") == max(license_rank(a), license_rank(b))
    assert license_rank(f"({a})") == license_rank(a)
    assert license_rank(f"{a} OR {b}") == license_rank(f"{b} OR {a}")


@given(st.text(alphabet="MIT()ORAND WITHfo.-10", max_size=60))
def test_any_text_has_a_rank(text: str) -> None:
    assert license_rank(text) in (PERMISSIVE, UNKNOWN, COPYLEFT)
