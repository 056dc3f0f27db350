"""The sample repository is what the demo and other tests believe it is."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pygit2
import pytest
import tree_sitter
import tree_sitter_c
import tree_sitter_go
import tree_sitter_java
import tree_sitter_python
import tree_sitter_rust
import tree_sitter_typescript

from codeflow.errors import UsageError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "make_sample_repository.py"
sys.path.insert(0, str(ROOT))  # `examples` is not installed with the package.
sample = importlib.import_module("examples.make_sample_repository")

HEAD = "c34803f26b5ba69964ae4dc4b025030528459877"
N_MAINLINE = 164

GRAMMARS = {
    ".py": tree_sitter_python.language(),
    ".ts": tree_sitter_typescript.language_typescript(),
    ".go": tree_sitter_go.language(),
    ".rs": tree_sitter_rust.language(),
    ".c": tree_sitter_c.language(),
    ".h": tree_sitter_c.language(),
    ".java": tree_sitter_java.language(),
}
PARSERS = {suffix: tree_sitter.Parser(tree_sitter.Language(g)) for suffix, g in GRAMMARS.items()}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> pygit2.Repository:
    path = tmp_path_factory.mktemp("sample") / "stockroom.git"
    sample.build(path)
    return pygit2.Repository(str(path))


@pytest.fixture(scope="module")
def mainline(repo: pygit2.Repository) -> list[pygit2.Commit]:
    """First-parent commits, oldest first."""
    commits = [repo[repo.head.target]]
    while commits[-1].parents:
        commits.append(commits[-1].parents[0])
    return commits[::-1]


@pytest.fixture(scope="module")
def window(mainline: list[pygit2.Commit]) -> list[pygit2.Commit]:
    """The commits between 40 and 80 % of the mainline, by count."""
    return mainline[len(mainline) * 2 // 5 : len(mainline) * 4 // 5]


def deltas(commit: pygit2.Commit) -> Iterator[pygit2.DiffDelta]:
    diff = commit.tree.diff_to_tree(commit.parents[0].tree, swap=True)
    diff.find_similar()
    yield from diff.deltas


def subjects(commits: list[pygit2.Commit]) -> list[str]:
    return [c.message.splitlines()[0] for c in commits]


def new_files(
    repo: pygit2.Repository, commits: list[pygit2.Commit]
) -> dict[str, tuple[int, bytes]]:
    """Mode and content of every file as each commit left it, under its path."""
    return {
        d.new_file.path: (d.new_file.mode, repo[d.new_file.id].data)
        for c in commits
        for d in deltas(c)
        if d.status_char() != "D"
    }


def blobs(
    repo: pygit2.Repository, tree: pygit2.Tree, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    for entry in tree:
        path = prefix + entry.name
        if isinstance(entry, pygit2.Tree):
            yield from blobs(repo, entry, path + "/")
        else:
            yield path, entry.data


def is_test(path: str) -> bool:
    return bool(re.search(r"(^|/)tests?/|_test\.go$", path))


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_head_is_the_same_everywhere(repo: pygit2.Repository, tmp_path: Path) -> None:
    assert str(repo.head.target) == HEAD
    assert sample.build(tmp_path / "again") == HEAD


def test_git_settings_of_the_user_do_not_leak_in(tmp_path: Path) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(
        "[user]\nname = Eve\nemail = eve@example.com\n[core]\nautocrlf = true\n"
        "[commit]\ngpgsign = true\n[init]\ndefaultBranch = trunk\n"
    )
    (tmp_path / ".gitconfig").write_bytes(config.read_bytes())
    done = run(
        str(tmp_path / "repo"),
        GIT_CONFIG_GLOBAL=str(config),
        HOME=str(tmp_path),
        GIT_AUTHOR_NAME="Eve",
        GIT_COMMITTER_DATE="1 +0000",
        TZ="Asia/Tokyo",
    )
    assert done.returncode == 0, done.stderr
    assert pygit2.Repository(str(tmp_path / "repo")).branches["main"].target == pygit2.Oid(hex=HEAD)


def test_script_says_what_it_made_and_what_to_do_next(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    done = run(str(path))
    first, *rest = done.stdout.splitlines()
    assert first == f"{path}: 177 commits, head {HEAD}"
    assert str(path) in rest[0]
    assert rest[-1].strip().startswith("codeflow build --repos repos.txt")


def test_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not an empty folder" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        sample.build(tmp_path / "file")


def test_worktree_is_checked_out(tmp_path: Path) -> None:
    assert sample.build(tmp_path, bare=False) == HEAD
    assert (tmp_path / "README.md").read_text().startswith("# stockroom")
    assert (tmp_path / "data" / "current.csv").is_symlink()
    assert pygit2.Repository(str(tmp_path)).status() == {}


@pytest.mark.parametrize(
    "step", ["edit a\nx\n%%\ny", "delete a", "move a b", "swap a b c", "dance", "commit eve Hello"]
)
def test_a_step_that_does_not_fit_names_its_line(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story"
    story.mkdir()
    (story / "1.txt").write_text(f"Foreword.\n\n%% commit ana One\n%% new b\nb\n%% {step}\n")
    monkeypatch.setattr(sample, "CHAPTERS", story)
    with pytest.raises(sample.StoryError, match=r"^1\.txt:6: "):
        sample.build(tmp_path / "repo")


def test_both_sides_changing_a_file_is_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story"
    story.mkdir()
    (story / "1.txt").write_text(
        "%% commit ana One\n%% new a\n1\n%% on ana/side\n%% commit ana Two\n%% new a\n2\n"
        "%% on main\n%% commit ana Three\n%% new a\n3\n%% merge ana ana/side 1\nTitle\n"
    )
    monkeypatch.setattr(sample, "CHAPTERS", story)
    with pytest.raises(sample.StoryError, match="both sides changed a"):
        sample.build(tmp_path / "repo")


def test_objects_are_sound(repo: pygit2.Repository) -> None:
    fsck = ["git", "-C", repo.path, "fsck", "--strict", "--full"]
    done = subprocess.run(fsck, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dangling" not in done.stdout + done.stderr


def test_mainline_length_authors_and_clock(mainline: list[pygit2.Commit]) -> None:
    assert len(mainline) == N_MAINLINE
    assert len({c.author.email for c in mainline}) == 7
    assert len({c.author.offset for c in mainline}) >= 5
    times = [c.commit_time for c in mainline]
    assert times == sorted(set(times))


def test_commits_are_of_human_size(mainline: list[pygit2.Commit]) -> None:
    sizes = []
    for commit in mainline[1:]:
        diff = commit.tree.diff_to_tree(commit.parents[0].tree)
        diff.find_similar()
        sizes.append(diff.stats.insertions + diff.stats.deletions)
    assert max(sizes) <= 150
    assert sum(5 <= size <= 80 for size in sizes) > len(sizes) * 3 / 4


def test_licence_lies_at_the_root(mainline: list[pygit2.Commit]) -> None:
    for commit in (mainline[0], mainline[-1]):
        assert commit.tree["LICENSE"].data.startswith(b"MIT License\n")


def test_merges_have_two_parents_and_the_tree_of_both(mainline: list[pygit2.Commit]) -> None:
    merges = [c for c in mainline if len(c.parents) > 1]
    assert len(merges) == 6
    for merge in merges:
        main, side = merge.parents
        assert re.match(r"Merge pull request #\d+ from \w+/[\w-]+\n\n\w", merge.message)
        # The main line went on while the side branch was open, so this is a true merge.
        assert merge.tree.id not in (main.tree.id, side.tree.id)


def test_window_has_the_kinds_of_messages(window: list[pygit2.Commit]) -> None:
    lines = subjects(window)
    assert sum(line.startswith("Merge pull request #") for line in lines) >= 3
    assert sum(bool(re.search(r" \(#\d+\)$", line)) for line in lines) >= 5
    assert sum(line.startswith("Revert ") for line in lines) == 1
    assert sum(c.author.name == "dependabot[bot]" for c in window) >= 2
    assert sum("Fixes #" in c.message or "Refs #" in c.message for c in window) >= 2


def test_window_has_code_with_tests_in_every_language(
    repo: pygit2.Repository, window: list[pygit2.Commit]
) -> None:
    together = set()
    for commit in window:
        kinds: dict[str, set[bool]] = {}
        for d in deltas(commit):
            path = d.new_file.path
            kinds.setdefault(Path(path).suffix, set()).add(is_test(path))
            # Unit tests of Rust live in the file they test.
            if path.endswith(".rs") and d.status_char() == "M":
                old, new = repo[d.old_file.id].data, repo[d.new_file.id].data
                kinds[".rs"].add(new.count(b"#[test]") > old.count(b"#[test]"))
        together |= {suffix for suffix, found in kinds.items() if found == {True, False}}
    assert together >= {".py", ".ts", ".go", ".rs", ".c", ".java"}


def test_revert_restores_the_files_and_names_the_commit(window: list[pygit2.Commit]) -> None:
    (revert,) = [c for c in window if c.message.startswith("Revert ")]
    found = re.search(r"This reverts commit ([0-9a-f]{40})\.", revert.message)
    assert found
    (undone,) = [c for c in window if str(c.id) == found[1]]
    path = "stockroom/store.py"
    assert revert.tree[path].id == undone.parents[0].tree[path].id
    assert revert.tree.id != undone.parents[0].tree.id  # Work of others in between stays.


def test_window_has_renames_of_a_folder_and_of_a_file(window: list[pygit2.Commit]) -> None:
    renames = {
        (d.old_file.path, d.new_file.path)
        for c in window
        for d in deltas(c)
        if d.status_char() == "R"
    }
    java = "src/main/java/org/example/stockroom/Item.java"
    assert (f"client/{java}", f"client-java/{java}") in renames
    assert ("stockroom/audit.py", "stockroom/journal.py") in renames


def test_window_has_the_odd_files(repo: pygit2.Repository, window: list[pygit2.Commit]) -> None:
    files = new_files(repo, window)
    png = files["web/public/favicon.png"][1]
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert files["web/package-lock.json"]
    assert b"DO NOT EDIT" in files["web/src/generated/routes.ts"][1]
    assert "stockctl/vendor/example.org/tinyflag/tinyflag.go" in files
    pricelist = files["data/pricelist.csv"][1]
    assert pricelist.count(b"\r\n") == pricelist.count(b"\n") == 6
    assert files["data/current.csv"] == (0o120000, b"pricelist.csv")
    assert files["data/labels/größen.txt"][1] == b"M4 M5 M6 M8 M10 M12"
    with pytest.raises(UnicodeDecodeError):
        files["data/labels/regale.txt"][1].decode()
    pointer = rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:[0-9a-f]{64}\nsize \d+\n"
    assert re.fullmatch(pointer, files["docs/shelf.jpg"][1])


def test_window_has_a_change_of_the_mode_alone(window: list[pygit2.Commit]) -> None:
    changes = [(d.old_file, d.new_file) for c in window for d in deltas(c)]
    modes = [
        (old.mode, new.mode) for old, new in changes if old.id == new.id and old.path == new.path
    ]
    assert modes == [(0o100644, 0o100755)]


def test_window_has_a_commit_of_white_space_alone(window: list[pygit2.Commit]) -> None:
    blank = [
        c
        for c in window
        if len(c.parents) == 1
        and (diff := c.tree.diff_to_tree(c.parents[0].tree)).stats.insertions
        and not c.tree.diff_to_tree(
            c.parents[0].tree, flags=pygit2.enums.DiffOption.IGNORE_WHITESPACE
        ).stats.insertions
        and diff.stats.files_changed == 3
    ]
    assert subjects(blank) == ["checksum: indent by tabs, as the firmware does"]


def test_window_has_a_module_copied_word_for_word_but_one(window: list[pygit2.Commit]) -> None:
    web = window[-1].tree["web"]["src"]
    orders, returns = (web[name].data.decode() for name in ("orders.ts", "returns.ts"))
    assert orders != returns
    assert re.sub(r"\w+", "w", orders) == re.sub(r"\w+", "w", returns)


def test_window_has_a_near_duplicate_and_an_exact_one(window: list[pygit2.Commit]) -> None:
    (copy,) = [c for c in window if "firmware of the scanner" in c.message]
    ours, theirs = copy.tree["checksum"], copy.tree["firmware"]
    assert ours["label.c"].id == theirs["label.c"].id
    old, new = (set(words(tree["crc32.c"].data.decode())) for tree in (ours, theirs))
    assert 0.8 < len(old & new) / len(old | new) < 1


def words(text: str, n: int = 5) -> list[tuple[str, ...]]:
    """All runs of `n` words, the shingles of MinHash."""
    found = re.findall(r"\w+", text)
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def test_code_at_head_parses(repo: pygit2.Repository) -> None:
    counts = dict.fromkeys(PARSERS, 0)
    for path, data in blobs(repo, repo[repo.head.target].tree):
        suffix = Path(path).suffix
        if suffix in PARSERS:
            counts[suffix] += 1
            assert not PARSERS[suffix].parse(data).root_node.has_error, path
    assert min(counts.values()) >= 3, counts


def test_code_parses_all_along(repo: pygit2.Repository, mainline: list[pygit2.Commit]) -> None:
    for commit in mainline[1:]:
        for path, (_, data) in new_files(repo, [commit]).items():
            parser = PARSERS.get(Path(path).suffix)
            assert not (parser and parser.parse(data).root_node.has_error), (commit.message, path)
