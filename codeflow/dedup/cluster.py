"""Which triples are duplicates, and which one of each cluster stays: tables `edges`, `clusters`.

    equal keys -> star edges
    equal bands -> star pairs -> exact Jaccard >= threshold -> edges      (see `_near_edges`)
    edges -> connected components -> one keeper each

Only numbers are held for all triples (about 1.5 KB each, mostly band records) and, for the few
that are candidates, their shingles; patches are read batch by batch. The result depends on the set
of triples alone, not on the order, the files or the repositories they come in.

Connected components drop a triple that resembles a dropped one but not the kept one; on measured
code that is 1 % of what is dropped after exact verification (15-30 % without it, which is why
candidates are never taken at their word).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from codeflow.dedup import cfmh1, groups, keys
from codeflow.dedup.groups import I64
from codeflow.errors import DatasetError
from codeflow.recipe import Recipe
from codeflow.work import Counts, Work

#: Kinds of edges, most certain first. A pair found in several ways gets the first.
KINDS: Final = ("commit", "delta", "blob", "change", "near")
NEAR: Final = KINDS.index("near")
#: Star pairs are made this often for what is left of a bucket: see `_near_edges`.
ROUNDS: Final = 8

_SIGNATURE_COLUMNS = [
    *("triple_id", "delta_key", "blob_key", "change_key"),
    *("n_shingles", "license_rank", "time"),
]


class Edges(NamedTuple):
    """Duplicate pairs: nodes of shape (edges, 2), the smaller first; kind; Jaccard similarity."""

    pairs: I64
    kinds: I64
    jaccards: npt.NDArray[np.float64]

    def sorted_with(self, other: Edges) -> Edges:
        """Both together, by larger node, then smaller."""
        pairs = np.concatenate([self.pairs, other.pairs])
        order = np.lexsort((pairs[:, 0], pairs[:, 1]))
        kinds = np.concatenate([self.kinds, other.kinds])
        jaccards = np.concatenate([self.jaccards, other.jaccards])
        return Edges(pairs[order], kinds[order], jaccards[order])


def run(work: Work, recipe: Recipe) -> Counts:
    """Cluster all triples of the dataset.

    Args:
        work: Inputs `signatures`, `bands` and `triples` of all repositories.
        recipe: `dedup.threshold` is used.

    Returns:
        `triples`; `edges_<kind>`; `candidates` compared exactly and `open_buckets` given up after
        the last round; `clusters`, the size of the `largest`, and triples `dropped`.

    Raises:
        DatasetError: The tables do not belong to the same triples.
    """
    # A node is the rank of a triple's id, so that "smallest node" means "smallest id".
    signatures = work.read("signatures", _SIGNATURE_COLUMNS).sort_by("triple_id")
    ids = signatures["triple_id"].combine_chunks()
    if pc.count_distinct(ids).as_py() != len(ids):
        raise DatasetError("a triple_id occurs twice in table `signatures`: run dedup again")
    exact = _exact_edges(work, signatures, ids)
    near, counts = _near_edges(work, signatures, ids, exact.pairs, recipe.dedup.threshold)
    edges = exact.sorted_with(near)
    work.write("edges", _edge_rows(edges, ids))
    root = groups.components(len(ids), edges.pairs)
    clusters = _cluster_rows(edges, root, signatures, ids)
    work.write("clusters", clusters)
    sizes = np.bincount(root, minlength=1)
    n_clusters = int((sizes > 1).sum())
    return {
        "triples": len(ids),
        **{f"edges_{kind}": int((edges.kinds == k).sum()) for k, kind in enumerate(KINDS)},
        **counts,
        "clusters": n_clusters,
        "largest": int(sizes.max()),
        "dropped": len(clusters["triple_id"]) - n_clusters,
    }


def _exact_edges(work: Work, signatures: pa.Table, ids: pa.Array) -> Edges:
    """Star edges to the smallest id of each group of equal keys."""
    triples = work.read("triples", ["triple_id", "old_commit", "new_commit"])
    nodes = _nodes(triples["triple_id"], ids, "triples")
    if len(nodes) != len(ids):
        raise DatasetError(f"{len(ids)} triples are signed but {len(nodes)} mined: run dedup again")
    commit_key = pc.binary_join_element_wise(triples["old_commit"], triples["new_commit"], "")
    in_order = np.arange(len(ids))
    columns = [
        (commit_key, nodes),
        *((signatures[name], in_order) for name in ("delta_key", "blob_key", "change_key")),
    ]
    pairs, kinds = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.int64)
    for kind, (column, members) in enumerate(columns):
        codes = column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        group, member = groups.by_key(codes, members)
        star = groups.distinct_pairs(groups.smallest(group, member), member)
        star = star[groups.not_in(star, pairs)]
        pairs = np.concatenate([pairs, star])
        kinds = np.concatenate([kinds, np.full(len(star), kind)])
    return Edges(pairs, kinds, np.ones(len(pairs)))


def _near_edges(
    work: Work, signatures: pa.Table, ids: pa.Array, exact: I64, threshold: float
) -> tuple[Edges, Counts]:
    """Verified edges between triples that share a band hash.

    All pairs of a bucket would be quadratic in its size, so each member is compared with the
    smallest one only. That alone can miss a pair: half of all candidates are false, and where the
    smallest member resembles nobody its bucket says nothing about the others. Similar pairs share
    several buckets, so the loss is small (none was measured on 3,900 similar pairs), but it would
    hit the large buckets of templates and generated code. Hence the members that did not join
    their smallest one form the bucket of the next round, for 1 % more comparisons. Each round is
    linear; `ROUNDS` of them bound the work on buckets full of strangers, at the price of pairs that
    only such buckets hold. Pairs that exact keys or earlier rounds have connected are not compared:
    they cannot change a cluster.
    """
    bucket, node = groups.by_key(*_bands(work, ids))
    sizes = signatures["n_shingles"].to_numpy()
    root = groups.components(len(ids), exact)
    tried, similarity = np.empty((0, 2), dtype=np.int64), np.empty(0)
    shingles: dict[int, cfmh1.U64] | None = None
    for _ in range(ROUNDS):
        open_ = groups.in_mixed(bucket, root[node])
        bucket, node = bucket[open_], node[open_]
        if not len(node):
            break
        if shingles is None:  # the buckets of later rounds are parts of these
            shingles = _shingles(work, ids, np.unique(node))
        first = groups.smallest(bucket, node)
        apart = root[first] != root[node]
        pairs = groups.distinct_pairs(first[apart], node[apart])
        pairs = pairs[groups.not_in(pairs, tried)]
        # J cannot exceed the ratio of the sizes: |A ∩ B| <= min, |A ∪ B| >= max.
        low, high = np.sort(sizes[pairs], axis=1).T
        pairs = pairs[low / high >= threshold]
        found = [cfmh1.jaccard(shingles[a], shingles[b]) for a, b in pairs.tolist()]
        tried = np.concatenate([tried, pairs])
        similarity = np.concatenate([similarity, found])
        root = groups.components(len(ids), np.concatenate([exact, tried[similarity >= threshold]]))
        rest = root[first] != root[node]
        bucket, node = bucket[rest], node[rest]
    left = bucket[groups.in_mixed(bucket, root[node])]
    counts = {"candidates": len(tried), "open_buckets": len(np.unique(left))}
    near = similarity >= threshold
    return Edges(tried[near], np.full(int(near.sum()), NEAR), similarity[near]), counts


def _bands(work: Work, ids: pa.Array) -> tuple[cfmh1.U64, I64]:
    """Band hash and node of every band record."""
    hashes, nodes = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for batch in work.batches("bands"):
        hashes.append(batch["band_hash"].to_numpy())
        nodes.append(_nodes(batch["triple_id"], ids, "bands"))
    return np.concatenate(hashes), np.concatenate(nodes)


def _shingles(work: Work, ids: pa.Array, wanted: I64) -> dict[int, cfmh1.U64]:
    """Shingle sets of the wanted nodes, from their patches."""
    shingles = {}
    wanted_ids = ids.take(pa.array(wanted))
    for batch in work.batches("triples", ["triple_id", "patch"]):
        batch = batch.filter(pc.is_in(batch["triple_id"], wanted_ids))
        texts = [
            keys.shingle_text(keys.changed_lines(patch)) for patch in batch["patch"].to_pylist()
        ]
        sets = cfmh1.shingle_sets(texts)
        for i, node in enumerate(_nodes(batch["triple_id"], ids, "triples").tolist()):
            shingles[node] = sets.of(i)
    return shingles


def _nodes(column: pa.Array, ids: pa.Array, table: str) -> I64:
    """Node number of each triple id."""
    found = pc.index_in(column, value_set=ids)
    if found.null_count:
        unknown = column.filter(pc.is_null(found))[0].as_py()
        raise DatasetError(
            f"table `{table}` has triple {unknown}, table `signatures` has not: run dedup again"
        )
    nodes: I64 = found.to_numpy().astype(np.int64)
    return nodes


def _edge_rows(edges: Edges, ids: pa.Array) -> dict[str, pa.Array]:
    return {
        "triple_id": ids.take(pa.array(edges.pairs[:, 1])),
        "other_id": ids.take(pa.array(edges.pairs[:, 0])),
        "kind": _kind_names(edges.kinds),
        "jaccard": edges.jaccards,
    }


def _cluster_rows(
    edges: Edges, root: I64, signatures: pa.Table, ids: pa.Array
) -> dict[str, pa.Array]:
    """One row for every node that has an edge, by id; any of them has a cluster of two or more."""
    keeper = _keepers(root, signatures)
    nodes = edges.pairs.T.ravel()
    kinds, jaccards = np.tile(edges.kinds, 2), np.tile(edges.jaccards, 2)
    closest_first = np.lexsort((-jaccards, kinds, nodes))
    members, first = np.unique(nodes[closest_first], return_index=True)
    closest = closest_first[first]
    return {
        "triple_id": ids.take(pa.array(members)),
        "cluster_id": ids.take(pa.array(root[members])),
        "keep": keeper[members] == members,
        "matched_id": ids.take(pa.array(keeper[members])),
        "kind": _kind_names(kinds[closest]),
        "jaccard": jaccards[closest],
    }


def _keepers(root: I64, signatures: pa.Table) -> I64:
    """For every node, the member of its cluster that stays.

    The first by licence rank, time, change key and id: a total order, so nothing is left to chance.
    """
    order = pc.sort_indices(
        signatures.append_column("node", pa.array(np.arange(len(root)))),
        sort_keys=[(k, "ascending") for k in ("license_rank", "time", "change_key", "node")],
    ).to_numpy()
    clusters, first = np.unique(root[order], return_index=True)
    keeper = np.empty(len(root), dtype=np.int64)
    keeper[clusters] = order[first]
    return keeper[root]


def _kind_names(kinds: I64) -> pa.Array:
    return pa.array(KINDS).take(pa.array(kinds))
