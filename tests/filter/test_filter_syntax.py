from __future__ import annotations

import ast
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeflow.filter import syntax
from codeflow.filter.syntax import (
    ABSENT,
    GRAMMARS,
    PREPROCESSED,
    Syntax,
    bracket_imbalance,
    count_errors,
    inspect,
    is_broken,
    parse,
    parser,
)

SOURCES = {
    "C": b"""#include <stdio.h>
int add(int a, int b[2]) {
    if (a > b[0]) { return a + b[1]; }
    for (int i = 0; i < 3; i++) { printf("%d (\\n", i); }
    return (a);
}
""",
    "C++": b"""#include <vector>
namespace n {
template <typename T> struct Box { T v; T get() const { return v; } };
int sum(const std::vector<int>& xs) {
    int s = 0;
    for (auto x : xs) { s += xs[0] * (x + 1); }
    return s;
}
}
""",
    "Go": b"""package main

import "fmt"

func add(a int, b []int) (int, error) {
\tif a > b[0] {
\t\treturn a, nil
\t}
\tfor i := range b {
\t\tfmt.Println(b[i])
\t}
\treturn (a + 1), nil
}
""",
    "Java": b"""class A {
    private int[] xs = {1, 2};
    int add(int a) {
        if (a > xs[0]) { return a; }
        for (int x : xs) { System.out.println(x); }
        return (a + 1);
    }
}
""",
    "JavaScript": b"""import x from "y";
export function add(a, b) {
  if (a > b[0]) { return { a, b }; }
  for (const k of b) { console.log(k, [k]); }
  return (a + 1);
}
""",
    "Python": b"""import os

def add(a, b):
    if a > b[0]:
        return {"a": a, "b": [b, (a, b)]}
    for k in b:
        print(k, os.path.join("x", "y"))
    return (a + 1)
""",
    "Rust": b"""use std::fmt;
struct P { x: i32 }
fn add(a: i32, b: &[i32]) -> i32 {
    if a > b[0] { return a; }
    for k in b.iter() { println!("{}", k); }
    let p = P { x: (a + 1) };
    p.x
}
""",
    "TSX": b"""export const App = (props: { a: number[] }) => {
  const b = props.a[0];
  return <div className="x">{props.a.map((k) => (<i key={k}>{k + b}</i>))}</div>;
};
""",
    "TypeScript": b"""interface P { x: number; y?: string[] }
export function add<T extends P>(a: T, b: number[]): number {
  if (a.x > b[0]) { return a.x; }
  for (const k of b) { console.log(k, [k]); }
  return (a.x + 1) as number;
}
""",
}
LANGUAGES = sorted(GRAMMARS)
CONFLICT = b"<<<<<<< HEAD\n\tx = 1;\n=======\n\tx = 2;\n>>>>>>> topic\n"


def inspected(language: str, data: bytes) -> Syntax:
    found = inspect(language, data)
    assert found is not None
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_grammar_loads_and_reads_its_language(language: str) -> None:
    assert parser(language).language is not None
    assert 13 <= parser(language).language.abi_version <= 15
    assert inspected(language, SOURCES[language]) == Syntax(0, 0)
    assert parser(language) is parser(language)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("brackets", [b"([{", b")]}"])
def test_a_deleted_bracket_is_found_and_its_repair_is_not_punished(
    language: str, brackets: bytes
) -> None:
    source = SOURCES[language]
    clean = inspected(language, source)
    places = [i for i, c in enumerate(source) if c in brackets and source[i - 4 : i] != b'"%d ']
    damaged = [inspected(language, source[:i] + source[i + 1 :]) for i in places]
    found = sum(is_broken(language, clean, d) for d in damaged)
    assert len(places) >= 7
    assert found / len(places) >= 0.9
    assert not any(is_broken(language, d, clean) for d in damaged)


@pytest.mark.parametrize("language", LANGUAGES)
def test_truncation_is_found(language: str) -> None:
    source = SOURCES[language]
    cut = source[: source.rindex(b"(")] + b"("
    assert is_broken(language, inspected(language, source), inspected(language, cut))


@pytest.mark.parametrize("language", sorted(set(GRAMMARS) - PREPROCESSED))
def test_conflict_markers_are_errors(language: str) -> None:
    lines = SOURCES[language].splitlines(keepends=True)
    lines.insert(3, CONFLICT)
    assert inspected(language, b"".join(lines)).errors > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_line_ends_make_no_difference(language: str) -> None:
    source = SOURCES[language]
    assert inspected(language, source.replace(b"\n", b"\r\n")) == Syntax(0, 0)
    assert inspected(language, source.rstrip(b"\n")) == Syntax(0, 0)
    assert inspected(language, b"") == Syntax(0, 0)


def test_old_errors_are_forgiven_but_not_new_ones() -> None:
    bad = SOURCES["Go"] + b"func (\n"
    assert not is_broken("Go", inspected("Go", bad), inspected("Go", bad + b"// more\n"))
    assert is_broken("Go", ABSENT, inspected("Go", bad))
    worse = b"func ) {\n" + bad + b"\n}} var = = 1\n"
    assert is_broken("Go", inspected("Go", bad), inspected("Go", worse))


def test_error_and_missing_nodes_are_both_counted() -> None:
    missing = parse("JavaScript", b"f(1;\n")
    stray = parse("JavaScript", b"let a = 1;\n@@@ ### \nlet b = 2;\n")
    assert missing is not None
    assert stray is not None
    assert count_errors(missing.root_node) == 1
    assert count_errors(stray.root_node) >= 1


def test_errors_equal_those_of_a_full_walk() -> None:
    tree = parse(
        "Java", b"class A { int f( { return [; } } } int = ;\nclass B { void g() { ( } }\n"
    )
    assert tree is not None
    stack, expected = [tree.root_node], 0
    while stack:
        node = stack.pop()
        expected += node.is_error or node.is_missing
        stack += node.children
    assert count_errors(tree.root_node) == expected > 2


def test_macros_are_not_errors_in_c_and_cpp() -> None:
    macros = (
        b"FMT_BEGIN_NAMESPACE\nFMT_EXPORT template <typename... T>\nFMT_API FMT_NODISCARD auto f"
        b"(T&&... a) FMT_NOEXCEPT -> int FMT_ATTR(x) {\n  FMT_TRY { FOREACH(i, a) g(i); }"
        b" FMT_CATCH(...) {}\n}\nLIST_HEAD(x, y) z;\nFMT_END_NAMESPACE\n"
    )
    for language in sorted(PREPROCESSED):
        found = inspected(language, macros)
        assert found.errors > 0
        assert not is_broken(language, ABSENT, found)


@pytest.mark.parametrize(
    "code",
    [
        b"int a; // ) } ]",
        b"int a; // continued \\\n ) }\nint b;",
        b"/* ( { [ \n */ int a;",
        b'char *s = "(\\"{[";',
        b"char c = '('; char d = '\\''; char e = u8'{';",
        b'auto s = R"x(\n " ( { )x";',
        b'auto s = LR"(((()";',
        b"int n = 1'000'000; f(n);",
        b"int n = 0xFF'FF; char c = '(';",
        b"#if A\nif (a) {\n#elif B\nif (b) {\n#else\nif (c) {\n#endif\n}",
        b"#ifdef A\n#ifdef B\nx(\n#else\ny(\n#endif\n)\n#else\n((((\n#endif",
        b"#error don't\nint a;",
        b"#endif\n#else\nint a[1];",
    ],
)
def test_brackets_that_are_no_code_do_not_count(code: bytes) -> None:
    assert bracket_imbalance(code) == 0


@pytest.mark.parametrize(
    ("code", "count"),
    [(b"f(", 1), (b"f)", 1), (b"{[(", 3), (b'"(" (', 1), (b"#if A\n{\n#endif", 1), (b"'a' (", 1)],
)
def test_brackets_without_a_partner_count(code: bytes, count: int) -> None:
    assert bracket_imbalance(code) == count


@given(
    st.integers(0, 4),
    st.text(alphabet="(){}[]ab ", max_size=12).map(str.encode),
    st.sampled_from([b"// %s\n", b"/* %s */\n", b'"%s";\n']),
)
def test_comments_and_strings_never_change_the_balance(line: int, text: bytes, form: bytes) -> None:
    lines = SOURCES["C"].splitlines(keepends=True)
    lines.insert(line, form % text)
    assert bracket_imbalance(b"".join(lines)) == 0


@pytest.mark.parametrize(
    "unit", [b'R"(', b"/*", b'"\\\n', b"'\\\n", b"'", b"//\\\n", b"#if\n", b" ", b"1'", b"\\"]
)
def test_hostile_c_is_lexed_in_linear_time(unit: bytes) -> None:
    start = time.process_time()
    assert bracket_imbalance(unit * (1_000_000 // len(unit))) <= 1
    assert time.process_time() - start < 2


def test_deep_trees_are_fast_and_do_not_crash() -> None:
    start = time.process_time()
    for language, data in [
        ("Python", b"a+" * 100_000 + b"a"),
        ("JavaScript", b"a+" * 100_000 + b")"),
        ("Python", b"(" * 50_000),
    ]:
        # Past the deadline or not, both are answers; a crash or a hang is none.
        found = inspect(language, data)
        assert found is None or found.errors >= 0
    assert inspected("Python", b"a+" * 100_000 + b"a").errors == 0
    assert time.process_time() - start < 2  # measured 0.2 s


def test_a_cancelled_parse_leaves_nothing_behind() -> None:
    table = b"x = [" + b"1, " * 50_000 + b"]\n"
    assert parse("Python", table, max_steps=10) is None
    tree = parse("Python", b"a = 1\n")
    assert tree is not None
    assert (tree.root_node.end_byte, tree.root_node.has_error) == (6, False)
    assert parse("Python", table) is not None  # the default deadline has room for tables


def test_the_deadline_counts_steps_and_so_is_the_same_every_time() -> None:
    data = b"x = [" + b"1, " * 5_000 + b"]\n"

    def steps_needed() -> int:
        low, high = 0, 10_000
        while low < high:
            middle = (low + high) // 2
            if parse("Python", data, max_steps=middle) is None:
                low = middle + 1
            else:
                high = middle
        return low

    assert 10 < steps_needed() == steps_needed()


def test_a_cancelled_file_counts_as_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syntax, "MIN_STEPS", 1)
    monkeypatch.setattr(syntax, "STEPS_PER_BYTE", 0.0)
    assert inspect("Python", b"x = 1\n" * 2000) is None


@pytest.mark.parametrize(
    ("language", "data"),
    [
        ("COBOL", b"a"),
        ("", b"a"),
        ("JavaScript", b"/**\n * @flow strict\n */\ntype A = {| a: 1 |};\n"),
        ("Python", b"a = 1\n" * (syntax.MAX_BYTES // 6 + 1)),
    ],
    ids=["no grammar", "no language", "flow", "too large"],
)
def test_not_parsed(language: str, data: bytes) -> None:
    assert inspect(language, data) is None


def test_garbage_is_an_error_not_an_exception() -> None:
    assert inspected("Python", bytes(range(256)) * 20).errors > 0
    assert inspected("Rust", b"\xff\xfe\x00(").errors > 0


def test_dangerous_functions_of_tree_sitter_are_not_used() -> None:
    source = Path(syntax.__file__).read_text()
    names = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    assert not names & {"copy", "depth", "parent", "walk"}
    assert not re.search(r"str\((?:node|root)", re.sub(r'""".*?"""', "", source, flags=re.DOTALL))
