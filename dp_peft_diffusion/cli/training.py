"""`dp-peft train`."""

import re
import signal
from pathlib import Path
from typing import Any

import click

from dp_peft_diffusion.cli.options import RecipeCommand, given_options, recipe_options
from dp_peft_diffusion.cli.program import command_line, hint
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Recipe, load_recipe, recipe_path

DEFAULT_RECIPE = "digits"
_named = click.option("--recipe", metavar="NAME", help="A recipe that comes with the package.")
_config = click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="A recipe file of your own.")


@click.command(cls=RecipeCommand)
@_named
@_config
@click.option(
    "--output_dir", type=click.Path(path_type=Path), help="Folder of the run.  [runs/RECIPE_OR_DATA-epsEPSILON]"
)
@click.option("--dry_run", "-n", is_flag=True, help="Print the plan and stop.")
@click.option("--new_attempt", is_flag=True, help="Begin an interrupted run anew; the steps it began are charged.")
@click.option(
    "--escrow_key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep the secret key here for a replay; whoever has it can take the noise off.",
)
@recipe_options(Recipe())
@click.pass_context
def train(ctx: click.Context, **params: Any) -> None:
    """Train an adapter privately, into a folder to share.

    Options stand over the recipe, the recipe over the values in brackets; `none` takes a value away. With neither
    a recipe, nor a base, nor a data set, the recipe is digits, which needs no download. The same command resumes a run
    that was interrupted.
    """
    flags = given_options(ctx)
    recipe, name = choose_recipe(params["recipe"], params["config"], flags)
    folder = params["output_dir"] or Path("runs") / run_name(recipe, name)

    from dp_peft_diffusion.runs.escrow import check_place
    from dp_peft_diffusion.training import FinishedRun, plan_text, prepare, run

    if params["escrow_key"] is not None:
        check_place(params["escrow_key"], folder)
    try:
        prepared = prepare(recipe, folder, params["new_attempt"])
    except FinishedRun as finished:
        click.echo(f"This run is finished: {finished.folder}. Nothing was trained and no privacy was spent.")
        next_commands(finished.folder, recipe)
        return
    click.echo(plan_text(prepared))
    if params["dry_run"]:
        click.echo("Nothing was trained. Remove --dry_run to start.")
        return
    hint("Reading the images. A base on latents encodes each of them once, which may take a while.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends as Ctrl-C does
    result = run(prepared, escrow_key=params["escrow_key"])
    if result.certificate is None:
        click.echo(f"Done, WITHOUT privacy and not to be shared: {result.folder}")
    else:
        click.echo(f"Done. Shareable: {result.folder}  Keep to yourself: {result.private_folder}")
    next_commands(result.folder, recipe)


def choose_recipe(name: str | None, config: Path | None, flags: dict[str, Any]) -> tuple[Recipe, str]:
    """The recipe a command line asks for, and the name its run goes by.

    Raises:
        UserError: both a name and a file, or anything that `load_recipe` refuses.
    """
    if name is not None and config is not None:
        raise UserError("--recipe and --config are both given. Keep one of them.")
    own_images, own_base = "data.dataset_name" in flags, "model.pretrained_model_name_or_path" in flags
    if name is None and config is None and not (own_images or own_base):
        name = DEFAULT_RECIPE
        hint(f"Recipe: {name}, as no other was named.")
    path = config if name is None else recipe_path(name)
    recipe = load_recipe(path, flags)
    if path is None or (name is None and own_images):
        return recipe, Path(recipe.data.dataset_name).stem
    return recipe, path.stem


def run_name(recipe: Recipe, name: str) -> str:
    """Name of the run's folder: what it learns from, and its promise."""
    privacy = recipe.privacy
    promise = f"eps{privacy.epsilon:g}" if privacy.epsilon is not None else f"noise{privacy.noise_multiplier}"
    plain = re.sub(r"[^\w.-]+", "-", name.removeprefix("builtin:")).strip("-.") or "images"
    return f"{plain}-not-private" if privacy.no_privacy else f"{plain}-{promise}"


def next_commands(folder: Path, recipe: Recipe) -> None:
    """What to try with a finished run. Without privacy there is no promise to verify, without classes no evaluation.

    recipe: as asked for, which says where base and images lie; the one in the folder says what the network is told.
    """
    name, images = recipe.model.pretrained_model_name_or_path, recipe.data.dataset_name
    base = ["--base", name] if Path(name).is_dir() else []
    prompt = [] if recipe.data.caption_column is None or recipe.sample.prompts else ["--prompt", "a photo of ..."]
    lines = [command_line("sample", "--adapter", folder, "--num_images", 64, *prompt, *base)]
    if not recipe.privacy.no_privacy:
        lines.append(command_line("verify", folder))
    if load_recipe(folder / "recipe.yaml").data.class_names is not None:
        held_out = [images] if images.startswith("builtin:") else ["PATH_TO_HELD_OUT_IMAGES", "--split", "train"]
        lines.append(command_line("evaluate", folder, "--dataset_name", *held_out, *base))
    hint("Try next:\n  " + "\n  ".join(lines))
