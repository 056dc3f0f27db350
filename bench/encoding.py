"""Speed of encoding: texts line by line, with the ids of lines kept, against whole texts.

Encodes what the step `compose` encodes of a built dataset, the texts of its documents in their
order, with the dataset's own tokenizer, by `codeflow.tokenizer` and by the library under it. The
ids must be the same. CPU time, median of interleaved runs, each with an empty memory.

    python bench/encoding.py path/to/dataset
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from codeflow.dataset import Dataset
from codeflow.tokenizer import Tokenizer

LEAST = 3.0  # times as fast as whole texts, on a repository of large files

Encode = Callable[[list[str]], list[list[int]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a worker
    dataset = Dataset.open(options.dataset)
    vocabulary = (options.dataset / "shards" / "tokenizer.json").read_bytes()
    documents = [
        [segment["text"] for segment in segments]
        for segments in dataset.read("documents", ["segments"])["segments"].to_pylist()
    ]
    characters = sum(len(text) for document in documents for text in document)
    seconds: dict[str, list[float]] = {"by line": [], "whole": []}
    for _ in range(options.runs):
        sides: dict[str, Encode] = {"by line": by_line(vocabulary), "whole": whole(vocabulary)}
        ids = {}
        for name, encode in sides.items():
            started = time.process_time()
            ids[name] = [encode(document) for document in documents]
            seconds[name].append(time.process_time() - started)
        if ids["by line"] != ids["whole"]:
            print("the ids differ")
            return 1
    median = {name: statistics.median(s) for name, s in seconds.items()}
    print(f"{len(documents):,} documents, {characters / 1e6:.1f} M characters")
    for name, value in median.items():
        print(f"{name:<8} {value:>8.2f} CPU s {characters / value / 1e6:>8.1f} M characters/s")
    ratio = median["whole"] / median["by line"]
    print(
        f"by line / whole: {ratio:.2f}x, claim {LEAST}x: {'met' if ratio >= LEAST else 'NOT MET'}"
    )
    return 0 if ratio >= LEAST else 1


def by_line(vocabulary: bytes) -> Encode:
    return Tokenizer(vocabulary, "the dataset's tokenizer").encode


def whole(vocabulary: bytes) -> Encode:
    tokenizer = HFTokenizer.from_str(vocabulary.decode())
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


if __name__ == "__main__":
    sys.exit(main())
