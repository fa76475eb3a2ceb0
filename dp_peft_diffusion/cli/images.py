"""`dp-peft sample`, and what other commands that sample take from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dp_peft_diffusion.cli.adapters import (
    adapter_options,
    announce_base,
    beside,
    check_weights,
    local_folders,
    warnings_as_hints,
)
from dp_peft_diffusion.cli.program import printable
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe
from dp_peft_diffusion.recipe import MAX_SEED

MAX_IMAGES = 1_000_003  # numbers of images that one seed has: `samplers.SEEDS_APART`


def sampler_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--scheduler, --num_inference_steps, --guidance_scale, --seed and --relabel."""
    seeds = click.IntRange(0, MAX_SEED - 1)
    schedulers = "fidelity, utility, ddim, ddpm, dpmsolver++, or a diffusers class.  [the recipe's]"
    options = (
        click.option("--scheduler", help=schedulers),
        click.option("--num_inference_steps", type=click.IntRange(min=1), help="Denoising steps.  [the recipe's]"),
        click.option("--guidance_scale", type=click.FloatRange(min=0), help="1: none.  [the recipe's]"),
        click.option("--seed", default=0, show_default=True, type=seeds, help="Same seed, same images."),
        click.option("--relabel", is_flag=True, help="Label an image with the class it shows; of code_moments."),
    )
    for option in reversed(options):
        command = option(command)
    return command


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
@sampler_options
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
