"""The cluster unit: which triples are duplicates, and which one stays."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import dedup_triples as make
import pytest
from dedup_triples import Triple

from codeflow.dedup import cfmh1, cluster, keys
from codeflow.errors import DatasetError
from codeflow.recipe import Recipe
from codeflow.work import Work

RECIPE = Recipe()


def named(*names: object) -> str:
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def distinct(n: int, words: int = 60) -> list[Triple]:
    rng = random.Random(n)
    return [
        Triple(f"t{i:05d}", make.patch(added=make.lines_of(make.words(rng, words))))
        for i in range(n)
    ]


def true_similarities(triples: Sequence[Triple]) -> dict[tuple[str, str], float]:
    texts = [keys.shingle_text(keys.changed_lines(t.patch)) for t in triples]
    sets = cfmh1.shingle_sets(texts)
    holders = defaultdict(list)
    for i, triple in enumerate(triples):
        for shingle in sets.of(i).tolist():
            holders[shingle].append(triple.id)
    size = {t.id: n for t, n in zip(triples, sets.sizes.tolist(), strict=True)}
    common = Counter(
        pair for ids in holders.values() for pair in itertools.combinations(sorted(ids), 2)
    )
    return {(a, b): n / (size[a] + size[b] - n) for (a, b), n in common.items()}


def partition(ids: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Smallest id of each id's connected component."""
    root = {i: i for i in ids}

    def find(x: str) -> str:
        while root[x] != x:
            x = root[x]
        return x

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return {i: find(i) for i in ids}


# -- against brute force -------------------------------------------------------------------------


def test_near_duplicates_against_brute_force(tmp_path: Path) -> None:
    triples = make.families(random.Random(11), 250, [0.005, 0.015, 0.03, 0.05, 0.08])
    result = make.dedup(tmp_path, triples)
    truth = true_similarities(triples)
    near = [edge for edge in result.edges if edge["kind"] == "near"]
    for edge in near:  # precision is 1, and the similarity is the exact one
        assert edge["jaccard"] == truth[edge["other_id"], edge["triple_id"]] >= 0.7
    similar = [pair for pair, j in truth.items() if j >= 0.7]
    ids = [t.id for t in triples]
    found = partition(ids, [(e["other_id"], e["triple_id"]) for e in result.edges])
    together = sum(found[a] == found[b] for a, b in similar)
    assert len(similar) > 1000
    assert together / len(similar) >= 0.99
    wanted = partition(ids, similar)
    assert all(wanted[i] == wanted[found[i]] for i in ids)  # no cluster that should be two
    assert {r["triple_id"]: r["cluster_id"] for r in result.clusters} == {
        i: root for i, root in found.items() if list(found.values()).count(root) > 1
    }


def test_a_higher_threshold_needs_no_other_index(tmp_path: Path) -> None:
    triples = make.families(random.Random(12), 100, [0.01, 0.02, 0.04])
    truth = true_similarities(triples)
    result = make.dedup(tmp_path, triples, threshold=0.85)
    ids = [t.id for t in triples]
    found = partition(ids, [(e["other_id"], e["triple_id"]) for e in result.edges])
    wanted = partition(ids, [pair for pair, j in truth.items() if j >= 0.85])
    assert found == wanted
    assert all(e["jaccard"] >= 0.85 for e in result.edges)


def test_the_threshold_itself_is_a_duplicate(tmp_path: Path) -> None:
    """17 shared of 20 shingles in all: J = 0.85 exactly."""
    shared = [f"t{i}" for i in range(20)]
    triples = [
        Triple("a", make.patch(added=[" ".join([*shared, "x"])])),
        Triple("b", make.patch(added=[" ".join([*shared, "y", "z"])])),
    ]
    assert true_similarities(triples) == {("a", "b"): 0.85}
    assert make.dedup(tmp_path / "at", triples, threshold=0.85).counts["edges_near"] == 1
    assert make.dedup(tmp_path / "above", triples, threshold=0.8501).counts["edges_near"] == 0


# -- independence of order and place -------------------------------------------------------------


def test_order_and_repositories_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(13)
    triples = make.families(rng, 60, [0.01, 0.03, 0.05])
    triples = [dataclasses.replace(t, time=rng.randrange(3)) for t in triples]
    expected = make.dedup(tmp_path / "one", triples)
    assert expected.counts["edges_near"] > 50
    for n_repos in (1, 3, 20):
        moved = [dataclasses.replace(t, repo=f"r{rng.randrange(n_repos)}") for t in triples]
        rng.shuffle(moved)
        result = make.dedup(tmp_path / str(n_repos), moved)
        assert result == expected  # the sha256 of the files included


def test_a_part_clusters_as_it_does_in_the_whole(tmp_path: Path) -> None:
    """Strangers that join a dataset do not change the clusters of the others."""
    triples = make.families(random.Random(14), 40, [0.02])
    alone = make.dedup(tmp_path / "alone", triples)
    ids = {t.id for t in triples}
    whole = make.dedup(tmp_path / "whole", triples + distinct(100))
    assert [r for r in whole.clusters if r["triple_id"] in ids] == alone.clusters


# -- what is no duplicate ------------------------------------------------------------------------


def test_consecutive_triples_of_a_flow_are_no_duplicates(tmp_path: Path) -> None:
    rng = random.Random(15)
    states = [make.git_id("state", i) for i in range(6)]
    triples = [
        Triple(
            f"flow{i}",
            make.patch(make.lines_of(make.words(rng, 60)), make.lines_of(make.words(rng, 60))),
            changes=((b"same.py", states[i], states[i + 1]),),
        )
        for i in range(5)
    ]
    assert make.dedup(tmp_path, triples).edges == []


def test_adding_and_removing_the_same_lines_are_no_duplicates(tmp_path: Path) -> None:
    lines = make.lines_of(make.words(random.Random(16), 100))
    triples = [Triple("add", make.patch(added=lines)), Triple("del", make.patch(deleted=lines))]
    assert make.dedup(tmp_path, triples).edges == []


def test_short_changes_are_never_dropped_for_likeness(tmp_path: Path) -> None:
    """Version bumps of 9 shingles, 8 of them shared: J = 0.8."""

    def bump(version: int) -> bytes:
        return make.patch(added=[f"release a b c d e f g h i j {version}"])

    short = [Triple(f"bump{i}", bump(i)) for i in range(5)]
    assert set(true_similarities(short).values()) == {0.8}
    assert make.dedup(tmp_path / "short", short).edges == []
    assert make.dedup(tmp_path / "allowed", short, min_shingles=9).counts["dropped"] == 4
    same = [Triple("bump0", bump(0)), Triple("bump1", bump(0))]
    assert make.dedup(tmp_path / "same", same).kinds == {("bump0", "bump1"): "change"}


def test_changes_of_binary_files_are_told_apart(tmp_path: Path) -> None:
    assert make.dedup(tmp_path, [Triple("a"), Triple("b"), Triple("c")]).edges == []


# -- exact keys ----------------------------------------------------------------------------------


def git(folder: Path, *args: str) -> str:
    """Run git as someone, at some time, under no one's configuration."""
    someone = {f"GIT_{w}_{k}": v for w in ("AUTHOR", "COMMITTER") for k, v in PERSON.items()}
    env = {**os.environ, **someone, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *args], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


PERSON = {"NAME": "A", "EMAIL": "a@example.org", "DATE": "1700000000 +0000"}


def commit(folder: Path, files: dict[str, list[str]], message: str) -> str:
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def triple_of(folder: Path, name: str, old: str, new: str, repo: str) -> Triple:
    raw = git(folder, "diff", "--raw", "--no-renames", "--no-abbrev", old, new).splitlines()
    changes = []
    for line in raw:
        fields, path = line.split("\t")
        before, after = (None if set(b) == {"0"} else b for b in fields.split()[2:4])
        changes.append((path.encode(), before, after))
    patch = git(folder, "diff", "--no-renames", old, new) + "\n"
    return Triple(name, patch.encode(), repo, tuple(changes), old_commit=old, new_commit=new)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_fork_rebase_move_and_cherry_pick(tmp_path: Path) -> None:
    rng = random.Random(17)
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "--quiet", "--initial-branch=main")
    body = [f"line {i}" for i in range(60)]
    fixed = [*body[:30], *make.lines_of(make.words(rng, 40), 5), *body[30:]]
    base = commit(repo, {"a.py": body, "other.py": ["x"]}, "base")
    fix = commit(repo, {"a.py": fixed}, "fix")

    git(repo, "checkout", "--quiet", "-b", "rebased", base)
    onto = commit(repo, {"other.py": ["y"]}, "unrelated")
    rebased = commit(repo, {"a.py": fixed}, "fix")

    git(repo, "checkout", "--quiet", "-b", "moved", base)
    git(repo, "mv", "a.py", "b.py")
    git(repo, "commit", "--quiet", "--message", "move")
    move = git(repo, "rev-parse", "HEAD")
    moved = commit(repo, {"b.py": fixed}, "fix")

    git(repo, "checkout", "--quiet", "-b", "release", base)
    old_release = commit(repo, {"a.py": ["first"] * 9 + body}, "other top")
    git(repo, "cherry-pick", fix)
    picked = git(repo, "rev-parse", "HEAD")

    make_triple = [
        ("0", base, fix, "upstream"),
        ("1", base, fix, "fork"),
        ("2", onto, rebased, "rebased"),
        ("3", move, moved, "moved"),
        ("4", old_release, picked, "release"),
    ]
    triples = [triple_of(repo, *arguments) for arguments in make_triple]
    result = make.dedup(tmp_path, triples)
    assert result.kinds == {
        ("0", "1"): "commit",
        ("0", "2"): "delta",
        ("0", "3"): "blob",
        ("0", "4"): "change",
    }
    assert result.dropped == {"1", "2", "3", "4"}
    assert result.counts["candidates"] == 0


def test_a_change_made_again_after_its_revert_is_found_in_one_repository(tmp_path: Path) -> None:
    there, back = make.patch(["a"], ["b"]), make.patch(["b"], ["a"])
    a, b = make.git_id("a"), make.git_id("b")
    triples = [
        Triple("0", there, changes=((b"f", a, b),), time=0),
        Triple("1", back, changes=((b"f", b, a),), time=1),
        Triple("2", there, changes=((b"f", a, b),), time=2),
    ]
    result = make.dedup(tmp_path, triples)
    assert result.kinds == {("0", "2"): "delta"}
    assert result.dropped == {"2"}


# -- the keeper ----------------------------------------------------------------------------------


def test_keeper_order_is_licence_then_time_then_change_then_id(tmp_path: Path) -> None:
    text, spaced = make.patch(["x y"], ["z"]), make.patch(["q"], ["r"])
    blobs = ((b"f", make.git_id("a"), make.git_id("b")),)
    candidates = [
        Triple("a", text, changes=blobs, license="GPL-3.0-only", time=0),
        Triple("b", text, changes=blobs, license=None, time=0),
        Triple("c", text, changes=blobs, license="MIT", time=5),
        Triple("d", text, changes=blobs, license="MIT", time=4),
        Triple("e", spaced, changes=blobs, license="MIT", time=4),
        Triple("f", spaced, changes=blobs, license="Apache-2.0", time=4),
        Triple("g", spaced, changes=blobs, license="MIT", time=5),
    ]
    change = {t.id: keys.change_key(keys.changed_lines(t.patch), b"") for t in candidates}
    rank = {t.id: keys.license_rank(t.license) for t in candidates}
    order = sorted(candidates, key=lambda t: (rank[t.id], t.time, change[t.id], t.id))
    while len(order) > 1:
        result = make.dedup(tmp_path / str(len(order)), order[::-1])
        (kept,) = [row for row in result.clusters if row["keep"]]
        assert kept["triple_id"] == order[0].id
        assert {row["matched_id"] for row in result.clusters} == {order[0].id}
        assert {row["cluster_id"] for row in result.clusters} == {min(t.id for t in order)}
        assert result.dropped == {t.id for t in order[1:]}
        order = order[1:]


def test_every_cluster_keeps_one_and_every_row_is_explained(tmp_path: Path) -> None:
    triples = make.families(random.Random(18), 80, [0.005, 0.03, 0.05])
    result = make.dedup(tmp_path, triples)
    rows = {row["triple_id"]: row for row in result.clusters}
    members = defaultdict(list)
    for row in result.clusters:
        members[row["cluster_id"]].append(row)
    for root, cluster_rows in members.items():
        (kept,) = [row["triple_id"] for row in cluster_rows if row["keep"]]
        assert len(cluster_rows) > 1
        assert root == min(row["triple_id"] for row in cluster_rows)
        assert {row["matched_id"] for row in cluster_rows} == {kept}
    best: dict[str, tuple[int, float]] = {}
    for edge in result.edges:
        assert edge["other_id"] < edge["triple_id"]
        closeness = (cluster.KINDS.index(edge["kind"]), -edge["jaccard"])
        for end in (edge["other_id"], edge["triple_id"]):
            best[end] = min(best.get(end, closeness), closeness)
    assert {i: (cluster.KINDS.index(r["kind"]), -r["jaccard"]) for i, r in rows.items()} == best
    assert result.counts["clusters"] == len(members)
    assert result.counts["dropped"] == len(result.dropped) == len(rows) - len(members)
    assert result.counts["largest"] == max(map(len, members.values()))


# -- large and awkward buckets -------------------------------------------------------------------


def by_hand(
    root: Path, triples: Sequence[Triple], buckets: dict[int, Sequence[Triple]]
) -> dict[str, list[Path]]:
    """Inputs of the cluster unit with keys that all differ and the buckets one asks for."""
    texts = [keys.shingle_text(keys.changed_lines(t.patch)) for t in triples]
    sizes = cfmh1.shingle_sets(texts).sizes.tolist()
    signatures = [
        {
            "triple_id": t.id,
            "n_shingles": n,
            **{f"{key}_key": hashlib.md5(f"{key}{t.id}".encode()).digest() for key in KEYS},
        }
        for t, n in zip(triples, sizes, strict=True)
    ]
    bands = [
        {"band_hash": band_hash, "triple_id": t.id}
        for band_hash, members in buckets.items()
        for t in members
    ]
    return {
        "triples": make.mined(root, "r", triples)["triples"],
        "signatures": [make.write_table(root, "signatures", "r", signatures)],
        "bands": [make.write_table(root, "bands", "r", bands)],
    }


KEYS = ("delta", "blob", "change")


def test_a_bucket_of_20000_twins_has_a_linear_number_of_edges(tmp_path: Path) -> None:
    n = 20_000
    patch = distinct(1)[0].patch
    twins = [Triple(f"{i:016x}", patch) for i in range(n)]
    inputs = by_hand(tmp_path, twins, dict.fromkeys(range(3), twins))
    result = make.clustered(tmp_path, inputs, RECIPE)
    assert result.counts["candidates"] == result.counts["edges_near"] == n - 1
    assert result.counts["largest"] == n
    assert len(result.dropped) == n - 1
    assert {edge["other_id"] for edge in result.edges} == {f"{0:016x}"}


def test_a_bucket_of_strangers_is_given_up_after_linear_work(tmp_path: Path) -> None:
    strangers = distinct(300)
    inputs = by_hand(tmp_path, strangers, dict.fromkeys(range(36), strangers))
    result = make.clustered(tmp_path, inputs, RECIPE)
    assert result.edges == []
    assert result.counts["candidates"] <= cluster.ROUNDS * len(strangers)
    assert result.counts["open_buckets"] == 36


def test_members_that_only_resemble_each_other_find_each_other(tmp_path: Path) -> None:
    """The smallest member of the bucket is like neither of the others."""
    hub, pair = distinct(2)
    twin = dataclasses.replace(pair, id="t9", patch=pair.patch + b"+x\n")
    inputs = by_hand(tmp_path, [hub, pair, twin], {7: [hub, pair, twin]})
    result = make.clustered(tmp_path, inputs, RECIPE)
    assert result.kinds == {(pair.id, twin.id): "near"}
    assert result.counts["candidates"] == 3
    assert result.counts["open_buckets"] == 0


def test_no_pair_is_compared_twice_or_in_vain(tmp_path: Path) -> None:
    """A failed pair that another bucket brings up again; members that have joined already."""
    a, b, c = distinct(3)
    inputs = by_hand(tmp_path / "again", [a, b, c], {1: [b, c], 2: [a, b, c]})
    assert make.clustered(tmp_path / "again", inputs, RECIPE).counts["candidates"] == 3
    twin = dataclasses.replace(a, id="t00000+", patch=a.patch + b"+x\n")
    inputs = by_hand(tmp_path / "joined", [a, twin, c], {1: [a, twin, c]})
    result = make.clustered(tmp_path / "joined", inputs, RECIPE)
    assert result.kinds == {(a.id, twin.id): "near"}
    assert result.counts["candidates"] == 2


def test_a_part_of_a_change_at_the_very_threshold_is_compared(tmp_path: Path) -> None:
    """55 of 100 shingles; 0.55 * 100 is above 55 in floating point, 55 / 100 is not below 0.55."""
    assert 0.55 * 100 > 55
    tokens = [f"t{i}" for i in range(103)]
    part, whole = (
        Triple(name, make.patch(added=[" ".join(tokens[:n])]))
        for name, n in (("a", 58), ("b", 103))
    )
    inputs = by_hand(tmp_path, [part, whole], {1: [part, whole]})
    recipe = dataclasses.replace(RECIPE, dedup=dataclasses.replace(RECIPE.dedup, threshold=0.55))
    result = make.clustered(tmp_path, inputs, recipe)
    assert [edge["jaccard"] for edge in result.edges] == [0.55]


def test_candidates_whose_sizes_differ_too_much_are_not_compared(tmp_path: Path) -> None:
    small, large = distinct(1, words=40)[0], distinct(2, words=200)[1]
    inputs = by_hand(tmp_path, [small, large], {1: [small, large]})
    assert make.clustered(tmp_path, inputs, RECIPE).counts["candidates"] == 0


# -- inputs that do not fit together -------------------------------------------------------------


def test_no_triples(tmp_path: Path) -> None:
    result = make.dedup(tmp_path, [])
    assert (result.edges, result.clusters) == ([], [])
    assert set(result.counts.values()) == {0}


def test_tables_of_different_triples_are_an_error(tmp_path: Path) -> None:
    one, two, three = distinct(3)
    inputs = by_hand(tmp_path, [one, two], {})
    bands = by_hand(tmp_path / "b", [one, three], {1: [three]})
    more = by_hand(tmp_path / "c", [one, two, three], {})
    for wrong, message in (
        ({**inputs, "bands": bands["bands"]}, "table `bands` has triple t00002"),
        ({**inputs, "triples": bands["triples"]}, "table `triples` has triple t00002"),
        ({**more, "triples": inputs["triples"]}, "3 triples are signed but 2 mined"),
        ({**inputs, "signatures": inputs["signatures"] * 2}, "occurs twice"),
    ):
        with pytest.raises(DatasetError, match=message):
            cluster.run(Work(tmp_path, "all", "2" * 24, wrong), RECIPE)
