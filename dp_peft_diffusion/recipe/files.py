"""Recipes as YAML files, and flags that stand over them."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe.checks import validate
from dp_peft_diffusion.recipe.pretraining import PretrainRecipe
from dp_peft_diffusion.recipe.sections import PROMISES, Recipe
from dp_peft_diffusion.strict_yaml import read_table, write_line
from dp_peft_diffusion.typed_fields import build, nearest, options


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe that comes with the package.

    Raises:
        UserError: there is none of that name.
    """
    here = Path(__file__).resolve().parents[1]
    # In a wheel recipes/ lies in the package, in a checkout beside it.
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"--recipe {name!r} does not exist. {nearest(name, known)}There is: {', '.join(known)}. "
            "A file of your own goes with --config FILE."
        )
    return folder / f"{name}.yaml"


def load_recipe(path: Path | str | None = None, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read and check a recipe: overrides such as {"privacy.epsilon": 1.0} over the file over the defaults.

    Any of epsilon, noise_multiplier and no_privacy among the overrides takes the place of the file's. What the file
    declares public is its own data set, not one that an override names; its target_modules go with its own kind.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a value that `validate` refuses.
    """
    recipe = Recipe() if path is None else build(Recipe, read_table(Path(path)), str(path))
    tables = {spec.name: dict(vars(getattr(recipe, spec.name))) for spec in fields(Recipe)}
    overrides = overrides or {}
    if any(f"privacy.{name}" in overrides for name in PROMISES):
        tables["privacy"] |= {"epsilon": None, "noise_multiplier": None, "no_privacy": False}
    if overrides.get("adapter.kind", recipe.adapter.kind) != recipe.adapter.kind:
        tables["adapter"]["target_modules"] = None
    if "data.dataset_name" in overrides:
        tables["data"]["declared_public"] = False
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return validate(build(Recipe, tables, "options"))


def load_pretrain_recipe(
    path: Path | str | None = None, overrides: Mapping[str, object] | None = None
) -> PretrainRecipe:
    """The same for pretraining, whose table is flat: overrides such as {"dataset_name": "omniglot"}."""
    table = {} if path is None else read_table(Path(path))
    return validate(build(PretrainRecipe, {**table, **(overrides or {})}, str(path or "options")))


def to_yaml(recipe: Recipe | PretrainRecipe) -> str:
    """A complete recipe with comments, which loads back equal and can be run."""
    command = "train" if isinstance(recipe, Recipe) else "pretrain"
    lines, last = [f"# dp-peft {command} --config recipe.yaml"], ""
    for section, spec, value in options(recipe):
        if section != last:
            lines.append(f"{section}:  # {getattr(recipe, section).__doc__}")
            last = section
        lines.append(f"{'  ' if section else ''}{write_line(spec.name, value)}  # {spec.metadata['help']}")
    return "\n".join(lines) + "\n"
