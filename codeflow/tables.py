"""Every table that flows between stages: columns, Arrow types, units and meanings.

Stages meet only here. `schemas/` is generated from this file (`codeflow schema --write schemas`),
so another language can read a dataset without reading Python. Git ids are lower-case hex strings;
anything whose bytes come from a repository (paths, file contents, patches) is binary.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    meaning: str
    columns: tuple[Column, ...]
    #: Rows per Parquet row group; small where rows are large, so that a reader need not load all.
    row_group_rows: int = 65536
    #: Name of the scheme that fixes the bits of its hashes; tables of two schemes cannot be mixed.
    scheme: str = ""

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with meaning and unit of each column in the field metadata."""
        fields = []
        for c in self.columns:
            metadata = {"meaning": c.meaning} | ({"unit": c.unit} if c.unit else {})
            fields.append(pa.field(c.name, c.type, nullable=c.nullable, metadata=metadata))
        header = {"codeflow_table": self.name, "codeflow_schema_version": str(SCHEMA_VERSION)}
        header |= {"codeflow_scheme": self.scheme} if self.scheme else {}
        return pa.schema(fields, metadata=header)


def _list(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


GIT_ID = "git object id, 40 lower-case hex digits"
POSITION = "index on the mainline (first-parent chain of the pinned head), 0 = root"

REPOS = Table(
    "repos",
    "One row per repository: what was pinned, which part of its life was mined, and why not.",
    (
        Column("repo_id", pa.string(), "name of the repository inside this dataset"),
        Column("name", pa.string(), "what a person calls it; owner/name where there is an owner"),
        Column("source", pa.string(), "where it came from, as canonical list entry"),
        Column("head", pa.string(), f"commit the run is pinned to; {GIT_ID}"),
        Column("mainline_commits", pa.int32(), "length of the first-parent chain", "commits"),
        Column("window_from", pa.int32(), f"first position of the maturity window; {POSITION}"),
        Column("window_to", pa.int32(), f"position after the window's last commit; {POSITION}"),
        Column("root", pa.string(), f"oldest mainline commit; {GIT_ID}"),
        Column(
            "leader", pa.string(), "repository of its fork family that is mined; itself if alone"
        ),
        Column("license", pa.string(), "SPDX id read from the tree at the window's end", "", True),
        Column("permissive", pa.bool_(), "the licence asks for attribution at most"),
        Column("status", pa.string(), "mined, or why not: too_short, fork"),
        Column("reason", pa.string(), "one sentence for a person when status is not `mined`"),
    ),
)

COMMITS = Table(
    "commits",
    "Every commit of the window, side branches and merges included, oldest first.",
    (
        Column("repo_id", pa.string(), "repository"),
        Column("commit", pa.string(), GIT_ID),
        Column("parents", _list(pa.string()), "parent commits, first parent first"),
        Column("tree", pa.string(), f"root tree; {GIT_ID}"),
        Column("position", pa.int32(), f"mainline commit that brought it in; {POSITION}"),
        Column("on_mainline", pa.bool_(), "true for the mainline commit itself"),
        Column("message", pa.string(), "commit message, decoded, without e-mail addresses"),
        Column(
            "message_raw", pa.binary(), "original bytes, only where decoding lost some", "", True
        ),
        Column("author_id", pa.string(), "keyed hash of author name and e-mail, 16 hex digits"),
        Column("author_time", pa.int64(), "author date", "seconds since 1970-01-01 UTC"),
        Column("author_offset", pa.int32(), "author's offset from UTC", "minutes"),
        Column("is_merge", pa.bool_(), "two or more parents"),
        Column("is_bot", pa.bool_(), "author name or e-mail is a known automation account"),
        Column("is_revert", pa.bool_(), "message says that it reverts another commit"),
        Column("trailers", _list(pa.string()), "`Key: value` lines that end the message"),
        Column("pull_requests", _list(pa.int64()), "pull request numbers named in the message"),
        Column("closes_issues", _list(pa.int64()), "issues closed by keyword in the message"),
    ),
)

TRIPLES = Table(
    "triples",
    "(R_old, P, R_new): two states of one repository and the net patch between them.",
    (
        Column("triple_id", pa.string(), "hash of repository, old and new commit, 16 hex digits"),
        Column("repo_id", pa.string(), "repository"),
        Column(
            "flow", pa.string(), "first triple of its chain: inside one, R_new is the next R_old"
        ),
        Column("sequence", pa.int32(), "order in its repository: the position of R_old"),
        Column("old_commit", pa.string(), f"R_old; {GIT_ID}"),
        Column("new_commit", pa.string(), f"R_new; {GIT_ID}"),
        Column("old_tree", pa.string(), f"root tree of R_old; {GIT_ID}"),
        Column("new_tree", pa.string(), f"root tree of R_new; {GIT_ID}"),
        Column("old_position", pa.int32(), f"position of R_old; {POSITION}"),
        Column("new_position", pa.int32(), f"position of R_new; {POSITION}"),
        Column("commit_percentile", pa.float32(), "R_new's place in the mainline's commits, 0-1"),
        Column("time_percentile", pa.float32(), "R_new's place in the mainline's time span, 0-1"),
        Column("n_commits", pa.int32(), "mainline steps from R_old to R_new", "commits"),
        Column("stop_reason", pa.string(), "why the endpoint search stopped where it did"),
        Column("lines_added", pa.int32(), "added lines of the net patch", "lines"),
        Column("lines_deleted", pa.int32(), "deleted lines of the net patch", "lines"),
        Column("n_files", pa.int32(), "changed files of the net patch", "files"),
        Column("license", pa.string(), "SPDX id at the window's end", "", True),
        Column("permissive", pa.bool_(), "the licence asks for attribution at most"),
        Column("has_tests", pa.bool_(), "the patch touches code and tests"),
        Column(
            "patch_complete", pa.bool_(), "patch alone turns R_old into R_new (no binary left out)"
        ),
        Column("patch", pa.large_binary(), "P: git unified diff, 3 lines of context"),
    ),
    row_group_rows=512,
)

CHANGES = Table(
    "changes",
    "One row per changed file of a triple, in the order of the patch.",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("path", pa.binary(), "path in R_new (in R_old for a deleted file)"),
        Column("old_path", pa.binary(), "path in R_old when it differs (rename)", "", True),
        Column("status", pa.string(), "A added, D deleted, M modified, R renamed, T type changed"),
        Column("old_mode", pa.int32(), "git file mode in R_old, 0 = absent"),
        Column("new_mode", pa.int32(), "git file mode in R_new, 0 = absent"),
        Column("old_blob", pa.string(), f"{GIT_ID}; null = absent", "", True),
        Column("new_blob", pa.string(), f"{GIT_ID}; null = absent", "", True),
        Column("kind", pa.string(), "text, binary, too_large, symlink, gitlink, lfs or missing"),
        Column("language", pa.string(), "programming language by path, empty = none"),
        Column("is_test", pa.bool_(), "path is a test by the usual naming rules"),
        Column("in_patch", pa.bool_(), "the patch holds a section for this file"),
        Column("lines_added", pa.int32(), "added lines", "lines"),
        Column("lines_deleted", pa.int32(), "deleted lines", "lines"),
    ),
)

BLOBS = Table(
    "blobs",
    "File contents of all states at triple ends, once per repository, sorted by (path, age).",
    (
        Column("repo_id", pa.string(), "repository"),
        Column("blob", pa.string(), GIT_ID),
        Column("path", pa.binary(), "path of its first appearance"),
        Column(
            "kind", pa.string(), "text, symlink, lfs: data stored; binary, too_large, missing: not"
        ),
        Column("size", pa.int64(), "content length; -1 where the object is missing", "bytes"),
        Column("data", pa.large_binary(), "content", "", True),
    ),
    row_group_rows=1024,
)

TREES = Table(
    "trees",
    "Raw git trees of all states at triple ends, once per repository.",
    (
        Column("repo_id", pa.string(), "repository"),
        Column("tree", pa.string(), GIT_ID),
        Column("data", pa.binary(), "the tree object as git hashes it, without its header"),
    ),
)

SIGNATURES = Table(
    "signatures",
    "Duplicate keys and MinHash sketch of each triple's change (scheme cfmh1).",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("repo_id", pa.string(), "repository"),
        Column("delta_key", pa.binary(16), "blake2b-128 of the sorted (path, old blob, new blob)"),
        Column(
            "blob_key", pa.binary(16), "blake2b-128 of the sorted (old blob, new blob), no paths"
        ),
        Column("change_key", pa.binary(16), "blake2b-128 of the changed lines, white space folded"),
        Column("n_shingles", pa.int32(), "distinct shingles of the changed lines", "shingles"),
        Column("license_rank", pa.int8(), "0 permissive, 1 unknown, 2 copyleft: lower is kept"),
        Column("time", pa.int64(), "author date of R_new; earlier is kept", "seconds since 1970"),
        Column("minhash", pa.binary(), "k little-endian uint32, empty below the shingle minimum"),
    ),
    row_group_rows=8192,
    scheme="cfmh1",
)

BANDS = Table(
    "bands",
    "LSH buckets: triples that share a band hash are candidates.",
    (
        Column("band_hash", pa.uint64(), "hash of band index and its rows"),
        Column("triple_id", pa.string(), "triple"),
    ),
    scheme="cfmh1",
)

EDGES = Table(
    "edges",
    "Pairs found to be duplicates, and how.",
    (
        Column("triple_id", pa.string(), "the larger id of the pair"),
        Column("other_id", pa.string(), "the smaller id of the pair"),
        Column("kind", pa.string(), "commit, delta, blob, change (equal keys) or near (MinHash)"),
        Column(
            "jaccard", pa.float64(), "exact Jaccard similarity of shingle sets; 1 for equal keys"
        ),
    ),
)

CLUSTERS = Table(
    "clusters",
    "Every triple that has a duplicate: its cluster, whether it stays, and what it resembles.",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("cluster_id", pa.string(), "smallest triple_id of the cluster"),
        Column("keep", pa.bool_(), "true for the one member that stays"),
        Column("matched_id", pa.string(), "kept member of the cluster"),
        Column("kind", pa.string(), "kind of the edge that links it to its cluster most closely"),
        Column("jaccard", pa.float64(), "similarity on that edge"),
    ),
)

SCORES = Table(
    "scores",
    "Numbers about each triple. Nothing is decided here: thresholds live in the recipe.",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("code_files", pa.int32(), "changed text files in a programming language", "files"),
        Column("code_lines", pa.int32(), "changed lines in those files", "lines"),
        Column("vendored_files", pa.int32(), "changed files under vendored paths", "files"),
        Column("generated_files", pa.int32(), "changed files that say or look generated", "files"),
        Column("lock_files", pa.int32(), "changed dependency lock files", "files"),
        Column("binary_files", pa.int32(), "changed files that are not text", "files"),
        Column("authored_lines", pa.int32(), "changed lines outside those files", "lines"),
        Column("max_line", pa.int32(), "longest added line", "bytes"),
        Column("mean_line", pa.float32(), "mean length of added lines", "bytes"),
        Column("alnum_fraction", pa.float32(), "letters and digits among added bytes; 1 if none"),
        Column("longest_base64", pa.int32(), "longest run of base64 digits added", "bytes"),
        Column("conflict_markers", pa.int32(), "added merge-conflict marker lines", "lines"),
        Column("whitespace_only", pa.bool_(), "all changes vanish when white space is ignored"),
        Column("syntax_errors_old", pa.int32(), "tree-sitter errors in the changed old files"),
        Column("syntax_errors_new", pa.int32(), "tree-sitter errors in the changed new files"),
        Column(
            "syntax_broken_files", pa.int32(), "files with more errors after than before", "files"
        ),
        Column("parsed_files", pa.int32(), "changed files that were parsed on both sides", "files"),
        Column(
            "not_utf8_files", pa.int32(), "changed text files that are not valid UTF-8", "files"
        ),
        Column("commits", pa.int32(), "commits between both states, merges left out", "commits"),
        Column("bot_commits", pa.int32(), "those by automation accounts", "commits"),
        Column("revert_commits", pa.int32(), "those that revert another", "commits"),
        Column("merge_only_messages", pa.int32(), "messages that say nothing but that they merge"),
        Column("informative_messages", pa.int32(), "messages left after these are set aside"),
        Column("message_words", pa.int32(), "words in the informative messages", "words"),
    ),
)

DECISIONS = Table(
    "decisions",
    "What happens to each triple: kept, or dropped with one reason.",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("keep", pa.bool_(), "true: goes into documents"),
        Column("stage", pa.string(), "stage that dropped it (dedup, filter), empty when kept"),
        Column("reason", pa.string(), "reason code, empty when kept"),
        Column("detail", pa.string(), "the numbers behind the reason"),
    ),
)

SEGMENT = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("train", pa.bool_(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)

DOCUMENTS = Table(
    "documents",
    "Training documents as typed segments; text is what a person would read.",
    (
        Column("doc_id", pa.string(), "hash of kind and triple, 16 hex digits"),
        Column("kind", pa.string(), "document kind, e.g. transition"),
        Column("repo_id", pa.string(), "repository"),
        Column("triple_id", pa.string(), "triple it shows"),
        Column("sequence", pa.int32(), "order of the triple in its repository"),
        Column("base_commit", pa.string(), f"R_old; {GIT_ID}"),
        Column("head_commit", pa.string(), f"R_new; {GIT_ID}"),
        Column("license", pa.string(), "SPDX id, empty = unknown"),
        Column("language", pa.string(), "language with most changed lines, empty = none"),
        Column("segments", _list(SEGMENT), "role repo, context, intent, patch; in reading order"),
        Column("context_files", pa.int32(), "old files shown", "files"),
        Column("context_dropped", pa.int32(), "old files left out to fit the budget", "files"),
        Column("n_tokens", pa.int32(), "tokens, control tokens included", "tokens"),
    ),
    row_group_rows=256,
)

TOKENS = Table(
    "tokens",
    "Token ids of each document, encoded once while it was fitted into the budget.",
    (
        Column("doc_id", pa.string(), "document"),
        Column("input_ids", _list(pa.uint32()), "token ids"),
        Column("loss_runs", _list(pa.int32()), "run lengths: not trained, trained, not trained, …"),
    ),
    row_group_rows=256,
)

REJECTS = Table(
    "rejects",
    "Kept triples that gave no document.",
    (
        Column("triple_id", pa.string(), "triple"),
        Column("reason", pa.string(), "reason code"),
        Column("detail", pa.string(), "the numbers behind the reason"),
    ),
)

SHARD_SEGMENT = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)

DOC = pa.struct(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("repo", pa.string(), nullable=False),
        pa.field("base_commit", pa.string(), nullable=False),
        pa.field("head_commit", pa.string(), nullable=False),
        pa.field("license", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("segments", _list(SHARD_SEGMENT), nullable=False),
    ]
)


def shard_table(token_type: pa.DataType, row_group_rows: int) -> Table:
    """The shard schema for a token width: uint16 up to 65,536 ids, uint32 above."""
    return Table(
        "shards",
        "Packed training rows: whole documents, no padding stored.",
        (
            Column("row_id", pa.int64(), "number of the row over all shards"),
            Column("input_ids", _list(token_type), "token ids of the row's documents, in order"),
            Column(
                "doc_lens", _list(pa.int32()), "length of each document; sum = n_tokens", "tokens"
            ),
            Column(
                "loss_runs", _list(pa.int32()), "run lengths: not trained, trained, not trained, …"
            ),
            Column(
                "docs",
                _list(DOC),
                "where each document comes from, in the order of doc_lens; its segments, in "
                "reading order, add up to its length",
            ),
            Column("n_tokens", pa.int32(), "tokens of the row", "tokens"),
        ),
        row_group_rows=row_group_rows,
    )


SHARDS = shard_table(pa.uint16(), 16)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        REPOS,
        COMMITS,
        TRIPLES,
        CHANGES,
        BLOBS,
        TREES,
        SIGNATURES,
        BANDS,
        EDGES,
        CLUSTERS,
        SCORES,
        DECISIONS,
        DOCUMENTS,
        TOKENS,
        REJECTS,
        SHARDS,
    )
}


def schema_json(table: Table) -> dict[str, object]:
    """What `schemas/<table>.json` holds: enough to read the table from another language."""
    return {
        "table": table.name,
        "schema_version": SCHEMA_VERSION,
        "meaning": table.meaning,
        "columns": [
            {
                "name": c.name,
                "type": str(c.type),
                "nullable": c.nullable,
                "unit": c.unit,
                "meaning": c.meaning,
            }
            for c in table.columns
        ],
    }
