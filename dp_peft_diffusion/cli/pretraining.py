"""`dp-peft pretrain`."""

from pathlib import Path
from typing import Any

import click

from dp_peft_diffusion.cli.options import RecipeCommand, given_options, recipe_options
from dp_peft_diffusion.cli.program import command_line, hint
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, PretrainRecipe, load_pretrain_recipe, recipe_path


@click.command(cls=RecipeCommand)
@click.option("--recipe", metavar="NAME", help="A recipe that comes with the package.")
@click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="A recipe file of your own.")
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path),
    help="Folder of the run.  [runs/RECIPE-base; runs/RECIPE for an autoencoder or features]",
)
@recipe_options(PretrainRecipe(dataset_name=""))
@click.pass_context
def pretrain(ctx: click.Context, **params: Any) -> None:
    """Pretrain a base, its autoencoder or features, on PUBLIC images. This is NOT private.

    Nothing protects these images: whoever gets the base may find them in it. Private images belong to `dp-peft train`.
    To go on after a stop, type the same command again. Options stand over the recipe, the recipe over the values in
    brackets.
    """
    name, config, flags = params["recipe"], params["config"], given_options(ctx)
    if name is not None and config is not None or not (name or config or "kind" in flags):
        raise UserError("give one of --recipe, --config and --kind. Type for example --recipe handwriting.")
    path = config if name is None else recipe_path(name)
    recipe = load_pretrain_recipe(path, flags)
    folder = params["output_dir"] or Path("runs") / run_name(recipe, path)
    click.echo(f"Pretraining on {recipe.dataset_name}, as public images: this is NOT private and gives no promise.")

    from dp_peft_diffusion.pretraining import pretrain as run

    made = run(recipe, folder)
    if recipe.kind == "autoencoder":
        click.echo(f"Done. Autoencoder, NOT private: {made}")
        hint(f"Train a base on its latents:\n  {latent_command(recipe, name, made)}")
    elif recipe.kind == "features":
        click.echo(f"Done. Features, NOT private: {made}")
        follow = command_line("evaluate", "FOLDER_OR_IMAGES", "--dataset_name", PATH_TO_IMAGES, "--features", made)
        hint(f"Compare synthetic with real images in them:\n  {follow}")
    else:
        click.echo(f"Done. Base, NOT private: {made}")
        words = ("--pretrained_model_name_or_path", made, "--dataset_name", PATH_TO_IMAGES, "--epsilon", 1)
        hint(f"Train privately on it:\n  {command_line('train', *words)}")


def run_name(recipe: PretrainRecipe, path: Path | None) -> str:
    """Name of the run's folder: that of its recipe, or else what it learns from."""
    stem = Path(recipe.dataset_name).stem if path is None else path.stem
    suffix = {"autoencoder": "-vae", "features": "-features"}.get(recipe.kind, "-base")
    return stem if suffix != "-base" and stem.endswith(suffix) else stem + suffix


def latent_command(recipe: PretrainRecipe, name: str | None, autoencoder: Path) -> str:
    """What trains a base on an autoencoder's latents. Recipe X-vae makes the autoencoder of recipe X."""
    kind = ["--kind", "latent", "--resolution", recipe.resolution, "--image_channels", recipe.image_channels]
    words = kind if name is None else ["--recipe", name.removesuffix("-vae")]
    return command_line("pretrain", *words, "--vae", autoencoder, "--dataset_name", recipe.dataset_name)
