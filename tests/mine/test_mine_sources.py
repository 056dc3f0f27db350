"""The list of repositories: every form of entry, and every mistake named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from repo_builder import Repo, git

from codeflow.errors import SourceListError
from codeflow.mine.sources import parse_source, parse_sources, read_sources


@pytest.mark.parametrize(
    ("entry", "location", "name"),
    [
        ("pallets/flask", "https://github.com/pallets/flask", "pallets/flask"),
        ("pallets/flask.git", "https://github.com/pallets/flask", "pallets/flask"),
        ("https://GitHub.com/a/b.git", "https://github.com/a/b", "a/b"),
        ("https://github.com/a/b/", "https://github.com/a/b", "a/b"),
        ("https://host:8443/group/sub/x", "https://host:8443/group/sub/x", "sub/x"),
        ("ssh://git@host/a/b.git", "ssh://git@host/a/b", "a/b"),
        ("git@github.com:a/b.git", "ssh://git@github.com/a/b", "a/b"),
    ],
)
def test_remote_entries(entry: str, location: str, name: str) -> None:
    source = parse_source(entry)
    assert (source.kind, source.location, source.name) == ("url", location, name)


def test_one_repository_has_one_id_however_it_is_written() -> None:
    entries = ["a/b", "https://github.com/a/b", "https://github.com/a/b.git", "git@github.com:a/b"]
    ids = {parse_source(entry).repo_id for entry in entries}
    assert len(ids) == 1
    assert parse_source("a/c").repo_id not in ids
    assert parse_source("https://gitlab.com/a/b").repo_id not in ids


def test_local_repositories_and_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Repo(tmp_path / "with space.git")
    repo.chain({b"a": b"1\n"})
    git(repo.path, "bundle", "create", "-q", str(tmp_path / "r.bundle"), "HEAD", "main")
    monkeypatch.chdir(tmp_path)
    path, bundle = parse_source("with space.git"), parse_source("./r.bundle")
    assert (path.kind, path.location, path.name) == ("path", str(repo.path), "with space")
    assert (bundle.kind, bundle.name) == ("bundle", "r")
    assert bundle.location == str(tmp_path / "r.bundle")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("~/r.bundle") == bundle
    assert "/" not in path.repo_id + bundle.repo_id
    assert " " not in path.repo_id


def test_comments_blank_lines_and_repeats(tmp_path: Path) -> None:
    listing = tmp_path / "repos.txt"
    listing.write_bytes(
        "\ufeff# a list\n\na/b  # why\r\n  c/d\na/b\nhttps://github.com/a/b\n".encode()
    )
    assert [s.name for s in read_sources(listing)] == ["a/b", "c/d"]


def test_a_hash_inside_an_entry_is_no_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo(tmp_path / "c#.git")
    monkeypatch.chdir(tmp_path)
    assert parse_sources(["./c#.git # C sharp"], "x")[0].name == "c#"


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    listing = tmp_path / "repos.txt"
    listing.write_text("a/b\n--upload-pack=touch\n# fine\nfile:///etc\nc/d e/f\n./missing\n")
    with pytest.raises(SourceListError) as error:
        read_sources(listing)
    lines = str(error.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{listing}:{n}" for n in (2, 4, 5, 6)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("--upload-pack=touch", "looks like an option"),
        ("-oProxyCommand@host:x", "looks like an option"),
        ("ext::sh -c x", "has spaces"),
        ("ext::sh", "`ext` URLs are not allowed"),
        ("file:///etc", "`file` URLs are not allowed"),
        ("http://host/a/b", "`http` URLs are not allowed"),
        ("git://host/a/b", "`git` URLs are not allowed"),
        ("https://token@host/a/b", "holds credentials"),
        ("https://me:secret@host/a/b", "holds credentials"),
        ("ssh://me:secret@host/a/b", "holds credentials"),
        ("https://me:sec@ret@host/a/b", "malformed https URL"),
        ("https://me:sec/ret@host/a/b", "malformed https URL"),
        ("https://host", "malformed https URL"),
        ("HTTPS://host/a/b", "malformed HTTPS URL"),
        ("one two", "has spaces"),
        ("flask", "a GitHub repository is written owner/name"),
        ("./missing/folder", "no such folder or bundle"),
        ("~nobody-of-this-name/x", "home directory"),
        ("x" * 5000, "too long"),
        ("nul\0byte", "null"),
    ],
)
def test_mistakes_are_explained_and_passwords_never_repeated(entry: str, message: str) -> None:
    with pytest.raises(SourceListError, match=message) as error:
        parse_source(entry)
    for secret in ("secret", "sec@ret", "sec/ret", "token"):
        assert secret not in str(error.value)


def test_a_folder_named_like_a_github_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    Repo(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceListError, match=r"write \./owner/name or https://github.com/owner"):
        parse_source("owner/name")
    assert parse_source("./owner/name").kind == "path"


def test_folders_and_files_that_are_no_repository(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path, message in (
        (tmp_path, "not a git repository"),
        (tmp_path / "file", "not a git bundle"),
    ):
        with pytest.raises(SourceListError, match=message):
            parse_source(str(path))


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    listing = tmp_path / "repos.txt"
    with pytest.raises(SourceListError, match="no list of repositories at"):
        read_sources(listing)
    listing.write_text("# nothing\n")
    with pytest.raises(SourceListError, match="names no repository"):
        read_sources(listing)
    listing.write_bytes(b"caf\xe9/x\n")
    with pytest.raises(SourceListError, match="cannot read the list"):
        read_sources(listing)
