"""Commits: whatever bytes a header or message holds, a value comes out, and no address."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_builder import WIDE, Repo, git, mine, text

from codeflow.mine.commits import Commit, parse_commit

TREE = b"tree " + b"12" * 20


def parsed(
    message: bytes = b"", author: bytes = b"A <a@b> 5 +0000", headers: bytes = b""
) -> Commit:
    return parse_commit("c" * 40, TREE + b"\nauthor " + author + b"\n" + headers + b"\n" + message)


@pytest.mark.parametrize(
    ("author", "identity", "seconds", "minutes"),
    [
        (b"Ada L <a@b> 1600000000 +0130", b"Ada L <a@b>", 1600000000, 90),
        (b"Ada <a@b> 1600000000 -0800", b"Ada <a@b>", 1600000000, -480),
        (b"<a@b> 7 +0000", b" <a@b>", 7, 0),
        (b"Ada <> 7 +0000", b"Ada <>", 7, 0),
        (b"Ada   <a@b>", b"Ada <a@b>", 0, 0),
        (b"Ada <a@b> -100000 +0000", b"Ada <a@b>", -100000, 0),
        (b"Ada <a@b> 4302000000 +0000", b"Ada <a@b>", 4302000000, 0),
        (b"Ada <a@b> 1000000000000000000 +0000", b"Ada <a@b>", 10**18, 0),
        (b"Ada <a@b> 9223372036854775808 +0000", b"Ada <a@b>", 0, 0),
        (b"Ada <a@b> " + b"9" * 5000 + b" +0000", b"Ada <a@b>", 0, 0),
        (b"Ada <a@b> 7 +9999", b"Ada <a@b>", 7, 0),
        (b"Ada <a@b> 7 +51800", b"Ada <a@b>", 7, 0),
        (b"Ada <a@b> 7 -5", b"Ada <a@b>", 7, -5),
        (b"Ada <a@b> 7 +" + b"1" * 5000, b"Ada <a@b>", 7, 0),
        (b"A <B <a@b> 7 +0000", b"A <B <a@b>", 7, 0),
        (b"no brackets", b"no brackets", 0, 0),
        (b"\xff\xfe <\xff> 7 +0000", b"\xff\xfe <\xff>", 7, 0),
        (b"", b"", 0, 0),
    ],
)
def test_identities(author: bytes, identity: bytes, seconds: int, minutes: int) -> None:
    commit = parsed(author=author)
    assert (commit.author, commit.author_time, commit.author_offset) == (
        identity,
        seconds,
        minutes,
    )


def test_a_hostile_author_line_costs_linear_time() -> None:
    started = time.process_time()
    parsed(author=b"A" + b" " * 200_000)
    parsed(author=b"<" * 200_000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("encoding", "body", "message", "lossy"),
    [
        (b"", "naïve ☃\u2028\0!".encode(), "naïve ☃\u2028\0!", False),
        (b"ISO-8859-1", b"caf\xe9", "café", False),
        (b"gbk", "中文".encode("gbk"), "中文", False),
        (b"", b"caf\xe9", "caf\ufffd", True),
        (b"bogus", b"plain", "plain", True),
        (b"utf-8", b"\xff", "\ufffd", True),
        (b"hex", b"6162", "6162", True),
        (b"rot13", b"abc", "abc", True),
        (b"a\0b", b"abc", "abc", True),
        (b"unicode_escape", rb"\ud800", r"\ud800", True),
        (b"utf-7", b"+2AA-", "+2AA-", True),
        (b"undefined", b"abc", "abc", True),
    ],
)
def test_encodings(encoding: bytes, body: bytes, message: str, lossy: bool) -> None:
    commit = parsed(body, headers=b"encoding " + encoding + b"\n" if encoding else b"")
    assert commit.message == message
    assert commit.message_raw == (body if lossy else None)


@given(st.binary(max_size=200), st.binary(max_size=60), st.binary(max_size=60))
def test_no_header_can_raise_and_every_message_can_be_stored(
    body: bytes, author: bytes, encoding: bytes
) -> None:
    raw = TREE + b"\nauthor " + author + b"\nencoding " + encoding + b"\n\n" + body
    try:
        commit = parse_commit("c" * 40, raw)
    except ValueError:
        assert b"\ntree" in author + encoding + b"\n"
        return
    commit.message.encode()
    assert -(1 << 63) <= commit.author_time < 1 << 63
    assert abs(commit.author_offset) <= 14 * 60
    assert isinstance(commit.is_bot, bool)


def test_signatures_and_merge_tags_are_no_headers() -> None:
    signed = b"gpgsig -----BEGIN\n tree " + b"34" * 20 + b"\n author B <b@c> 1 +0000\n -----END\n"
    commit = parsed(b"subject\n", headers=signed)
    assert (commit.tree, commit.author) == ("12" * 20, b"A <a@b>")
    with pytest.raises(ValueError, match="names no tree"):
        parse_commit("c" * 40, b"author A <a@b> 1 +0000\n\nsubject\n")


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("Add a thing (#12)", [12]),
        ("Add a thing (#12)  \n\nbody (#13)", [12]),
        ("Merge pull request #345 from a/b", [345]),
        ("Backport (#1) (#22)", [22]),
        ("Undo (#12) again", []),
        ("See #12", []),
        ("Add\n\nMerge pull request #3 from a/b", []),
        ("Too long (#1234567890)", []),
    ],
)
def test_pull_requests(message: str, numbers: list[int]) -> None:
    assert parsed(message.encode()).pull_requests == numbers


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("Fixes #3", [3]),
        ("close #1, closes #2, closed #3, fix #4, fixed #5, resolve #6, resolves #7", range(1, 8)),
        ("Closes: #4", [4]),
        ("fixes owner/repo#5", [5]),
        ("Resolves https://github.com/a/b/issues/6", [6]),
        ("fixes #8 and fixes #8", [8]),
        ("FIXES #9\nfixes #7", [7, 9]),
        ("prefixes #3", []),
        ("the latest #3", []),
        ("hotfix #3", []),
        ("discloses #3", []),
        ("fixing #3", []),
        ("fix for #3", []),
        ("fixes #3rd", []),
        ("fixes#3", []),
        ("#3", []),
    ],
)
def test_closing_keywords(message: str, numbers: list[int]) -> None:
    assert parsed(message.encode()).closes_issues == list(numbers)


@pytest.mark.parametrize(
    ("author", "is_bot"),
    [
        ("dependabot[bot] <49699333+dependabot[bot]@users.noreply.github.com>", True),
        ("dependabot-preview <support@dependabot.com>", True),
        ("Renovate Bot <bot@renovateapp.com>", True),
        ("pre-commit-ci <x@y>", True),
        ("github-actions <x@y>", True),
        ("my-bot <x@y>", True),
        ("Someone <release-bot@y>", True),
        ("Abbott <a@b>", False),
        ("Bothwell <both@b>", False),
        ("Botond <botond@bot.example>", False),
        ("Robot Lover <a@b>", False),
        ("Snyker <a@b>", False),
    ],
)
def test_bots(author: str, is_bot: bool) -> None:
    assert parsed(author=author.encode() + b" 1 +0000").is_bot is is_bot


@pytest.mark.parametrize(
    ("message", "is_revert"),
    [
        ('Revert "Add a thing"', True),
        ("revert: feat", True),
        ("Undo\n\nThis reverts commit 0123456789abcdef.", True),
        ("Reverting is hard", False),
        ("Add undo\n\nrevert this one day", False),
        ("Do not revert", False),
    ],
)
def test_reverts(message: str, is_revert: bool) -> None:
    assert parsed(message.encode()).is_revert is is_revert


def test_authors_are_keyed_hashes() -> None:
    ada = parsed()
    assert ada.author_id("k") == parsed(author=b"A <a@b> 99 -0100").author_id("k")
    assert ada.author_id("k") != ada.author_id("other key")
    assert ada.author_id("k") != parsed(author=b"A <a@c> 5 +0000").author_id("k")
    assert len(ada.author_id("k" * 100)) == 16


def test_no_address_reaches_the_tables(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    author = b"Zacharias <zacharias@secret.example> 1600000000 +0000"
    one = repo.commit({b"a.py": text("a", 9)}, author=author)
    repo.commit({b"a.py": text("a", 9, 1)}, [one], author=author)
    result = mine(repo.path, tmp_path / "data", **WIDE)
    assert len(result.rows("triples")) == 1
    for file in result.marker.files:
        rows = repr(result.rows(file.table))
        assert "secret.example" not in rows
        assert "Zacharias" not in rows


def test_git_and_we_read_the_same_authors(sample_repository: Path, tmp_path: Path) -> None:
    result = mine(sample_repository, tmp_path / "data", **WIDE)
    log = git(sample_repository, "log", "--format=%H%x00%T%x00%at%x00%P%x00%B%x01", "HEAD")
    by_git = {}
    for entry in log.decode().split("\x01\n")[:-1]:
        commit, tree, seconds, parents, message = entry.split("\0")
        message = re.sub(r"<[^<>]+@[^<>]+>", "<>", message.strip())  # ours hold no address
        by_git[commit] = (tree, int(seconds), parents.split(), message)
    ours = {
        c["commit"]: (c["tree"], c["author_time"], c["parents"], c["message"].strip())
        for c in result.rows("commits")
    }
    assert ours == by_git


def test_trailers_end_a_message_and_hold_no_address(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "r.git")
    body = (
        b"Count what is left\n\nNote: this is a paragraph,\nnot trailers.\n\n"
        b"Fixes: #12\nCo-authored-by: Ana <ana@example.org>\n"
    )
    first = repo.commit({b"a": b"1\n"}, [], b"start\n")
    second = repo.commit({b"a": b"2\n"}, [first], body)
    repo.commit({b"a": b"3\n"}, [second], b"Key: value is the subject here\n")
    rows = mine(repo.path, tmp_path / "data", **WIDE).rows("commits")
    assert [r["trailers"] for r in rows] == [[], ["Fixes: #12", "Co-authored-by: Ana <>"], []]
    assert "Note: this is a paragraph" in rows[1]["message"]
    assert all("@" not in r["message"] for r in rows)
