"""Sketches to and from `datasketch`, for users of its `jaccard`, `merge` and `MinHashLSH`.

`datasketch` is an extra and loaded on use only, since it pulls in scipy. Its `MinHashLSH` must be
given `params=(36, 7)`: what it chooses by itself for 256 permutations and a threshold of 0.7 finds
90 % of the pairs instead of 99.8 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from codeflow.dedup import cfmh1
from codeflow.errors import UsageError

if TYPE_CHECKING:
    from datasketch import MinHash

_INSTALL = "run `pip install codeflow[datasketch]`"


def shingle_hash32(shingle: int) -> int:
    """The hash function of converted sketches: `update` takes a 64-bit shingle of `cfmh1`."""
    return int(shingle) & 0xFFFFFFFF


def to_datasketch(row: bytes) -> MinHash:
    """A `signatures.minhash` value as `datasketch.MinHash`.

    Raises:
        UsageError: The value is empty (a change below `dedup.min_shingles`) or of another length,
            or datasketch 2 is not installed.
    """
    if len(row) != 4 * cfmh1.PERMUTATIONS:
        raise UsageError(
            f"a {cfmh1.SCHEME} sketch has {4 * cfmh1.PERMUTATIONS} bytes, this value has {len(row)}"
            ": take rows of `signatures` whose `minhash` is not empty"
        )
    return _minhash_class()(
        hashvalues=np.frombuffer(row, dtype="<u4"),
        permutations=cfmh1.permutations(),
        seed=1,
        scheme="affine32",
        hashfunc=shingle_hash32,
    )


def from_datasketch(sketch: MinHash) -> bytes:
    """A `datasketch.MinHash` as the bytes that `signatures.minhash` holds.

    Raises:
        UsageError: It was made with another scheme, seed or number of permutations.
    """
    found = (getattr(sketch, "scheme", "legacy"), sketch.seed, len(sketch))
    if found != ("affine32", 1, cfmh1.PERMUTATIONS):
        raise UsageError(
            f"a MinHash of scheme {found[0]}, seed {found[1]} and {found[2]} permutations cannot "
            f"be compared with {cfmh1.SCHEME}: make it with "
            f'MinHash(num_perm={cfmh1.PERMUTATIONS}, seed=1, scheme="affine32")'
        )
    row: bytes = sketch.hashvalues.astype("<u4").tobytes()
    return row


def _minhash_class() -> type[MinHash]:
    try:
        import datasketch
    except ImportError as e:
        raise UsageError(f"datasketch is not installed: {_INSTALL}") from e
    version = str(getattr(datasketch, "__version__", "unknown"))
    if version.split(".")[0] in ("0", "1"):
        raise UsageError(f"datasketch {version} lacks scheme affine32 (new in 2.0.0): {_INSTALL}")
    found: type[MinHash] = datasketch.MinHash
    return found
