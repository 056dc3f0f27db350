"""Typed settings: frozen dataclasses read from mappings, with errors that name the nearest key.

A setting is a dataclass field made by `setting(default, meaning, unit=…, source=…)`. Sections are
dataclasses inside dataclasses, lists of tables (`[[stage]]`) tuples of dataclasses. Supported field
types: bool, int, float, str, `T | None`, `tuple[T, ...]` and nested dataclasses. Standard library
only, because the trainer uses it on machines that have nothing else.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from codeflow.errors import RecipeError, did_you_mean

T = TypeVar("T")


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    source: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare one setting.

    Args:
        default: Value when nothing else is said.
        meaning: One sentence a user can act on.
        unit: Unit of the number (lines, tokens, MiB, seconds, …).
        source: Where the default comes from (a paper, a measurement, a peer's rule).
        choices: The only strings allowed, when not empty.
        minimum: Smallest number allowed.
        maximum: Largest number allowed.
    """
    metadata = {
        "meaning": meaning,
        "unit": unit,
        "source": source,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
    }
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[T]) -> T:
    """Declare a nested section whose own defaults apply."""
    return dataclasses.field(default_factory=cls)


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML; a syntax error becomes a `RecipeError` that names the file."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise RecipeError(f"{where}: not valid TOML: {e}") from e


def with_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with `section.key=value` strings applied.

    A value is read as a TOML value (`0.8`, `true`, `["a"]`); anything that is not one is taken as
    the string it is, so `--set tokenizer.path=my.json` needs no quotes.
    """
    result: dict[str, Any] = _deep_copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {override}: write it as section.key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        target = result
        for key in keys[:-1]:
            child = target.setdefault(key, {})
            if not isinstance(child, dict):
                raise RecipeError(f"--set {override}: `{key}` is a value, not a section")
            target = child
        target[keys[-1]] = value
    return result


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Make a settings dataclass from a mapping.

    Args:
        cls: The dataclass.
        mapping: Keys and values, nested as the dataclass is.
        where: Where the mapping came from, for messages (a file name, `--set`).

    Raises:
        RecipeError: An unknown key, a value of the wrong type, or one out of bounds.
    """
    return _build(cls, mapping, where, "")


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield `(dotted key, value, metadata)` for every leaf setting, in declaration order."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        name = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from flatten(value, name + ".")
        else:
            yield name, value, f.metadata


def to_mapping(settings: Any) -> dict[str, Any]:
    """The JSON- and TOML-ready form: tuples become lists, unset (`None`) keys are left out."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            result[f.name] = to_mapping(value)
        elif isinstance(value, tuple):
            result[f.name] = [to_mapping(v) if dataclasses.is_dataclass(v) else v for v in value]
        elif value is not None:
            result[f.name] = value
    return result


def _deep_copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in mapping.items()}


def _build(cls: type[T], mapping: Mapping[str, Any], where: str, prefix: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            kind = "section" if isinstance(value, Mapping) else "setting"
            hint = _nearest(cls, prefix, key, value)
            raise RecipeError(f"{where}: unknown {kind} `{prefix}{key}`. {hint}")
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: `{name}` is a section; set its keys, e.g. `{name}.…`")
            values[key] = _build(typing.cast(Any, hints[key]), value, where, name + ".")
        elif (table := _table_of(hints[key])) is not None:
            if not isinstance(value, (list, tuple)) or not all(
                isinstance(v, Mapping) for v in value
            ):
                raise RecipeError(f"{where}: `{name}` is a list of tables; write [[{name}]]")
            values[key] = tuple(
                _build(table, v, where, f"{name}[{i}].") for i, v in enumerate(value)
            )
        else:
            values[key] = _checked(value, hints[key], fields[key].metadata, where, name)
    return cls(**values)


def _nearest(cls: Any, prefix: str, key: str, value: Any) -> str:
    """What may have been meant by an unknown key: also a setting whose section was left out."""
    fields = dataclasses.fields(cls)
    if not prefix and not isinstance(value, Mapping):
        hints = typing.get_type_hints(cls)
        sections = {
            f.name: hints[f.name] for f in fields if dataclasses.is_dataclass(hints[f.name])
        }
        inside = [s for s, c in sections.items() if key in {f.name for f in dataclasses.fields(c)}]
        if inside:
            return "Did you mean " + " or ".join(f"`{section}.{key}`" for section in inside) + "?"
    return did_you_mean(f"{prefix}{key}", [f"{prefix}{f.name}" for f in fields])


def _table_of(hint: Any) -> Any:
    """The dataclass of a tuple of dataclasses; None for any other type."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) else None


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any], where: str, name: str) -> Any:
    converted = _converted(value, hint)
    if converted is _MISMATCH:
        raise RecipeError(f"{where}: `{name}` must be {_type_name(hint)}, not {value!r}")
    choices = metadata.get("choices") or ()
    for item in converted if isinstance(converted, tuple) else (converted,):
        if choices and item is not None and item not in choices:
            raise RecipeError(
                f"{where}: `{name}` cannot be {item!r}. {did_you_mean(str(item), choices)}"
            )
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        unit = f" {metadata['unit']}" if metadata.get("unit") else ""
        if low is not None and not converted >= low:  # so that nan is refused, too
            raise RecipeError(f"{where}: `{name}` must be at least {low}{unit}, not {converted}")
        if high is not None and not converted <= high:
            raise RecipeError(f"{where}: `{name}` must be at most {high}{unit}, not {converted}")
    return converted


_MISMATCH = object()


def _converted(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            converted = (
                None if option is type(None) and value is None else _converted(value, option)
            )
            if converted is not _MISMATCH and (converted is not None or value is None):
                return converted
        return _MISMATCH
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _MISMATCH
        items = tuple(_converted(v, typing.get_args(hint)[0]) for v in value)
        return _MISMATCH if any(i is _MISMATCH for i in items) else items
    if hint is type(None):
        return _MISMATCH
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        return _MISMATCH
    return value if isinstance(value, hint) else _MISMATCH


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(h) for h in typing.get_args(hint) if h is not type(None)]
        return " or ".join(names)
    if origin is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
