"""Strict forms of JSON documents: exactly the known keys, with values of known types and ranges."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dp_peft_diffusion.errors import PrivacyError

Rule = Callable[[Any], bool]


def number(low: float, high: float) -> Rule:
    """A number from low to high; neither True nor NaN is one."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def whole(low: int, high: int) -> Rule:
    """A whole number from low to high, which 2.0 is not."""
    return lambda value: type(value) is int and low <= value <= high


def one_of(*allowed: object) -> Rule:
    """One of these values, of the same type: 1 is not True."""
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def text(pattern: str) -> Rule:
    """Text that the pattern matches as a whole. Patterns are ours, and match in linear time."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def or_none(rule: Rule) -> Rule:
    """None, or what the rule allows."""
    return lambda value: value is None or rule(value)


def list_of(rule: Rule, longest: int) -> Rule:
    """A list of at most so many entries, each of which the rule allows."""
    return lambda value: isinstance(value, list) and len(value) <= longest and all(map(rule, value))


def table_of(key: Rule, rule: Rule, largest: int) -> Rule:
    """An object of at most so many entries, whose keys and values the rules allow."""
    return lambda value: (
        isinstance(value, dict) and len(value) <= largest and all(map(key, value)) and all(map(rule, value.values()))
    )


def check_keys(
    document: Any, form: Mapping[str, Rule], required: set[str], name: str, wanted: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The document, if it is an object with all required keys, no unknown one, and an allowed value at each.

    Args:
        document: parsed JSON.
        form: key -> rule.
        required: keys that may not be absent.
        name: of the document, for messages.
        wanted: key -> what the rule allows, in words, for messages.

    Raises:
        PrivacyError: anything differs; the message names it.
    """
    if not isinstance(document, dict):
        raise PrivacyError(f"{name} is not a JSON object.")
    if missing := sorted(required - set(document)):
        raise PrivacyError(f"{name} lacks {', '.join(missing)}.")
    for key, value in document.items():
        if key not in form:
            raise PrivacyError(f"{name} says {key[:60]!r}, a key that this tool never writes.")
        if not form[key](value):
            allowed = (wanted or {}).get(key, "a value that this tool writes")
            raise PrivacyError(f"{name}: {key} is {shown(value)}, and not {allowed}.")
    return document


def shown(value: Any) -> str:
    """A stranger's value, short enough to print; huge numbers are not written out."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {math.ceil(value.bit_length() / 3.3)} digits"
    return ascii(value)[:80]
