"""Unit `tokenizer`: take the user's tokenizer.json, or train a byte-level BPE on kept triples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from codeflow.recipe import Recipe
from codeflow.tokenizer import CONTROL_TOKENS, SPLIT, Tokenizer
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Write `tokenizer.json` of the dataset, as the file kind `tokenizer`."""
    settings = recipe.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.from_file(Path(settings.path))
        data = Path(settings.path).read_bytes()
    else:
        data = train(_sample(work, settings.sample_bytes), settings.vocab_size)
        tokenizer = Tokenizer(data, "trained tokenizer")
    work.write_file("tokenizer", "tables/tokenizer/all", ".json", data)
    return {"vocab_size": tokenizer.vocab_size}


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE; the same texts in the same order give the same bytes.

    Control tokens take the first ids, so that they are the same in every trained vocabulary.
    """
    tokenizer = HFTokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(SPLIT), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def _sample(work: Work, limit: int) -> Iterator[str]:
    """Patches, old files and messages of kept triples, up to `limit` bytes.

    Triples are visited in the order of a hash, so the sample is spread over all repositories and
    does not depend on the order of units. Each triple gives its patch and the old side of its
    changed files, which is what its document will show.
    """
    decisions = work.read("decisions", ["triple_id", "keep"])
    kept = decisions.filter(decisions["keep"])["triple_id"].to_pylist()
    order = sorted(kept, key=lambda t: hashlib.blake2b(t.encode(), digest_size=8).digest())
    triples = work.read("triples", ["triple_id", "lines_added", "patch"])
    sizes = dict(
        zip(
            triples["triple_id"].to_pylist(),
            pc.binary_length(triples["patch"]).to_pylist(),
            strict=True,
        )
    )
    chosen: list[str] = []
    budget = limit
    for triple in order:
        if budget <= 0:
            break
        chosen.append(triple)
        budget -= 4 * sizes[triple]  # old files are about three times their patch
    included = set(chosen)
    patches = {
        t: p
        for t, p in zip(triples["triple_id"].to_pylist(), triples["patch"], strict=True)
        if t in included
    }
    left = limit
    for triple in chosen:
        text = patches[triple].as_py().decode("utf-8", "replace")
        left -= len(text)
        yield text
    changes = work.read("changes", ["triple_id", "old_blob", "kind"])
    of_chosen = pc.is_in(changes["triple_id"], value_set=pa.array(chosen, pa.string()))
    text_files = pc.equal(changes["kind"], "text")
    wanted = set(changes.filter(pc.and_(of_chosen, text_files))["old_blob"].to_pylist()) - {None}
    for batch in work.batches("blobs", ["blob", "data"]):
        for blob, data in zip(batch["blob"].to_pylist(), batch["data"], strict=True):
            if left <= 0:
                return
            if blob in wanted and data.is_valid:
                wanted.discard(blob)  # forks share blobs: each counts once
                text = data.as_py().decode("utf-8", "replace")
                left -= len(text)
                yield text
