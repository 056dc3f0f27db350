"""The numpy implementation of cfmh1 against a plain Python one, datasketch and stored values."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import struct
from collections import Counter, defaultdict
from pathlib import Path

import dedup_triples as make
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeflow.dedup import cfmh1, keys
from codeflow.errors import VerificationError

GOLDEN = Path(__file__).with_name("cfmh1_golden.json")
M64 = (1 << 64) - 1
B, P = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
TEXTS = {
    "empty": b"",
    "no tokens": b" \t{}()\n+-*/\n",
    "one token": b"token",
    "four tokens": b"a b c d",
    "five tokens": b"a b c d e",
    "repetition": b"x = x + 1\n" * 40,
    "non-ASCII": "größe = länge × 名前_1 + ß and some more words".encode(),
    "not UTF-8": b"caf\xe9 \xff\xfe \x80_x and 1 2 3",
    "CRLF": b"if a:\r\n    return b\r\nelse:\r\n    return c\r\n",
    "NUL": b"a\0b\0\0c d\0e f g h",
    "case": b"Foo foo FOO fOo foO FoO",
    "patch": b"zzadd def f(self, value):\nzzdel     return self.value\nzzadd     return value",
}


def fmix64(x: int) -> int:
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & M64
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


def fmix32(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def polynomial(values: list[int], base: int) -> int:
    total = 0
    for value in values:
        total = (total * base + value) & M64
    return fmix64(total)


def byte_hash(data: bytes) -> int:
    return polynomial([byte + 1 for byte in data], B)


def plain_shingles(text: bytes) -> list[int]:
    tokens = [byte_hash(token) for token in re.findall(rb"[A-Za-z0-9_\x80-\xff]+", text)]
    n = min(5, len(tokens))
    windows = range(len(tokens) - n + 1) if n else ()
    return sorted({polynomial(tokens[i : i + n], P) for i in windows})


def plain_minhash(shingles: list[int]) -> list[int]:
    a, b = cfmh1.permutations().tolist()
    mixed = [fmix32(s & 0xFFFFFFFF) for s in shingles]
    return [
        min(((x * h + y) & 0xFFFFFFFF for h in mixed), default=0xFFFFFFFF)
        for x, y in zip(a, b, strict=True)
    ]


def plain_bands(row: list[int]) -> list[int]:
    return [
        byte_hash(struct.pack("<8I", band, *row[7 * band : 7 * band + 7])) for band in range(36)
    ]


def test_permutations_are_those_of_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    reference = datasketch.MinHash(num_perm=256, seed=1, scheme="affine32")
    assert np.array_equal(cfmh1.permutations(), reference.permutations)
    assert cfmh1.permutations().dtype == np.uint32


def test_permutations_start_with_the_published_ones() -> None:
    """First 128 are affine32's for k = 128 in `a`; all `a` are odd, so each map is a bijection."""
    a, _ = cfmh1.permutations()
    state = np.random.RandomState(1)
    assert np.array_equal(a[:128], state.randint(0, 1 << 31, 128, dtype=np.uint32) * 2 + 1)
    assert (a % 2 == 1).all()


def test_damaged_permutations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cfmh1.permutations().copy()
    table[1, 255] ^= 1
    np.save(tmp_path / "p.npy", table)
    monkeypatch.setattr(cfmh1, "_PERMUTATIONS_FILE", tmp_path / "p.npy")
    with pytest.raises(VerificationError, match="reinstall"):
        cfmh1.permutations.__wrapped__()


def test_golden_values() -> None:
    """Stored once from the plain implementation: no change of this package may change a bit."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["scheme"] == cfmh1.SCHEME
    assert golden["texts"].keys() == TEXTS.keys()
    sets = cfmh1.shingle_sets(list(TEXTS.values()))
    rows = cfmh1.minhash(sets)
    bands = cfmh1.band_hashes(rows)
    for i, (name, text) in enumerate(TEXTS.items()):
        expected = golden["texts"][name]
        assert bytes.fromhex(expected["text"]) == text
        assert [f"{s:016x}" for s in sets.of(i).tolist()][:8] == expected["shingles"], name
        assert len(sets.of(i)) == expected["n_shingles"]
        for key, value in (("minhash", rows[i].astype("<u4")), ("bands", bands[i].astype("<u8"))):
            assert value[:4].tolist() == expected[key], name
            assert hashlib.sha256(value.tobytes()).hexdigest() == expected[f"{key}_sha256"], name


@pytest.mark.parametrize("name", TEXTS)
def test_equals_plain_python(name: str) -> None:
    sets = cfmh1.shingle_sets([TEXTS[name]])
    row = cfmh1.minhash(sets)
    assert sets.values.tolist() == plain_shingles(TEXTS[name])
    assert row[0].tolist() == plain_minhash(sets.values.tolist())
    assert cfmh1.band_hashes(row)[0].tolist() == plain_bands(row[0].tolist())


pieces = st.sampled_from(
    [b" ", b"\n", b"\r\n", b"\0", b"a", b"B", b"_9", b"\x80", b"\xff", b"-", b"w"]
)
random_texts = st.lists(
    st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=40).map(b"".join)), max_size=8
)


@settings(max_examples=150, deadline=None)
@given(random_texts)
def test_any_batch_equals_plain_python(texts: list[bytes]) -> None:
    sets = cfmh1.shingle_sets(texts)
    assert len(sets.offsets) == len(texts) + 1
    for i, text in enumerate(texts):
        assert sets.of(i).tolist() == plain_shingles(text)


@settings(max_examples=40, deadline=None)
@given(random_texts, st.integers(1, 40), st.integers(1, 6))
def test_batching_changes_nothing(texts: list[bytes], text_bytes: int, shingles: int) -> None:
    whole = cfmh1.shingle_sets(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfmh1, "_TEXT_BYTES", text_bytes)
        patch.setattr(cfmh1, "_PIECE_SHINGLES", shingles)
        cut = cfmh1.shingle_sets(texts)
        cut_rows = cfmh1.minhash(cut)
    assert np.array_equal(whole.values, cut.values)
    assert np.array_equal(whole.offsets, cut.offsets)
    assert np.array_equal(cfmh1.minhash(whole), cut_rows)


def test_minhash_equals_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    rng = random.Random(5)
    texts = [" ".join(make.words(rng, rng.randrange(200))).encode() for _ in range(40)]
    sets = cfmh1.shingle_sets([*TEXTS.values(), *texts])
    rows = cfmh1.minhash(sets)
    for i, row in enumerate(rows):
        peer = datasketch.MinHash(num_perm=256, seed=1, scheme="affine32", hashfunc=int)
        peer.update_batch((sets.of(i) & np.uint64(0xFFFFFFFF)).tolist())
        assert np.array_equal(peer.hashvalues, row)


def test_a_megabyte_text() -> None:
    rng = random.Random(6)
    text = b" ".join(rng.randbytes(rng.randrange(1, 12)) for _ in range(140_000))
    assert len(text) > 900_000
    sets = cfmh1.shingle_sets([b"before it", text, b"after it"])
    assert sets.of(1).tolist() == plain_shingles(text)
    assert sets.of(0).tolist() == plain_shingles(b"before it")
    assert sets.of(2).tolist() == plain_shingles(b"after it")
    h = np.array([fmix32(s & 0xFFFFFFFF) for s in sets.of(1).tolist()], dtype=np.uint32)
    a, b = cfmh1.permutations()
    expected = [int((h * a[j] + b[j]).min()) for j in range(0, 256, 17)]
    assert cfmh1.minhash(sets)[1, ::17].tolist() == expected


def test_one_very_long_token() -> None:
    text = b"x" * 300_000 + b" y"
    assert cfmh1.shingle_sets([text]).values.tolist() == plain_shingles(text)


@settings(max_examples=100, deadline=None)
@given(st.frozensets(st.integers(0, 60)), st.frozensets(st.integers(0, 60)))
def test_jaccard_is_that_of_sets(a: frozenset[int], b: frozenset[int]) -> None:
    arrays = [np.array(sorted(s), dtype=np.uint64) for s in (a, b)]
    assert cfmh1.jaccard(*arrays) == (len(a & b) / len(a | b) if a | b else 0.0)


@pytest.fixture(scope="module")
def corpus() -> tuple[cfmh1.ShingleSets, dict[tuple[int, int], float]]:
    """5,400 changes, and the true J of every pair that has anything in common.

    So many, because recall on 1,500 similar pairs varies by a percent from seed to seed.
    """
    triples = make.families(random.Random(7), 900, [0.005, 0.015, 0.03, 0.05, 0.08])
    texts = [keys.shingle_text(keys.changed_lines(t.patch)) for t in triples]
    sets = cfmh1.shingle_sets(texts)
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        for shingle in sets.of(i).tolist():
            holders[shingle].append(i)
    common = Counter(
        pair for members in holders.values() for pair in itertools.combinations(members, 2)
    )
    size = sets.sizes.tolist()
    return sets, {(a, b): n / (size[a] + size[b] - n) for (a, b), n in common.items()}


def test_estimates_are_as_good_as_theory_says(
    corpus: tuple[cfmh1.ShingleSets, dict[tuple[int, int], float]],
) -> None:
    sets, truth = corpus
    rows = cfmh1.minhash(sets)
    similar = {pair: j for pair, j in truth.items() if j >= 0.3}
    assert len(similar) > 2000
    j = np.array(list(similar.values()))
    a, b = np.array(list(similar)).T
    estimated = (rows[a] == rows[b]).mean(axis=1)
    theory = np.sqrt((j * (1 - j) / 256).mean())
    smallest = np.minimum(sets.sizes[a], sets.sizes[b])
    assert abs((estimated - j).mean()) < 0.005
    for low, high in ((0, 10_000), (0, 64), (64, 256), (256, 10_000)):
        part = (smallest >= low) & (smallest < high)
        rmse = np.sqrt(((estimated - j)[part] ** 2).mean())
        assert rmse <= 1.15 * np.sqrt((j * (1 - j) / 256)[part].mean()), (low, high, rmse, theory)


def test_bands_find_what_they_should(
    corpus: tuple[cfmh1.ShingleSets, dict[tuple[int, int], float]],
) -> None:
    sets, truth = corpus
    similar = [pair for pair, j in truth.items() if j >= 0.7]
    j = np.array([truth[pair] for pair in similar])
    assert len(similar) > 5000
    bands = cfmh1.band_hashes(cfmh1.minhash(sets))
    found = np.array([bool((bands[a] == bands[b]).any()) for a, b in similar])
    assert found.mean() >= 0.99
    assert found[j >= 0.8].mean() >= 0.999
    assert found.mean() == pytest.approx((1 - (1 - j**7) ** 36).mean(), abs=0.004)
