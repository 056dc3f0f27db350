"""Text to MinHash sketches (k = 256): codeflow's numpy code against `datasketch.MinHash.bulk`.

Both sides get the same bytes and make the same 5-gram shingles of the same words; datasketch, as
its users do, from Python byte strings. CPU time of this process, median of 3, one run:

    python bench/dedup_minhash.py

Claim: at least 8 times datasketch, on source files and on short patches alike.
"""

from __future__ import annotations

import random
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from datasketch import MinHash

from codeflow.dedup import cfmh1

_WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")
_RUNS = 3
_CLAIM = 8


def ours(texts: Sequence[bytes]) -> None:
    cfmh1.minhash(cfmh1.shingle_sets(texts))


def datasketch(texts: Sequence[bytes]) -> None:
    MinHash.bulk(map(_shingles, texts), num_perm=cfmh1.PERMUTATIONS, seed=1, scheme="affine32")


def _shingles(text: bytes) -> set[bytes]:
    words = _WORD.findall(text)
    if len(words) < cfmh1.NGRAM:
        return {b" ".join(words)} if words else set()
    return {b" ".join(gram) for gram in zip(*(words[i:] for i in range(cfmh1.NGRAM)), strict=False)}


def files() -> list[bytes]:
    """200 source files of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_bytes() for path in sorted(folder.glob("*.py"))[:200]]


def short_patches(sources: Sequence[bytes]) -> list[bytes]:
    """4,000 synthetic patches of 5 to 40 changed lines cut from the files."""
    rng = random.Random(0)
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    patches = []
    for _ in range(4000):
        start = rng.randrange(len(lines) - 40)
        hunk = lines[start : start + rng.randint(5, 40)]
        patches.append(b"\n".join(rng.choice([b"zzadd ", b"zzdel "]) + line for line in hunk))
    return patches


def cpu_seconds(function: Callable[[Sequence[bytes]], None], texts: Sequence[bytes]) -> float:
    seconds = []
    for _ in range(_RUNS):
        start = time.process_time()
        function(texts)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main() -> int:
    sources = files()
    met = True
    for name, texts in (("files", sources), ("patches", short_patches(sources))):
        size = sum(map(len, texts))
        peer, mine = cpu_seconds(datasketch, texts), cpu_seconds(ours, texts)
        print(
            f"{name}: {len(texts)} texts, {size / len(texts) / 1000:.1f} KB each; "
            f"codeflow {size / mine / 1e6:.1f} MB/s, {len(texts) / mine:,.0f} texts/s; "
            f"datasketch {size / peer / 1e6:.1f} MB/s, {len(texts) / peer:,.0f} texts/s; "
            f"ratio {peer / mine:.1f} (claim {_CLAIM})"
        )
        met &= peer / mine >= _CLAIM
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
