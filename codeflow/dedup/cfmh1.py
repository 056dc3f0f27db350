"""The sketch scheme `cfmh1`: tokens, shingles, MinHash values and band hashes, in numpy.

    text      bytes
    token     longest run of [A-Za-z0-9_] and bytes >= 0x80; case is kept
    token     -> fmix64(sum (byte_i + 1) * B^(len-1-i))
    shingle   -> fmix64(sum token_i * P^(n-1-i)) over n = 5 tokens in a row; a text of 1 to 4
                 tokens is one shingle of all of them, a text without tokens has none
    MinHash   h = fmix32(low 32 bits of the shingle); value_j = min(a_j * h + b_j)
    band      -> the token hash of 32 bytes: band index and 7 MinHash values, uint32 little-endian

Arithmetic is modulo 2^64 (2^32 for MinHash), so the bits depend on no platform, no library
version and no order of the input. MinHash values equal those of `datasketch.MinHash(num_perm=256,
seed=1, scheme="affine32")` over the low halves of the shingles. 36 bands of 7 rows find 99.8 % of
pairs with J >= 0.7; about half of the candidates are false, which exact verification pays for.
Any change of a bit here needs a new scheme name: stored sketches of two schemes cannot be compared.

Sources: Broder 1997 (MinHash, shingles); Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
ch. 3 (banding); MurmurHash3 (fmix32, fmix64).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from codeflow.errors import VerificationError

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

SCHEME: Final = "cfmh1"
PERMUTATIONS: Final = 256
BANDS: Final = 36
ROWS: Final = 7
NGRAM: Final = 5

_B: Final = np.uint64(0x9E3779B97F4A7C15)
_P: Final = np.uint64(0xD6E8FEB86659FD93)
_PERMUTATIONS_FILE: Final = Path(__file__).with_name("cfmh1_permutations.npy")
_PERMUTATIONS_SHA256: Final = "09072e054d315a8472068a356bd99eb069b8f9835aee5fe2b7634f0717c84288"
_WORD: Final = np.array([c >= 0x80 or c == 0x5F or chr(c).isalnum() for c in range(256)])
_CHARACTER: Final = np.arange(1, 257, dtype=np.uint64)
#: Work is cut into pieces of this size, so that the temporary arrays stay in cache.
_TEXT_BYTES: Final = 1 << 17
_PIECE_SHINGLES: Final = 1 << 16


class ShingleSets(NamedTuple):
    """Shingle sets of many texts, one after the other.

    Attributes:
        values: uint64, the sets; each is sorted and free of repetitions.
        offsets: int64, one more than there are texts; set i is `values[offsets[i]:offsets[i+1]]`.
    """

    values: U64
    offsets: I64

    def of(self, i: int) -> U64:
        """The set of text i, as a view."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def sizes(self) -> I64:
        """Distinct shingles of each text."""
        return np.diff(self.offsets)


def shingle_sets(texts: Sequence[bytes]) -> ShingleSets:
    """Sets of 64-bit shingle hashes of texts.

    Needs about 40 bytes of memory per byte of the longest text.
    """
    parts = [_shingles(piece) for piece in _pieces(texts)]
    sizes = np.concatenate([p.sizes for p in parts])
    return ShingleSets(np.concatenate([p.values for p in parts]), _offsets(sizes))


def minhash(sets: ShingleSets) -> U32:
    """MinHash values of shingle sets.

    Returns:
        Array of shape (texts, 256), C order. The row of an empty set is all ones, as datasketch
        has it; it resembles every other empty set and must not be compared.
    """
    a, b = permutations()
    result = np.full((len(sets.offsets) - 1, PERMUTATIONS), 0xFFFFFFFF, dtype=np.uint32)
    filled = np.flatnonzero(sets.sizes)
    starts, ends = sets.offsets[filled], sets.offsets[filled + 1]
    first = 0
    while first < len(filled):
        limit = starts[first] + _PIECE_SHINGLES
        last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        h = _fmix32(sets.values[starts[first] : ends[last - 1]].astype(np.uint32))
        result[filled[first:last]] = _minima(h, starts[first:last] - starts[first], a, b)
        first = last
    return result


def band_hashes(signatures: U32) -> U64:
    """Band hashes of MinHash rows: texts that share one are candidates.

    Args:
        signatures: Shape (texts, 256); the last 4 values take no part.

    Returns:
        Array of shape (texts, 36).
    """
    n = len(signatures)
    records = np.empty((n, BANDS, 1 + ROWS), dtype="<u4")
    records[:, :, 0] = np.arange(BANDS)
    records[:, :, 1:] = signatures[:, : BANDS * ROWS].reshape(n, BANDS, ROWS)
    data = records.view(np.uint8)
    total = np.zeros((n, BANDS), dtype=np.uint64)
    for i in range(data.shape[2]):  # Horner's rule; a byte of all records at a time
        total = total * _B + data[:, :, i] + np.uint64(1)
    return _fmix64(total)


def jaccard(a: U64, b: U64) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets; 0 when both are empty."""
    common = np.intersect1d(a, b, assume_unique=True).size
    union = a.size + b.size - common
    return common / union if union else 0.0


@functools.cache
def permutations() -> U32:
    """The 256 affine maps h -> a * h + b modulo 2^32, all a odd; shape (2, 256).

    Raises:
        VerificationError: The installed constants are not those of the scheme.
    """
    table: U32 = np.load(_PERMUTATIONS_FILE, allow_pickle=False)
    if hashlib.sha256(table.astype("<u4").tobytes()).hexdigest() != _PERMUTATIONS_SHA256:
        raise VerificationError(
            f"{_PERMUTATIONS_FILE} does not hold the constants of {SCHEME}: reinstall codeflow"
        )
    table.setflags(write=False)
    return table


def _pieces(texts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Runs of texts of at most `_TEXT_BYTES` together; a longer text comes alone.

    There is always one, if only an empty one.
    """
    first, size = 0, 0
    for i, text in enumerate(texts):
        if size and size + len(text) > _TEXT_BYTES:
            yield texts[first:i]
            first, size = i, 0
        size += len(text)
    yield texts[first:]


def _shingles(texts: Sequence[bytes]) -> ShingleSets:
    tokens, offsets = _token_hashes(texts)
    n_tokens = np.diff(offsets)
    index = np.arange(len(tokens)) - np.repeat(offsets[:-1], n_tokens)
    left = np.repeat(n_tokens, n_tokens) - index
    padded = np.concatenate([tokens, np.zeros(NGRAM - 1, dtype=np.uint64)])
    hashes = tokens
    for k in range(1, NGRAM):  # Horner's rule again, ending where the text ends
        hashes = np.where(left > k, hashes * _P + padded[k : k + len(tokens)], hashes)
    hashes = _fmix64(hashes[(left >= NGRAM) | (index == 0)])
    return _distinct(hashes, _offsets(np.maximum(n_tokens - (NGRAM - 1), np.minimum(n_tokens, 1))))


def _token_hashes(texts: Sequence[bytes]) -> tuple[U64, I64]:
    """Hashes of the tokens of all texts, and where each text's tokens start."""
    # A line feed is no part of a token: it keeps the last token of a text from the next one.
    data = np.frombuffer(b"\n" + b"\n".join(texts) + b"\n", dtype=np.uint8)
    in_token = _WORD.take(data)
    flips = np.flatnonzero(in_token[1:] != in_token[:-1])
    before, last = flips[::2], flips[1::2]  # of each token: the byte before it, its last byte
    text_starts = _offsets(np.array([len(t) + 1 for t in texts], dtype=np.int64))
    # B is odd, so it has an inverse modulo 2^64 and the sum over any stretch of bytes, here
    # sum c_i B^(last-i), is a difference of running totals of c_i B^-i, times B^last.
    powers, inverses = _powers(max(2 * _TEXT_BYTES, len(data)))
    totals = np.cumsum(_CHARACTER.take(data) * inverses[: len(data)])
    hashes = _fmix64((totals[last] - totals[before]) * powers[last])
    return hashes, np.searchsorted(before, text_starts).astype(np.int64)


@functools.lru_cache(maxsize=1)
def _powers(n: int) -> tuple[U64, U64]:
    """B^0 … B^(n-1) and B^-0 … B^-(n-1) modulo 2^64."""
    tables = np.ones((2, n), dtype=np.uint64)
    tables[0, 1:] = _B
    tables[1, 1:] = pow(int(_B), -1, 1 << 64)
    positive, negative = np.cumprod(tables, axis=1)
    return positive, negative


def _distinct(values: U64, offsets: I64) -> ShingleSets:
    """Sort each text's shingles (in place) and drop repetitions."""
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        values[start:end].sort()
    new = np.ones(len(values), dtype=np.bool_)
    new[1:] = values[1:] != values[:-1]
    new[offsets[:-1][np.diff(offsets) > 0]] = True
    kept_before = _offsets(new)
    return ShingleSets(values[new], kept_before[offsets])


def _minima(h: U32, starts: I64, a: U32, b: U32) -> U32:
    """min(a_j * h + b_j) over the values of each set; shape (sets, permutations)."""
    result = np.empty((len(a), len(starts)), dtype=np.uint32)
    mixed = np.empty_like(h)
    for j in range(len(a)):
        np.multiply(h, a[j], out=mixed)
        np.add(mixed, b[j], out=mixed)
        np.minimum.reduceat(mixed, starts, out=result[j])
    return result.T


def _offsets(sizes: npt.NDArray[np.bool_] | I64) -> I64:
    result = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=result[1:])
    return result


def _fmix64(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def _fmix32(x: U32) -> U32:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
