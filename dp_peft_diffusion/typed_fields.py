"""Dataclass fields that know their help, type and range, and tables turned into such dataclasses."""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar

from dp_peft_diffusion.errors import UserError

_TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
T = TypeVar("T")


def option(default: Any = MISSING, **metadata: Any) -> Any:
    """A field with its metadata.

    Keys: help; flag, if another name than the field's; aliases of the flag; choices; above, at_least, below (a range);
    separator of a list's entries on the command line, if not a comma; longest, of a text.
    """
    return field(default=default, metadata=metadata)


def options(recipe: object) -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Every (section, field, value); a pretraining recipe has the section ""."""
    for spec in fields(recipe):  # type: ignore[arg-type]
        value = getattr(recipe, spec.name)
        if is_dataclass(value):
            yield from ((spec.name, inner, getattr(value, inner.name)) for inner in fields(value))
        else:
            yield "", spec, value


def flag(section: str, spec: "Field[Any]") -> str:
    """The command-line spelling of a field: --adapter, --rank, --sample_seed."""
    name = spec.metadata.get("flag", spec.name)
    return f"--sample_{name}" if section == "sample" else f"--{name}"


def build(cls: type[T], table: object, file: str, section: str = "") -> T:
    """A dataclass from a table, every key and type checked."""
    if not isinstance(table, Mapping):
        raise UserError(f"{file}: {section} is {table!r}; below it go lines such as `key: value`.")
    hints: dict[str, Any] = {spec.name: spec.type for spec in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        at = f"{section}.{key}" if section else str(key)
        if key not in hints:
            raise UserError(f"{file}: unknown key {at!r}. {_right_key(str(key), cls)}Valid keys: {', '.join(hints)}.")
        if is_dataclass(hints[key]):
            values[key] = build(hints[key], {} if value is None else value, file, at)
        else:
            values[key] = _convert(value, hints[key], f"{file}: {at}")
    for spec in fields(cls):  # type: ignore[arg-type]
        if spec.default is MISSING and spec.name not in values:
            raise UserError(f"--{spec.name} is not given ({spec.metadata['help']}). Add --{spec.name} VALUE.")
    return cls(**values)


def check_range(section: str, spec: "Field[Any]", value: Any) -> None:
    """One value, and every item of a list, against the field's choices or range.

    Raises:
        UserError: naming the option, its recipe key, what is allowed, and what to type.
    """
    at = f"{flag(section, spec)} ({section + '.' if section else ''}{spec.name} in a recipe)"
    if value in ("", ()):
        raise UserError(f"{at} is empty. Give a value, or leave the option out.")
    for item in value if isinstance(value, tuple) else (value,):
        _check_value(item, spec, at)


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion for a mistyped word, ending in a space, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _check_value(value: Any, spec: "Field[Any]", at: str) -> None:
    """One value, or one item of a list, against the field's choices or range."""
    meta = spec.metadata
    if value == "":
        raise UserError(f"{at} has an empty entry. Take it out.")
    if "choices" in meta and value is not None and value not in meta["choices"]:
        raise UserError(
            f"{at}: unknown {value!r}. {nearest(value, meta['choices'])}It is {' or '.join(meta['choices'])}."
        )
    if isinstance(value, str) and len(value) > meta.get("longest", len(value)):
        raise UserError(
            f"{at} has {len(value)} characters; at most {meta['longest']} are recorded. Type a shorter text."
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    above, at_least, below = (meta.get(key) for key in ("above", "at_least", "below"))
    too_low = (above is not None and value <= above) or (at_least is not None and value < at_least)
    if not math.isfinite(value) or too_low or (below is not None and value >= below):
        bounds = {"above": above, "at least": at_least, "below": below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        raise UserError(f"{at} is {value}; it must be a finite number {words}. Type for example {_example(spec, at)}.")


def _example(spec: "Field[Any]", at: str) -> str:
    """What to type: the default, or the first round number in the range."""
    default = spec.default
    if default is None or default is MISSING or isinstance(default, tuple):
        default = spec.metadata.get("at_least", spec.metadata.get("above", 0)) or 1
    return f"{at.split()[0]} {default}"


def _right_key(word: str, cls: type) -> str:
    """A suggestion for a mistyped key: also for the name of a flag, and for a key outside its section."""
    known: dict[str, str] = {}
    for spec in fields(cls):
        if is_dataclass(spec.default):
            known |= {inner.name: f"{spec.name}.{inner.name}" for inner in fields(spec.default)}
        known |= {alias: spec.name for alias in spec.metadata.get("aliases", ())}
    known |= {spec.name: spec.name for spec in fields(cls)}
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {known[close[0]]!r}? " if close else ""


def _convert(value: Any, hint: Any, at: str) -> Any:
    """`value` as the type of its field; only a whole number may become a number, only a list a tuple."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_convert(item, element, f"{at}, entry {index + 1}") for index, item in enumerate(value))
        raise UserError(f"{at} is {value!r}; it must be a list, such as [{'a, b' if element is str else '1, 2'}].")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        quote = f" Write it in quotes: '{value}'." if hint is str else ""
        raise UserError(f"{at} is {value!r}; it must be {_TYPE_WORDS[hint]}.{quote}")
    return value
