"""Which licences are permissive: one list of SPDX ids, and the algebra of SPDX expressions.

A choice (`OR`) is as free as its freest part, a sum (`AND`) only as free as its strictest. Ids that
are not listed are unknown, never guessed: a licence wrongly called permissive costs more than one
that is missed.
"""

from __future__ import annotations

import re

PERMISSIVE, UNKNOWN, COPYLEFT = 0, 1, 2

#: Ids that ask for little more than attribution (and, some, that changes are stated).
_PERMISSIVE_IDS = (
    "0bsd afl-3.0 apache-1.1 apache-2.0 artistic-2.0 blueoak-1.0.0 bsd-1-clause bsd-2-clause"
    " bsd-2-clause-patent bsd-3-clause bsd-3-clause-clear bsd-4-clause bsl-1.0 cc-by-4.0 cc0-1.0"
    " ecl-2.0 isc mit mit-0 mulanpsl-2.0 ncsa postgresql psf-2.0 python-2.0 ruby unicode-3.0"
    " unlicense upl-1.0 w3c wtfpl x11 zlib"
)
_PERMISSIVE = frozenset(_PERMISSIVE_IDS.split())
_COPYLEFT = re.compile(
    r"(?:AGPL|CC-BY(?:-NC)?-SA|CDDL|CECILL|EPL|EUPL|L?GPL|MPL|MS-RL|OSL|SSPL)-", re.IGNORECASE
)
_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_DEEPEST = 32


def license_rank(expression: str | None) -> int:
    """Rank of an SPDX expression: `PERMISSIVE` 0, `UNKNOWN` 1, `COPYLEFT` 2; lower is freer.

    `OR` takes the lowest rank of its parts, `AND` the highest; an exception (`WITH`) only permits.
    What is no expression, or none at all, is unknown.
    """
    tokens = _TOKEN.findall(expression or "")
    try:
        rank, rest = _choice(tokens, 0)
    except ValueError:
        return UNKNOWN
    return UNKNOWN if rest else rank


def is_permissive(expression: str | None) -> bool:
    """Does an SPDX expression offer a permissive choice? Unknown is not permissive."""
    return license_rank(expression) == PERMISSIVE


def _choice(tokens: list[str], depth: int) -> tuple[int, list[str]]:
    rank, tokens = _sum(tokens, depth)
    while tokens and tokens[0].upper() == "OR":
        other, tokens = _sum(tokens[1:], depth)
        rank = min(rank, other)
    return rank, tokens


def _sum(tokens: list[str], depth: int) -> tuple[int, list[str]]:
    rank, tokens = _part(tokens, depth)
    while tokens and tokens[0].upper() == "AND":
        other, tokens = _part(tokens[1:], depth)
        rank = max(rank, other)
    return rank, tokens


def _part(tokens: list[str], depth: int) -> tuple[int, list[str]]:
    """One id, or an expression in parentheses. ValueError where it ends too early or too deep."""
    if not tokens:
        raise ValueError("an id is missing")
    if tokens[0] == "(":
        if depth == _DEEPEST:
            raise ValueError("nested too deeply")
        rank, tokens = _choice(tokens[1:], depth + 1)
        if tokens[:1] != [")"]:
            raise ValueError("no closing parenthesis")
        return rank, tokens[1:]
    rank, tokens = _rank_of_id(tokens[0]), tokens[1:]
    if tokens and tokens[0].upper() == "WITH":
        _, _exception, *tokens = tokens
    return rank, tokens


def _rank_of_id(spdx: str) -> int:
    if spdx.lower() in _PERMISSIVE:
        return PERMISSIVE
    return COPYLEFT if _COPYLEFT.match(spdx) else UNKNOWN
