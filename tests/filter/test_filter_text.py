from __future__ import annotations

import base64
import random
import re
import time

import pygit2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.filter.text import (
    INDENTED,
    added_lines,
    is_utf8,
    longest_base64,
    substance,
    text_scores,
)

LINES = st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12)
TRICKY = st.sampled_from(
    [
        b"",
        b"++ b/x",
        b"-- a/x",
        b"@@ -1 +1 @@",
        b"diff --git a/x b/x",
        b"+",
        b"\\ No newline",
        b"x\r",
    ]
)


def patch_of(old: bytes, new: bytes, name: str = "x") -> bytes:
    patch = pygit2.Patch.create_from(old, new, old_as_path=name, new_as_path=name)
    return patch.data


@given(st.lists(TRICKY, max_size=6), st.lists(TRICKY, max_size=6), st.booleans())
def test_added_lines_are_those_git_counts_even_when_they_look_like_headers(
    old: list[bytes], new: list[bytes], newline: bool
) -> None:
    end = b"\n" if newline else b""
    before, after = b"\n".join(old) + end, b"\n".join(new) + end
    patch = pygit2.Patch.create_from(before, after, old_as_path="x", new_as_path="x")
    expected = [
        line.raw_content.removesuffix(b"\n")
        for hunk in patch.hunks
        for line in hunk.lines
        if line.origin == "+"
    ]
    assert added_lines(patch.data) == expected


def test_added_lines_cover_all_files_and_skip_files_without_hunks() -> None:
    binary = b"diff --git a/i.png b/i.png\nBinary files a/i.png and b/i.png differ\n"
    renamed = b"diff --git a/o b/n\nsimilarity index 100%\nrename from o\nrename to n\n"
    patch = patch_of(b"a\n", b"b\n", "one") + binary + renamed + patch_of(b"", b"c\nd", "two")
    assert added_lines(patch) == [b"b", b"c", b"d"]
    assert added_lines(b"") == []


def test_lines_end_at_line_feeds_only() -> None:
    assert added_lines(patch_of(b"", b"a\rb\x0cc\x85d\r\ne\n")) == [b"a\rb\x0cc\x85d\r", b"e"]


def test_no_added_lines_score_as_harmless() -> None:
    scores = text_scores([])
    assert (scores.max_line, scores.mean_line, scores.alnum_fraction) == (0, 0.0, 1.0)
    assert (scores.longest_base64, scores.conflict_markers) == (0, 0)


@given(LINES)
def test_line_statistics_match_their_definition(lines: list[bytes]) -> None:
    scores = text_scores(lines)
    joined = b"".join(lines)
    alnum = sum((chr(b).isascii() and chr(b).isalnum()) or b >= 0x80 for b in joined)
    assert scores.max_line == max(map(len, lines), default=0)
    assert scores.mean_line * max(1, len(lines)) == pytest.approx(len(joined))
    assert scores.alnum_fraction == pytest.approx(alnum / len(joined) if joined else 1.0)


def test_text_in_other_scripts_counts_as_letters() -> None:
    assert text_scores(["# 修复登录错误".encode()]).alnum_fraction > 0.8
    assert text_scores([b"+-=*/ {} () ;;"]).alnum_fraction == 0


@given(st.text(alphabet="aZ9+/ .\n", max_size=80))
def test_base64_runs_of_unwrapped_text_are_runs_within_a_line(text: str) -> None:
    expected = max((len(run) for run in re.findall(r"[aZ9+/]+", text)), default=0)
    data = text.encode()
    if expected < 60:
        assert longest_base64(data) == expected
    else:
        assert longest_base64(data) >= expected


@pytest.mark.parametrize("columns", [60, 64, 76])
def test_wrapped_base64_is_one_run(columns: int) -> None:
    encoded = base64.b64encode(random.Random(0).randbytes(1500)).rstrip(b"=")
    wrapped = re.sub(rb"(.{%d})" % columns, rb"\1\n", encoded)
    assert longest_base64(b'key = """\n' + wrapped + b'\n"""') >= len(encoded)
    assert longest_base64(wrapped.replace(b"\n", b"\n  ")) == columns


def test_a_list_of_words_and_banners_are_not_encoded_data() -> None:
    words = b"\n".join([b"internationalisation"] * 500)
    assert longest_base64(words) == 20
    assert longest_base64(words + b"\n" + b"a" * 70) == 70
    assert longest_base64(b"a" * 70 + b"\n" + words) == 90
    assert longest_base64(b"\n".join([b"/" * 78, b"// section", b"/" * 78] * 20)) < 200


def test_conflict_markers_count_but_title_underlines_do_not() -> None:
    lines = [b"<<<<<<< HEAD", b"a", b"||||||| base", b"=======", b"b", b">>>>>>> topic"]
    assert text_scores(lines).conflict_markers == 3
    title = [b"Welcome", b"=======", b">>> 1 << 2", b"  <<<<<<< indented", b"<<<<<<<x"]
    assert text_scores(title).conflict_markers == 0


SOURCE = b"def f(a):\n    if a:\n        return a\n    return None\n"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.sampled_from(["Python", "Go", "C"]))
def test_blank_lines_never_change_the_substance(places: list[int], language: str) -> None:
    lines = SOURCE.split(b"\n")
    for place in places:
        lines.insert(place, b"  \t")
    assert substance(b"\n".join(lines), language) == substance(SOURCE, language)


@given(
    st.sampled_from([b"def", b"f", b"a", b"if", b"return", b"None"]),
    st.from_regex(rb"[b-z]{1,6}_", fullmatch=True),
    st.sampled_from(["Python", "Go", ""]),
)
def test_a_changed_word_always_changes_the_substance(
    word: bytes, other: bytes, language: str
) -> None:
    changed = re.sub(rb"\b%s\b" % word, other, SOURCE, count=1)
    assert substance(changed, language) != substance(SOURCE, language)


@pytest.mark.parametrize("language", sorted(INDENTED))
def test_indentation_has_meaning_in_indented_languages(language: str) -> None:
    moved = SOURCE.replace(b"    return None", b"        return None")
    assert substance(moved, language) != substance(SOURCE, language)
    assert substance(moved, "Go") == substance(SOURCE, "Go")


@pytest.mark.parametrize("language", ["Python", "JavaScript"])
def test_line_ends_and_trailing_space_have_no_substance(language: str) -> None:
    crlf = SOURCE.replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    assert substance(crlf, language) == substance(SOURCE, language)
    assert substance(SOURCE.replace(b":", b":  "), language) == substance(SOURCE, language)


def test_utf8() -> None:
    assert is_utf8("naïve".encode())
    assert is_utf8(b"")
    assert not is_utf8("naïve".encode("latin-1"))


def test_throughput_stays_far_above_parsing() -> None:
    patch = patch_of(b"", SOURCE * 40_000)
    start = time.process_time()
    scores = text_scores(added_lines(patch))
    seconds = time.process_time() - start
    assert scores.max_line == 16
    assert len(patch) / 1e6 / seconds > 25  # MB/s; measured 150, the margin is for busy machines
