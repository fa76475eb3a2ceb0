"""Command-line options made from recipe fields, so that name, type, help and range are said once."""

import typing
from collections.abc import Callable
from dataclasses import Field
from types import UnionType
from typing import Any

import click
from click.core import ParameterSource

from dp_peft_diffusion.recipe import Recipe
from dp_peft_diffusion.typed_fields import flag, options

_METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}
OWN_OPTIONS = ("recipe", "config", "output_dir", "dry_run", "new_attempt", "escrow_key")  # of commands, not of a recipe
format_option = click.option(
    "--format", "style", type=click.Choice(["human", "json"]), default="human", help="For people, or for programs."
)


class FieldValue(click.ParamType):
    """The text of an option as its field's type: `none` for nothing, a comma or so between the entries of a list."""

    name = "value"

    def __init__(self, hint: Any, separator: str = ","):
        self.separator = separator
        self.optional = isinstance(hint, UnionType)
        inner = typing.get_args(hint)[0] if self.optional else hint
        self.is_list = typing.get_origin(inner) is tuple
        self.element = typing.get_args(inner)[0] if self.is_list else inner

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse, or fail as click does."""
        if self.optional and value.lower() == "none":
            return None
        if self.is_list:
            return tuple(self._scalar(part.strip(), param, ctx) for part in value.split(self.separator))
        return self._scalar(value, param, ctx)

    def _scalar(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.element(text)
        except ValueError:
            self.fail(f"{text!r} is not {'a whole number' if self.element is int else 'a number'}.", param, ctx)


class RecipeCommand(click.Command):
    """A command whose help lists the recipe's options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One titled list per section of the recipe, the command's own options first."""
        titles = {name: f"{name}: {part.__doc__}" for name, part in vars(Recipe()).items()}
        lists: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                section = str(param.name).partition("__")[0]
                lists.setdefault(titles.get(section, "Options"), []).append(record)
        for title in ("Options", *titles.values()):
            if title in lists:
                with formatter.section(title.rstrip(".")):
                    formatter.write_dl(lists[title])


def recipe_options(recipe: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command one option per field of `recipe`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for section, spec, default in reversed(list(options(recipe))):
            function = _field_option(section, spec, default)(function)
        return function

    return decorate


def given_options(ctx: click.Context) -> dict[str, Any]:
    """What the user typed, by recipe key: {"privacy.epsilon": 1.0}. A field that was not typed is absent."""
    named = {name: value for name, value in ctx.params.items() if name not in OWN_OPTIONS}
    return {
        name.replace("__", ".", 1): value
        for name, value in named.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _field_option(section: str, spec: "Field[Any]", default: Any) -> Callable[..., Any]:
    key = f"{section}__{spec.name}" if section else spec.name
    name, meta = flag(section, spec), spec.metadata
    text = meta["help"][0].upper() + meta["help"][1:]
    if spec.type is bool:
        # no_privacy is left by giving --epsilon.
        spelling = name if spec.name.startswith("no_") else f"{name}/--no_{name[2:]}"
        return click.option(spelling, key, is_flag=True, default=None, help=f"{text}.")
    separator = meta.get("separator", ",")
    kind = FieldValue(spec.type, separator)
    metavar = f"[{'|'.join(meta['choices'])}]" if "choices" in meta else _METAVARS[kind.element]
    if kind.is_list:
        metavar = separator.join(("A", "B", "..."))
        default = separator.join(map(str, default)) if default else None
    shown = f"{text}." if default in (None, "") else f"{text}.  [{default}]"
    aliases = [f"--{alias}" for alias in meta.get("aliases", ())]
    return click.option(name, *aliases, key, type=kind, default=None, metavar=metavar, help=shown)
