"""`dp-peft evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_peft_diffusion.cli.adapters import announce_base, warnings_as_hints
from dp_peft_diffusion.cli.images import adapter_classes, fastest_device, sampler_options
from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.cli.program import hint, printable
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe
from dp_peft_diffusion.recipe import Data

if TYPE_CHECKING:
    import numpy as np

    from dp_peft_diffusion.diffusion.generation import ImageSource
    from dp_peft_diffusion.evaluation.measurements import Images, Labelled, Wanted

_REAL_IMAGES = ("dataset_name", "dataset_config_name", "split", "image_column", "label_column", "center_crop")
_SAMPLER = ("scheduler", "num_inference_steps", "guidance_scale", "seed", "relabel", "base")
_COUNT = click.IntRange(min=1)
CLASSIFIERS = "logistic_regression, mlp, cnn, cnn_dpdm, wrn_40_4, resnet_110"
CHOICES = (
    "A choice made by numbers of private images is not paid for by epsilon. If these decide how the next run trains, "
    "tell its certificate with --unpaid_runs N, or pay for all N runs with --tuning_runs N."
)

real_images = (
    click.option("--dataset_name", required=True, help="Real images to test on, which were not trained on."),
    click.option("--dataset_config_name", help="Configuration of a Hub data set."),
    click.option("--split", default="test", show_default=True, help="Split that was not trained on."),
    click.option("--image_column", default="image", show_default=True, help="Column of the images."),
    click.option("--label_column", default="label", show_default=True, help="Column of the labels."),
    click.option("--class_names", metavar="A,B,...", help="Classes, in order.  [the adapter's, or the data set's]"),
    click.option("--center_crop", is_flag=True, help="Cut the middle square out of the real images."),
    click.option("--training_dataset_name", help="The images that were trained on.  [those of --dataset_name]"),
    click.option("--training_split", default="train", show_default=True, help="Their split."),
    click.option("--declared_public", is_flag=True, help="None of the real images needs protection."),
    click.option("--evaluation_resolution", type=_COUNT, help="Side that all images are resized to."),
)
measurements = (
    click.option(
        "--classifiers",
        default="logistic_regression,cnn",
        show_default=True,
        metavar="A,B,...",
        help=f"Of {CLASSIFIERS}.",
    ),
    click.option("--num_seeds", default=1, show_default=True, type=_COUNT, help="How often each is trained."),
    click.option("--ensemble", default=1, show_default=True, type=_COUNT, help="Nets that vote, of each seed."),
    click.option("--epochs", type=_COUNT, help="Of each net.  [its protocol's]"),
    click.option("--flip", is_flag=True, help="Mirror half of the images in training; never for characters."),
    click.option("--warp", is_flag=True, help="Nets of convolutions see images turned, bent; for characters."),
    click.option("--learning_curve", is_flag=True, help="Accuracy against the number of synthetic images."),
    click.option("--tuning", is_flag=True, help="Choose settings of the small CNN on synthetic images alone."),
    click.option(
        "--features", multiple=True, help="Likeness in features: handwriting, inception, clip, or a folder of yours."
    ),
    click.option("--reference", is_flag=True, help="The same classifiers, trained on the real training images."),
    click.option("--memorization", is_flag=True, help="Nearest training images, in the first --features."),
    click.option("--membership", is_flag=True, help="An attack on the run, against what its promise allows."),
    click.option(
        "--private_classifier",
        is_flag=True,
        help="A CNN trained with DP-SGD at the run's epsilon, which is SPENT in addition.",
    ),
)


def with_options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command all of these, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command()
@click.argument("synthetic", metavar="FOLDER_OR_IMAGES", type=click.Path(path_type=Path))
@with_options(*real_images, *measurements)
@click.option("--num_images", default=2000, show_default=True, type=_COUNT, help="To sample and train on.")
@sampler_options
@click.option("--base", help="When sampling: the base, if another or elsewhere.")
@click.option("--output_dir", type=click.Path(path_type=Path), help="For JSON, tables, plots and page.  [none written]")
@format_option
def evaluate(synthetic: Path, output_dir: Path | None, style: str, **settings: Any) -> None:
    """Test classifiers trained on synthetic images.

    They are tested on real images, of which they see none before.

    FOLDER_OR_IMAGES is a run's folder, which is sampled first, or what dp-peft sample wrote, or a parquet file. What
    is computed from private images is not covered by the guarantee, and is written into a NAME.private only.
    """
    from dp_peft_diffusion.evaluation.measurements import Wanted

    settings["classifiers"] = split(settings["classifiers"])
    wanted = Wanted(**{field.name: settings[field.name] for field in fields(Wanted)})
    run = synthetic if any((synthetic / name).is_file() for name in ("recipe.yaml", "adapter_config.json")) else None
    public = settings["declared_public"] or is_built_in(wanted, settings)
    check_places(wanted, run, output_dir, public)
    show(measured(wanted, synthetic, run, public, output_dir, settings), output_dir, style)


def split(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(part.strip() for part in text.split(","))


def is_built_in(wanted: Wanted, settings: dict[str, Any]) -> bool:
    """Whether all real images that are looked at come with the package, which makes them public."""
    names = [settings["dataset_name"]]
    if wanted.of_training_images:
        names.append(settings["training_dataset_name"] or settings["dataset_name"])
    return all(name.startswith("builtin:") for name in names)


def private_place(run: Path | None, output_dir: Path | None) -> Path | None:
    """Where lists of private images go: the output folder, if it is a private one, or else that of the run."""
    if output_dir is not None and output_dir.name.endswith(".private"):
        return output_dir
    own = None if run is None else run.absolute().with_name(f"{run.absolute().name}.private")
    return own if own is not None and own.is_dir() else None


def check_places(wanted: Wanted, run: Path | None, output_dir: Path | None, public: bool) -> None:
    """What can be refused before anything is opened.

    Raises:
        UserError: private numbers would go where they could be shared, or a measurement has nothing to look at.
        PrivacyError: a private folder that others can read.
    """
    from dp_peft_diffusion.evaluation.memorization import check_private
    from dp_peft_diffusion.sharing.promises import check_apart

    if output_dir is not None:
        check_apart(output_dir, "--output_dir", [] if run is None else [run])
        if not public and not output_dir.name.endswith(".private"):
            raise UserError(
                f"--output_dir {output_dir}: what is computed from private images may not lie where it could be "
                f"shared. Type --output_dir {output_dir}.private, or --declared_public if none of them needs "
                "protection."
            )
    if wanted.of_a_run and run is None:
        raise UserError("--membership and --private_classifier look at a run. Give its folder in place of images.")
    if wanted.memorization and not wanted.features:
        raise UserError("--memorization compares images by features. Add for example --features handwriting.")
    private = private_place(run, output_dir)
    if wanted.memorization and private is None:
        raise UserError(
            "--memorization shows training images, which belong into a private folder, and there is none here. Add "
            "--output_dir NAME.private."
        )
    if private is not None and private.exists() and (wanted.memorization or private == output_dir):
        check_private(private)


def measured(
    wanted: Wanted, path: Path, run: Path | None, public: bool, output_dir: Path | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is wanted. All that is needed is opened, and refused, before anything is computed."""
    from dp_peft_diffusion.evaluation.measurements import check_images, check_run, measure, open_nets
    from dp_peft_diffusion.evaluation.written import make_output

    device = fastest_device()
    with warnings_as_hints():
        nets = open_nets(wanted, device)
        checked = None if run is None else check_run(wanted, run, settings["base"])
        images, synthetic = opened(wanted, path, run, settings)
        check_images(wanted, checked, images)
        if output_dir is not None:
            make_output(output_dir, public)
        return measure(
            wanted,
            nets,
            synthetic(),
            images,
            run=checked,
            declared_public=public,
            device=device,
            private_folder=private_place(run, output_dir),
        )


def opened(
    wanted: Wanted, path: Path, run: Path | None, settings: dict[str, Any]
) -> tuple[Images, Callable[[], Labelled]]:
    """The real images, and what gives the synthetic ones: a run is sampled when everything else is in order."""
    from dp_peft_diffusion.diffusion.datasets import open_examples
    from dp_peft_diffusion.diffusion.encoder import PixelEncoder
    from dp_peft_diffusion.diffusion.generation import open_source
    from dp_peft_diffusion.evaluation.measurements import Images
    from dp_peft_diffusion.evaluation.separation import check_other_split, count_identical
    from dp_peft_diffusion.evaluation.synthetic_images import load_synthetic

    data = Data(**{key: settings[key] for key in _REAL_IMAGES})
    names = split(settings["class_names"]) if settings["class_names"] else None
    synthetic: Callable[[], Labelled]
    if run is not None:
        known = adapter_classes([run], "Classifiers need them: only adapters with classes can be evaluated.")
        announce_base([run], settings["base"])
        sampler, names = {key: settings[key] for key in _SAMPLER}, names or known
        source = open_source(run, class_labels=names, device=fastest_device(), **sampler)
        encoder = PixelEncoder(resolution=source.base.resolution, image_channels=source.base.image_channels)
        synthetic = partial(sampled, source, names, settings["num_images"])
    else:
        if settings["relabel"]:
            raise UserError("--relabel: these images have their labels. Sample them with dp-peft sample --relabel.")
        names = names or listed_classes(data)
        loaded = load_synthetic(path, names)
        encoder = PixelEncoder(resolution=loaded[0].shape[2], image_channels=loaded[0].shape[1])

        def given() -> Labelled:
            return loaded

        synthetic = given
    data = replace(data, class_names=names)
    if not wanted.of_training_images:
        return Images(names, open_examples(data, encoder, None).valid_arrays()), synthetic
    training_data = trained_on(data, run, settings)
    check_other_split(data, training_data)
    held_out, training = (open_examples(part, encoder, None) for part in (data, training_data))
    identical = count_identical(held_out, training)
    return Images(names, held_out.valid_arrays(), training, identical), synthetic


def trained_on(data: Data, run: Path | None, settings: dict[str, Any]) -> Data:
    """Where the training images are, described as the real ones; of a run, with the groups that its unit is."""
    other = settings["training_dataset_name"]
    data = replace(data, split=settings["training_split"])
    if other is not None:
        data = replace(data, dataset_name=other, dataset_config_name=None)
    if run is None:
        return data
    own = read_recipe(run).data
    return replace(data, group_column=own.group_column, max_examples_per_group=own.max_examples_per_group)


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


def sampled(source: ImageSource, names: tuple[str, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fresh images (count, c, h, w) uint8 of an adapter and their class positions (count,)."""
    import numpy as np

    batches = [(images.numpy(), source.described(ids, images)) for ids, images in source.batches(range(count))]
    labels = [names.index(row["label"]) for _, described in batches for row in described]
    return np.concatenate([images for images, _ in batches]), np.array(labels)


def show(result: dict[str, Any], output_dir: Path | None, style: str) -> None:
    """Print what was found, and write it where it was asked for."""
    from dp_peft_diffusion.evaluation.summary import tables
    from dp_peft_diffusion.evaluation.written import write_evaluation

    made = tables(result)
    if style == "json":
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(printable("\n".join(table.text for table in made), keep="\n"))
        if "statement" in result:
            click.echo(result["statement"])
    if output_dir is not None:
        write_evaluation(output_dir, result, made)
        hint(f"Written: {output_dir}")
    if not result["declared_public"]:
        hint(CHOICES)
