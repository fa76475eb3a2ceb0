"""Options of the commands that open adapters, and how these reach them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe, stated_base


def adapter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--adapter, --adapter_weight and --base."""
    several = "Shareable folder, or owner/name on the Hub. Several are added up."
    options = (
        click.option("--adapter", "adapters", metavar="FOLDER_OR_HUB_ID", required=True, multiple=True, help=several),
        click.option(
            "--adapter_weight", "weights", type=float, multiple=True, help="Share of its change, one per adapter.  [1]"
        ),
        click.option("--base", help="The base, if it is another, or lies elsewhere, than the recipe says."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """The weight of each adapter.

    Raises:
        UserError: not one for each, or not a number.
    """
    if weights and len(weights) != len(adapters):
        raise UserError(
            f"there are {len(adapters)} --adapter and {len(weights)} --adapter_weight. Give one weight for each "
            "adapter, in the same order, or none."
        )
    if not all(map(math.isfinite, weights)):
        raise UserError("--adapter_weight takes numbers, such as 0.7.")
    return tuple(weights) or (1.0,) * len(adapters)


def local_folders(adapters: Sequence[str]) -> list[Path]:
    """Where the adapters lie; those on the Hub are fetched.

    Raises:
        UserError: there is none of such a name.
    """
    from dp_peft_diffusion.sharing.hub import local_folder

    return [local_folder(name) for name in adapters]


def announce_base(folders: Sequence[Path], base: str | None) -> None:
    """Say which base of the Hub a recipe names, before anything is fetched. What is wrong with it is said later."""
    if base is not None:
        return
    with contextlib.suppress(UserError, PrivacyError):
        name, revision = stated_base(folders[0], read_recipe(folders[0]))
        if not name.startswith("builtin:"):
            commit = "its newest commit" if revision is None else f"commit {revision}"
            hint(f"{folders[0]} names the base {name} of the Hub, {commit}. It is fetched if it is not here yet.")


def beside(adapter: str, ending: str) -> Path:
    """A new place beside an adapter's folder; in the current folder where it is on the Hub."""
    place = Path(adapter).absolute()
    return place.with_name(f"{place.name}-{ending}") if place.is_dir() else Path(f"{place.name}-{ending}")


@contextlib.contextmanager
def warnings_as_hints() -> Iterator[None]:
    """Warnings as one line each on stderr, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module="dp_peft_diffusion")
        warnings.showwarning = lambda message, *_, **__: hint(f"warning: {message}")
        yield
