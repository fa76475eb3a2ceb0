"""Planted bugs: one-line changes of the real code, made in the process and taken back."""

import functools
import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

PACKAGE = "dp_peft_diffusion"
Check = Callable[[int], None]  # takes a seed; raises AssertionError with a sentence, or passes


class PatchError(Exception):
    """A bug no longer fits the code that it is planted in."""


@dataclass(frozen=True)
class Edit:
    """In the function `target` ("room.module:function" or "room.module:Class.method"), `old` becomes `new`."""

    target: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A bug that somebody could make, the check that must see it, and what it stands for.

    row: of the list of failures in docs/explanation/trust.md, 1 to 28.
    """

    name: str
    row: int
    check: Check
    edits: tuple[Edit, ...]


def mutant(name: str, row: int, check: Check, target: str, old: str, new: str, *more: str) -> Mutant:
    """A mutant of one edit, or of several: `more` goes on with target, old, new."""
    texts = (target, old, new, *more)
    return Mutant(name, row, check, tuple(Edit(*texts[i : i + 3]) for i in range(0, len(texts), 3)))


@contextmanager
def planted(bug: Mutant) -> Iterator[None]:
    """The real code with the bug in it, wherever the function is used; without it after the block.

    Raises:
        PatchError: the bug no longer fits the code.
    """
    with ExitStack() as stack:
        for target in dict.fromkeys(edit.target for edit in bug.edits):
            stack.enter_context(_edited(target, [edit for edit in bug.edits if edit.target == target]))
        _forget_results()
        stack.callback(_forget_results)
        yield


@contextmanager
def _edited(target: str, edits: list[Edit]) -> Iterator[None]:
    function = function_of(target)
    original = function.__code__
    function.__code__ = _changed_code(function, edits)  # in place: for every name that is bound to it, tables too
    try:
        yield
    finally:
        function.__code__ = original


def function_of(target: str) -> types.FunctionType:
    """The plain function behind a dotted name, whatever decorates it."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    for name in path.split("."):
        found = vars(found)[name]
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    found = inspect.unwrap(found)
    return found


def _changed_code(function: types.FunctionType, edits: list[Edit]) -> types.CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise PatchError(
                f"{edit.target} holds {edit.old!r} {source.count(edit.old)} times, not once. "
                "Plant the same bug in the code as it is now."
            )
        source = source.replace(edit.old, edit.new)
    module = compile(source, f"<planted in {function.__qualname__}>", "exec", dont_inherit=True)
    (code,) = (one for one in module.co_consts if isinstance(one, types.CodeType) and one.co_name == function.__name__)
    return code


def _forget_results() -> None:
    """Empty every cache of the package: what the right code computed must not answer for the wrong, nor vice versa."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE:
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
