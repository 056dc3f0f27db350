"""Recipes: what is refused and with which words, round trips, and what the hash depends on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codeflow.errors import RecipeError
from codeflow.recipe import (
    Recipe,
    changed_settings,
    load_recipe,
    override_recipe,
    recipe_from_mapping,
    to_toml,
)
from codeflow.settings import flatten, read_toml, to_mapping

_TOML = (Path(__file__).parents[2] / "pipelines").glob("*.toml")
PIPELINES = sorted(p for p in _TOML if not p.name.startswith("train-"))
LEAVES = list(flatten(Recipe()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mine.min_comits=3", "unknown setting `mine.min_comits`. Did you mean `mine.min_commits`"),
        ("dedupe.threshold=0.5", "unknown section `dedupe`. Did you mean `dedup`"),
        ("threshold=0.5", "unknown setting `threshold`. Did you mean `dedup.threshold`?"),
        ("nothing=0.5", "unknown setting `nothing`. Valid: `compose`"),
        ("mine.min_commits=many", "`mine.min_commits` must be a whole number, not 'many'"),
        ("mine.min_commits=2.5", "`mine.min_commits` must be a whole number, not 2.5"),
        ("mine.min_commits=true", "`mine.min_commits` must be a whole number, not True"),
        ("mine.prefer_tests=1", "`mine.prefer_tests` must be true or false, not 1"),
        ("dedup.threshold=high", "`dedup.threshold` must be a number, not 'high'"),
        ("tokenizer.path=3", "`tokenizer.path` must be text, not 3"),
        ("mine.min_commits=0", "`mine.min_commits` must be at least 1 commits, not 0"),
        ("dedup.threshold=1.01", "`dedup.threshold` must be at most 1, not 1.01"),
        ("dedup.threshold=nan", "`dedup.threshold` must be at least 0, not nan"),
        ("compose.context=change", "cannot be 'change'. Did you mean `changed`"),
        ("mine=3", "`mine` is a section"),
        ("name.x=3", "`name` is a value, not a section"),
        ("mine.min_commits", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("mine..x=3", "write it as section.key=value"),
        ("mine.window_from=0.9", "`mine.window_from` (0.9) must lie below `mine.window_to` (0.8)"),
        ("mine.min_lines=500", "`mine.min_lines` (500) must not exceed `mine.max_lines` (400)"),
    ],
)  # fmt: skip
def test_a_bad_override_says_what_and_what_instead(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override])
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("mine.min_commits=7", "mine.min_commits", 7),
        ("dedup.threshold=1", "dedup.threshold", 1.0),
        ("dedup.threshold = 0.5", "dedup.threshold", 0.5),
        ("mine.prefer_tests=false", "mine.prefer_tests", False),
        ("tokenizer.path=my.json", "tokenizer.path", "my.json"),
        ('tokenizer.path="3"', "tokenizer.path", "3"),
        ("mine.author_key=a=b", "mine.author_key", "a=b"),
        ("mine.author_key=", "mine.author_key", ""),
        ("name=other", "name", "other"),
        ("filter.max_mean_line=inf", "filter.max_mean_line", math.inf),
    ],
)
def test_forms_of_an_override(override: str, key: str, value: Any) -> None:
    found = {k: v for k, v, _ in flatten(load_recipe(None, [override]))}[key]
    assert found == value
    assert type(found) is type(value)


def test_a_later_override_wins_and_the_first_recipe_is_untouched() -> None:
    recipe = Recipe()
    changed = override_recipe(recipe, ["pack.length=256", "pack.length=512"])
    assert (recipe.pack.length, changed.pack.length) == (32768, 512)


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[mine\n")
    with pytest.raises(RecipeError, match=r"bad\.toml: not valid TOML: .*line 1"):
        load_recipe(bad)
    bad.write_text("[mine]\nmin_comits = 3\n")
    with pytest.raises(RecipeError, match=r"bad\.toml: unknown setting `mine\.min_comits`"):
        load_recipe(bad)
    bad.write_text("[model]\nnum_hidden_layers = 2\n")
    with pytest.raises(RecipeError, match=r"bad\.toml is a recipe for training: give it to"):
        load_recipe(bad)
    bad.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*bad\.toml"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match=r"cannot read recipe .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_a_file_gives_the_recipe_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine-only.toml"
    path.write_text("[pack]\nlength = 256\n")
    assert load_recipe(path).name == "mine-only"
    path.write_text('name = "given"\n')
    assert load_recipe(path).name == "given"


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.name)
def test_shipped_recipes_load_and_differ_from_the_default(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.hash != dataclasses.replace(Recipe(), name=recipe.name).hash


def test_there_are_shipped_recipes() -> None:
    assert PIPELINES


def test_the_default_recipe_passes_its_own_checks() -> None:
    assert load_recipe(None) == Recipe() == recipe_from_mapping(to_mapping(Recipe()), "default")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RECIPES = st.builds(
    lambda name, key, path, threshold, mean, tests, lines: dataclasses.replace(
        Recipe(),
        name=name,
        mine=dataclasses.replace(
            Recipe().mine, author_key=key, prefer_tests=tests, min_lines=lines
        ),
        dedup=dataclasses.replace(Recipe().dedup, threshold=threshold),
        filter=dataclasses.replace(Recipe().filter, max_mean_line=mean),
        tokenizer=dataclasses.replace(Recipe().tokenizer, path=path),
    ),
    TEXT, TEXT, st.none() | TEXT, st.floats(0, 1), st.floats(1, allow_nan=False), st.booleans(),
    st.integers(1, 400),
)  # fmt: skip


@given(RECIPES, st.booleans())
@example(dataclasses.replace(Recipe(), name="DEL \x7f, quotes \"'\\, é, \x00\n"), True)
def test_toml_round_trip(recipe: Recipe, comments: bool) -> None:
    text = to_toml(recipe, comments=comments)
    again = recipe_from_mapping(read_toml(text, "text"), "text")
    assert again == recipe
    assert again.hash == recipe.hash
    assert to_toml(again, comments=comments) == text


def other_value(value: Any, meta: dict[str, Any]) -> Any:
    """Some other legal value of a setting, as one would type it."""
    if meta["choices"]:
        return next(c for c in meta["choices"] if c != value)
    if isinstance(value, bool):
        return "false" if value else "true"
    if isinstance(value, float):
        return repr(value * 0.99)
    return repr(value + 1) if isinstance(value, int) else "something"


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: str(leaf[0]))
def test_the_hash_depends_on_every_setting_but_those_of_run(leaf: Any) -> None:
    key, value, meta = leaf
    changed = load_recipe(None, [f"{key}={other_value(value, meta)}"])
    assert (changed.hash == Recipe().hash) == key.startswith("run.")
    told = [name for name, _, _ in changed_settings(Recipe(), changed)]
    assert told == ([] if key.startswith("run.") else [key])


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: str(leaf[0]))
def test_every_setting_explains_itself(leaf: Any) -> None:
    key, value, meta = leaf
    assert len(meta["meaning"].split()) >= 3
    assert not meta["meaning"].endswith(".")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        explains = ("fraction", "similarity", "starts", "number", "distance", "share")
        assert meta["unit"] or any(word in meta["meaning"] for word in explains), key
        assert meta["minimum"] is not None, key


def test_comments_show_meaning_unit_and_source_of_every_setting() -> None:
    text = to_toml(Recipe(), comments=True)
    for key, _, meta in LEAVES:
        assert meta["meaning"][1:] in text
        assert not meta["unit"] or f"[{meta['unit']}]" in text
        assert meta["source"] in text
        assert f"\n{key.split('.')[-1]} =" in f"\n{text}".replace("\n# ", "\n")


def test_parts_by_section_and_by_key() -> None:
    recipe = Recipe()
    assert recipe.part(["pack.length", "name"]) == {"pack.length": 32768, "name": "default"}
    assert set(recipe.part(["dedup"])) == {k for k, _, _ in LEAVES if k.startswith("dedup.")}
    assert recipe.part(["pack.len"]) == {}
