"""`dp-peft sample` and `dp-peft evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_peft_diffusion.cli.adapters import (
    adapter_options,
    announce_base,
    beside,
    check_weights,
    local_folders,
    warnings_as_hints,
)
from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.cli.program import printable
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe
from dp_peft_diffusion.recipe import MAX_SEED, Data

if TYPE_CHECKING:
    import numpy as np

MAX_IMAGES = 1_000_003  # numbers of images that one seed has: `samplers.SEEDS_APART`
_REAL_IMAGES = ("dataset_name", "dataset_config_name", "split", "image_column", "label_column", "center_crop")


@click.command()
@adapter_options
@click.option("--unmerged", is_flag=True, help="Keep the adapters as layers beside the base's weights.")
@click.option("--num_images", default=64, show_default=True, type=click.IntRange(1, MAX_IMAGES), help="How many.")
@click.option(
    "--first_image", default=0, show_default=True, type=click.IntRange(0, MAX_IMAGES - 1), help="Number of the first."
)
@click.option("--class_labels", metavar="A,B,...", help="Names or positions of classes, in turn.  [all, evenly]")
@click.option("--prompt", "prompts", multiple=True, help="Of a text-conditional base; several are taken in turn.")
@click.option("--prompts_file", type=click.Path(path_type=Path), help="File of prompts, one on each line.")
@click.option("--scheduler", help="fidelity, utility, ddim, ddpm, dpmsolver++, or a diffusers class.  [the recipe's]")
@click.option("--num_inference_steps", type=click.IntRange(min=1), help="Denoising steps.  [the recipe's]")
@click.option("--guidance_scale", type=click.FloatRange(min=0), help="1: none.  [the recipe's]")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, MAX_SEED - 1), help="Same seed, same images."
)
@click.option("--batch_size", type=click.IntRange(min=1), help="Images at once: memory only.  [by size of the base]")
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]), help="Of the network."
)
@click.option("--output_dir", type=click.Path(path_type=Path), help="Where the images go.  [FOLDER-samples]")
@click.option("--parquet", is_flag=True, help="Write parquet files in place of one PNG for each image.")
def sample(adapters: tuple[str, ...], weights: tuple[float, ...], output_dir: Path | None, **settings: Any) -> None:
    """Generate images with an adapter, or with several together.

    The adapter is merged into its base. This costs no privacy, however many images you take. The same command goes on
    after a stop. Image number i is the same whatever else is made: --first_image i --num_images 1 makes it alone.
    """
    folder = output_dir or beside(adapters[0], "samples")
    numbers = {name: settings.pop(name) for name in ("num_images", "first_image", "parquet")}
    if numbers["first_image"] + numbers["num_images"] > MAX_IMAGES:
        raise UserError(f"a seed has images 0 to {MAX_IMAGES - 1}. For more, take another --seed.")
    settings["weights"] = check_weights(adapters, weights)
    labels, file = settings.pop("class_labels"), settings.pop("prompts_file")
    places = local_folders(adapters)
    settings["class_labels"] = None if labels is None else class_names(places, labels)
    if file is not None:
        settings["prompts"] += read_prompts(file)

    import torch

    from dp_peft_diffusion.diffusion.generation import open_source
    from dp_peft_diffusion.diffusion.image_files import check_folder, write_images

    check_folder(folder)
    announce_base(places, settings["base"])
    settings["dtype"] = getattr(torch, settings["dtype"])
    with warnings_as_hints():
        source = open_source(places, device=fastest_device(), **settings)
    write_images(folder, source, **numbers)
    click.echo(f"{numbers['num_images']} images: {folder / 'images'}  grid: {folder / 'grid.png'}")


def fastest_device() -> str:
    """The GPU, if torch can use one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a text file, without blank ones.

    Raises:
        UserError: it cannot be read as UTF-8 text, or holds none.
    """
    try:
        lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts_file {file}: {error}. Give a text file with one prompt on each line.") from error
    if not lines:
        raise UserError(f"--prompts_file {file} holds no prompt. Write one on each line.")
    return lines


def class_names(folders: Sequence[Path], text: str) -> list[str]:
    """Class names from names or positions: a word that is a name is that name, even "3".

    Raises:
        UserError: neither a class of the adapters nor a position among them, or no classes at all.
    """
    known = adapter_classes(folders, "Leave out --class_labels.")
    names = []
    for word in (part.strip() for part in text.split(",")):
        if word not in known and not (word.isdecimal() and int(word) < len(known)):
            there = ", ".join(map(printable, known))
            raise UserError(f"--class_labels: {word!r} is no class of this adapter. There is: {there}.")
        names.append(word if word in known else known[int(word)])
    return names


def adapter_classes(folders: Sequence[Path], otherwise: str) -> tuple[str, ...]:
    """The classes that adapters were trained on, in the order of the adapters.

    Raises:
        UserError: there are none, and `otherwise` says what follows; or a folder is not one of a run.
    """
    listed = [read_recipe(folder).data.class_names or () for folder in folders]
    known = tuple(dict.fromkeys(name for names in listed for name in names))
    if not known:
        raise UserError(f"{' and '.join(map(str, folders))} has no classes. {otherwise}")
    return known


@click.command()
@click.argument("synthetic", metavar="FOLDER_OR_IMAGES", type=click.Path(path_type=Path))
@click.option("--dataset_name", required=True, help="Real images to test on.")
@click.option("--dataset_config_name", help="Configuration of a Hub data set.")
@click.option("--split", default="test", show_default=True, help="Split of the real images that was not trained on.")
@click.option("--image_column", default="image", show_default=True, help="Column of the images.")
@click.option("--label_column", default="label", show_default=True, help="Column of the labels.")
@click.option("--class_names", metavar="A,B,...", help="Classes, in order.  [the adapter's, or the data set's]")
@click.option("--center_crop", is_flag=True, help="Cut the middle square out of the real images.")
@click.option("--declared_public", is_flag=True, help="The real images need no protection.")
@click.option(
    "--num_images", default=2000, show_default=True, type=click.IntRange(min=1), help="To sample and train on."
)
@click.option("--scheduler", help="When sampling: as of dp-peft sample.  [the recipe's]")
@click.option("--num_inference_steps", type=click.IntRange(min=1), help="When sampling.  [the recipe's]")
@click.option("--guidance_scale", type=click.FloatRange(min=0), help="When sampling.  [the recipe's]")
@click.option("--base", help="When sampling: the base, if another or elsewhere.")
@click.option("--evaluation_resolution", type=click.IntRange(min=1), help="Side that all images are resized to.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, MAX_SEED - 1), help="Of sampling and nets."
)
@format_option
def evaluate(synthetic: Path, class_names: str | None, **settings: Any) -> None:
    """Test classifiers trained on synthetic images.

    They are tested on real images, of which they see none before.

    FOLDER_OR_IMAGES is a run's folder, which is sampled first, or what dp-peft sample wrote.
    """
    names = tuple(part.strip() for part in class_names.split(",")) if class_names else None
    result = _evaluate(synthetic, names, **settings)
    if settings["style"] == "json":
        click.echo(json.dumps(result, indent=2))
        return
    for name, title in (("logistic_regression", "logistic regression"), ("cnn", "small CNN")):
        click.echo(f"{title:<20} {result[name]['accuracy']:.1%} of {result['num_real_images']} real images right")
    click.echo(f"{'trained on':<20} {result['num_synthetic_images']} synthetic images, seed {result['seed']}")
    if "statement" in result:
        click.echo(result["statement"])


def _evaluate(path: Path, names: tuple[str, ...] | None, **settings: Any) -> dict[str, Any]:
    from dp_peft_diffusion.diffusion.datasets import open_examples
    from dp_peft_diffusion.diffusion.encoder import PixelEncoder
    from dp_peft_diffusion.evaluation import utility

    is_run = any((path / name).is_file() for name in ("recipe.yaml", "adapter_config.json"))
    data = Data(**{key: settings[key] for key in _REAL_IMAGES})
    if is_run:
        known = adapter_classes([path], "Classifiers need them: only adapters with classes can be evaluated.")
        announce_base([path], settings["base"])
        names = names or known
        images, labels = sampled(path, names, settings)
    else:
        names = names or listed_classes(data)
        images, labels = utility.load_synthetic(path, names)
    pixels = PixelEncoder(resolution=images.shape[2], image_channels=images.shape[1])
    real = open_examples(replace(data, class_names=names), pixels, None)
    real_images, real_labels = real.valid_arrays()
    if settings["evaluation_resolution"] is not None:
        images, real_images = (utility.to_side(x, settings["evaluation_resolution"]) for x in (images, real_images))
    public = settings["declared_public"] or data.dataset_name.startswith("builtin:")
    return utility.evaluate(images, labels, real_images, real_labels, seed=settings["seed"], declared_public=public)


def listed_classes(data: Data) -> tuple[str, ...]:
    """The classes that the data set itself names.

    Raises:
        UserError: it names none.
    """
    from dp_peft_diffusion.diffusion.listing import list_rows

    names = list_rows(data, None).label_names
    if names is None:
        raise UserError(f"{data.dataset_name!r} does not name its classes. Give them in order: --class_names 0,1,2")
    return names


def sampled(folder: Path, names: tuple[str, ...], settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Fresh images (n, c, h, w) uint8 of an adapter and their class positions (n,)."""
    import numpy as np

    from dp_peft_diffusion.diffusion.generation import generate

    passed_on = ("num_images", "scheduler", "num_inference_steps", "guidance_scale", "seed", "base")
    wanted = {key: settings[key] for key in passed_on}
    with warnings_as_hints():
        images, labels = generate(folder, class_labels=names, device=fastest_device(), **wanted)
    arrays = np.stack([np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image in images])
    return arrays, np.array([names.index(label) for label in labels or ()])
