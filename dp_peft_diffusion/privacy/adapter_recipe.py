"""The recipe in a stranger's folder: what of it is believed when its adapter is opened. No torch."""

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.recipe import Recipe, load_recipe

MAX_STEPS = 10_000  # denoising steps that a stranger's recipe may ask for; the user may ask for any number
MAX_ROWS = 1_000_000  # of the class table that its classes may take
# An owner and a name, or a name alone: nothing that leads up, to a home or to the root of the file system.
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.\-]{0,95})?")
_BUILT_IN = re.compile(r"builtin:[a-z0-9_]{1,60}")
_COMMIT = re.compile("[0-9a-f]{40}")  # the name of a branch is looked up as that of a file


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a shareable folder.

    Raises:
        UserError: there is none, it cannot be read, or it asks for more denoising steps than `MAX_STEPS`.
        PrivacyError: its class rows are not one for each class.
    """
    path = folder / "recipe.yaml"
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise PrivacyError(f"{path} is not a regular file.")
    recipe = load_recipe(path)
    names, rows = recipe.data.class_names or (), recipe.adapter.class_rows
    if rows is not None and len(rows) != len(names):
        raise PrivacyError(f"{path} names {len(names)} classes and {len(rows)} rows of the class table.")
    if len(rows or ()) * (recipe.adapter.rows_per_class or 1) > MAX_ROWS:
        raise PrivacyError(f"{path} asks for more than {MAX_ROWS} rows of the class table.")
    if recipe.sample.num_inference_steps > MAX_STEPS:
        raise UserError(
            f"{path} asks for {recipe.sample.num_inference_steps} denoising steps. Change sample.num_inference_steps "
            f"there to at most {MAX_STEPS}."
        )
    return recipe


def stated_base(folder: Path, recipe: Recipe) -> tuple[str, str | None]:
    """The base that a shareable folder's recipe names, and its revision: built in, or on the Hub.

    A folder is never opened because a stranger named it. The user names folders, by --base.

    Raises:
        UserError: it names a place on its author's machine, one that is a folder here, or a revision that is no commit.
    """
    name = recipe.model.pretrained_model_name_or_path
    if _BUILT_IN.fullmatch(name):
        return name, None
    if not _ON_THE_HUB.fullmatch(name):
        last = re.sub(r"[^A-Za-z0-9_.\-]", "_", Path(name).name)[:100]
        raise UserError(f"{folder} was trained on a base in a local folder. Say where it lies: --base PATH/{last}")
    if Path(name).exists():
        raise UserError(
            f"{folder} was trained on {name} of the Hub, and here lies a folder of that name. To take the folder, type "
            f"--base ./{name}; to take the Hub's, type the command in another place."
        )
    revision = recipe.model.revision
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise UserError(
            f"{folder} was trained on {name} of the Hub, and its recipe.yaml says no commit of it: model.revision "
            f"has to be 40 digits. To take what is there today, type --base {name}"
        )
    return name, revision


def check_rows(folders: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    """No two adapters give the same row of the class table to classes of different names, or to codes drawn of one.

    Raises:
        UserError: two do; their sum would be neither.
    """
    taken: dict[int, tuple[Path, str, bool]] = {}
    for folder, recipe in zip(folders, recipes, strict=True):
        drawn = recipe.adapter.rows_per_class is not None
        for row, name in zip(recipe.adapter.rows_in_turn, cycle(recipe.data.class_names or ()), strict=False):
            other, before, other_drawn = taken.setdefault(row, (folder, name, drawn))
            if other is not folder and (drawn or other_drawn):
                raise UserError(
                    f"{other} and {folder} both moved row {row} of the class table, and one of them is code_moments, "
                    "whose rows are codes of images: their sum would be no code. Take them one at a time."
                )
            if before != name:
                raise UserError(
                    f"{other} and {folder} both moved row {row} of the class table, for {before!r} and for {name!r}: "
                    "their sum would be neither. Take them one at a time, or train one of them again with other "
                    "--class_rows."
                )
