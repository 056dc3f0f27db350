"""Keys and sketches of one repository's triples: tables `signatures` and `bands`.

Each triple is read once and on its own, so repositories can be signed in any order and place;
only `cluster` sees more than one. Shingles are not stored: making them again for the few triples
that become candidates costs less than writing them for all.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa

from codeflow.dedup import cfmh1, keys
from codeflow.errors import DatasetError
from codeflow.recipe import Recipe
from codeflow.tables import BANDS, SIGNATURES
from codeflow.work import Counts, Work

_TRIPLE_COLUMNS = ["triple_id", "repo_id", "new_commit", "license", "patch"]


def run(work: Work, recipe: Recipe) -> Counts:
    """Sign the triples of one repository.

    Args:
        work: Inputs `triples`, `changes` and `commits` of the repository.
        recipe: `dedup.min_shingles` is used: smaller changes get exact keys only, no MinHash and no
            bands, because version bumps and typo fixes would all look alike.

    Returns:
        `triples`, `sketched` (those with a MinHash) and `band_rows`.

    Raises:
        DatasetError: A triple lacks its rows in `changes` or its commit in `commits`.
    """
    changes = _changes(work)
    commits = work.read("commits", ["commit", "author_time"])
    times = dict(
        zip(commits["commit"].to_pylist(), commits["author_time"].to_pylist(), strict=True)
    )
    signatures, bands = [], []
    for batch in work.batches("triples", _TRIPLE_COLUMNS):
        rows, sketches = _sign(batch, changes, times, recipe.dedup.min_shingles)
        signatures.append(rows)
        bands.append(sketches)
    signed = pa.Table.from_batches(signatures, schema=SIGNATURES.schema)
    banded = pa.Table.from_batches(bands, schema=BANDS.schema).sort_by(
        [("band_hash", "ascending"), ("triple_id", "ascending")]
    )
    work.write("signatures", signed)
    work.write("bands", banded)
    return {
        "triples": signed.num_rows,
        "sketched": banded.num_rows // cfmh1.BANDS,
        "band_rows": banded.num_rows,
    }


def _changes(work: Work) -> dict[str, list[keys.BlobChange]]:
    table = work.read("changes", ["triple_id", "path", "old_blob", "new_blob"])
    changes = defaultdict(list)
    for triple_id, *change in zip(*(column.to_pylist() for column in table.columns), strict=True):
        changes[triple_id].append(keys.BlobChange(*change))
    return changes


def _sign(
    batch: pa.RecordBatch,
    changes: dict[str, list[keys.BlobChange]],
    times: dict[str, int],
    min_shingles: int,
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Rows of `signatures` and of `bands` for one batch of triples."""
    ids = batch["triple_id"].to_pylist()
    for triple_id, commit in zip(ids, batch["new_commit"].to_pylist(), strict=True):
        if triple_id not in changes or commit not in times:
            missing = "changed files" if triple_id not in changes else f"commit {commit}"
            raise DatasetError(
                f"triple {triple_id}: its {missing} cannot be found in the mined tables: "
                "mine the repository again"
            )
    lines = [keys.changed_lines(patch) for patch in batch["patch"].to_pylist()]
    sets = cfmh1.shingle_sets([keys.shingle_text(files) for files in lines])
    minhash = cfmh1.minhash(sets)
    large = np.flatnonzero(sets.sizes >= min_shingles)
    sketch = [b""] * len(ids)
    for i in large.tolist():
        sketch[i] = minhash[i].astype("<u4").tobytes()
    delta = [keys.delta_key(changes[i]) for i in ids]
    signatures = {
        "triple_id": ids,
        "repo_id": batch["repo_id"],
        "delta_key": delta,
        "blob_key": [keys.blob_key(changes[i]) for i in ids],
        "change_key": [keys.change_key(f, d) for f, d in zip(lines, delta, strict=True)],
        "n_shingles": sets.sizes.astype(np.int32),
        "license_rank": [keys.license_rank(spdx) for spdx in batch["license"].to_pylist()],
        "time": [times[commit] for commit in batch["new_commit"].to_pylist()],
        "minhash": sketch,
    }
    bands = {
        "band_hash": cfmh1.band_hashes(minhash[large]).ravel(),
        "triple_id": batch["triple_id"].take(pa.array(np.repeat(large, cfmh1.BANDS))),
    }
    return (
        pa.RecordBatch.from_pydict(signatures, schema=SIGNATURES.schema),
        pa.RecordBatch.from_pydict(bands, schema=BANDS.schema),
    )
