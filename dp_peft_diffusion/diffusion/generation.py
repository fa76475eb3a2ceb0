"""Images from shareable folders: what each of them shows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dp_peft_diffusion import recipe as recipes
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.code_classifier import CodeClassifier, code_classifier
from dp_peft_diffusion.diffusion.conditions import LABEL, class_prompts, null_conditions
from dp_peft_diffusion.diffusion.grids import to_pil
from dp_peft_diffusion.diffusion.opening import open_model
from dp_peft_diffusion.diffusion.samplers import default_batch_size, default_scheduler, sample_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Recipe


@dataclass(frozen=True)
class ImageSource:
    """A model, and what its images show: image i shows entry i of the labels, rows and prompts, taken in turn.

    sample: scheduler, num_inference_steps, guidance_scale and seed.
    shown: says which of the classes is written beside an image; None: the one that was asked for.
    """

    base: BaseModel
    sample: recipes.Sample
    labels: tuple[str, ...] | None  # names of classes
    rows: tuple[int, ...] | None  # theirs in the class table
    prompts: tuple[str, ...] | None  # of a text-conditional base
    batch_size: int
    dtype: torch.dtype
    device: torch.device | str
    shown: CodeClassifier | None = None

    def batches(self, ids: range) -> Iterator[tuple[range, Tensor]]:
        """The ids of a batch and its images (n, c, side, side) uint8, for all of `ids`."""
        for start in range(ids.start, ids.stop, self.batch_size):
            batch = range(start, min(ids.stop, start + self.batch_size))
            yield (
                batch,
                sample_images(
                    self.base,
                    self.conditions(batch),
                    num_images=len(batch),
                    first_image=start,
                    seed=self.sample.seed,
                    scheduler=self.sample.scheduler,
                    num_inference_steps=self.sample.num_inference_steps,
                    guidance_scale=self.sample.guidance_scale,
                    batch_size=self.batch_size,
                    dtype=self.dtype,
                    device=self.device,
                ),
            )

    def conditions(self, ids: range) -> dict[str, Tensor]:
        """What the network is told of these images."""
        if self.prompts is not None and self.base.text is not None:
            wanted = [self.prompts[i % len(self.prompts)] for i in ids]
            distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(wanted))}
            places = torch.tensor([distinct[prompt] for prompt in wanted])
            return {name: rows[places.to(rows.device)] for name, rows in self.base.text.encode(list(distinct)).items()}
        if self.rows is not None:
            return {"class_labels": torch.tensor([self.rows[i % len(self.rows)] for i in ids])}
        return null_conditions(self.base, len(ids))

    def told(self, i: int) -> dict[str, str]:
        """What image i was asked to show: its `label`, its `text`."""
        columns = {"label": self.labels, "text": self.prompts}
        return {name: entries[i % len(entries)] for name, entries in columns.items() if entries is not None}

    def described(self, ids: range, images: Tensor) -> list[dict[str, str]]:
        """What is written beside these images (n, c, side, side) uint8: a function of number and image alone."""
        told = [self.told(i) for i in ids]
        if self.shown is None:
            return told
        return [row | {"label": name} for row, name in zip(told, self.shown.classes(images), strict=True)]


def open_source(
    folders: Path | str | Sequence[Path | str],
    *,
    weights: Sequence[float] | None = None,
    unmerged: bool = False,
    class_labels: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    relabel: bool = False,
    base: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ImageSource:
    """Shareable folders as a source of images: their adapters merged into the base, or the whole model of a single one.

    They are merged in float32, whatever `dtype` the network then computes in.

    weights: how much of each adapter's change is added to the base; None: 1 of each.
    unmerged: the adapters stay layers of stock peft.
    class_labels, prompts: taken in turn; None takes all classes of the first folder in turn. A class of several
        folders is the first one's. What is None is as in the first folder's recipe, its base too.
    relabel: the label of an image is the class, of those taken, that it shows by the adapter's codes.

    Raises:
        UserError: unknown class name, not an adapter folder, another base than it was trained on, no prompts, or no
            codes to relabel by.
        PrivacyError: the files of a folder say what we never write.
    """
    places = [Path(folder) for folder in ([folders] if isinstance(folders, Path | str) else folders)]
    if relabel and weights is not None and min(weights) <= 0:
        raise UserError("--relabel asks an adapter's class rows what classes look like: --adapter_weight above 0.")
    loaded, recipes = open_model(places, [1.0] * len(places) if weights is None else weights, base, unmerged)
    known = known_classes(loaded, recipes)
    labels = choose_labels(known, recipes[0], class_labels, prompts)
    given: dict[str, Any] = {
        "scheduler": scheduler or recipes[0].sample.scheduler or default_scheduler(loaded),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    given = {key: value for key, value in given.items() if value is not None}
    loaded = loaded.to(device)
    rows = None if labels is None or loaded.text is not None else class_rows(recipes, labels)
    return ImageSource(
        base=loaded,
        sample=replace(recipes[0].sample, seed=seed, **given),
        labels=labels,
        rows=rows,
        prompts=choose_prompts(loaded, recipes[0], prompts, labels, known),
        batch_size=batch_size or default_batch_size(loaded),
        dtype=dtype,
        device=device,
        shown=code_classifier(loaded, labels, rows) if relabel else None,
    )


def known_classes(base: BaseModel, recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Every class that the base can be told of, and the first recipe that has it."""
    known: dict[str, Recipe] = {}
    for recipe in recipes:
        if base.text is not None or recipe.adapter.class_rows is not None:
            for name in recipe.data.class_names or ():
                known.setdefault(name, recipe)
    return known


def class_rows(recipes: Sequence[Recipe], names: Sequence[str]) -> tuple[int, ...]:
    """The rows of the class table that images of these classes take in turn; for one of several recipes the first's.

    Entry i is of class i % len(names). A class of several rows takes them in turn, too.
    """
    known: dict[str, tuple[int, ...]] = {}
    for recipe in recipes:
        rows, count = recipe.adapter.rows_in_turn, len(recipe.adapter.class_rows or ())
        for place, name in enumerate((recipe.data.class_names or ())[:count]):
            known.setdefault(name, rows[place::count])
    most = max((len(known[name]) for name in names), default=1)
    turns = {name: cycle(known[name]) for name in names}
    return tuple(next(turns[name]) for _ in range(most) for name in names)


def choose_labels(
    known: dict[str, Recipe], recipe: Recipe, wanted: Sequence[str] | None, prompts: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The names of classes that images take in turn: those wanted, or all of `recipe`; None where others are shown.

    Raises:
        UserError: a name that is no class, or classes where there are none.
    """
    if wanted and prompts:
        raise UserError("--class_labels and --prompt both say what to show. Leave one of them out.")
    if wanted and not known:
        raise UserError("this adapter has no classes; leave out --class_labels.")
    names, own = list(known), [name for name, first in known.items() if first is recipe]
    shown = wanted or own
    return None if prompts or not shown else tuple(names[i] for i in class_indices(names, shown, len(shown)))


def choose_prompts(
    base: BaseModel,
    recipe: Recipe,
    prompts: Sequence[str] | None,
    labels: Sequence[str] | None,
    known: dict[str, Recipe],
) -> tuple[str, ...] | None:
    """The prompts that images take in turn: those given, those of the labels, or those of the recipe's grids.

    Never captions, which are private.

    Raises:
        UserError: prompts for a base that reads no text, or none for one that does.
    """
    if base.text is None:
        if prompts:
            raise UserError(f"--prompt: base {base.name!r} reads no text. Use --class_labels, or leave it out.")
        return None
    if prompts:
        return tuple(prompts)
    if labels:
        return tuple(class_prompts([name], known[name].data.prompt_template)[0] for name in labels)
    template = recipe.data.prompt_template
    if recipe.sample.prompts or LABEL not in template:
        return recipe.sample.prompts or (template,)
    raise UserError(
        "this adapter was trained on captions, which are private. Say what to show: --prompt 'a photo of ...'"
    )


def generate(
    folders: Path | str | Sequence[Path | str],
    *,
    num_images: int = 64,
    first_image: int = 0,
    weights: Sequence[float] | None = None,
    unmerged: bool = False,
    class_labels: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    relabel: bool = False,
    base: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[list[Image.Image], list[str] | None]:
    """Sample from a shareable folder, or from several together, as `open_source` says, which has the options.

    first_image: the first of the images; image i alone is first_image=i, num_images=1.

    Returns PIL images, and their class names (None if they have none).

    Raises:
        UserError: what `open_source` and `sample_images` refuse.
    """
    source = open_source(
        folders,
        weights=weights,
        unmerged=unmerged,
        class_labels=class_labels,
        prompts=prompts,
        scheduler=scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        relabel=relabel,
        base=base,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    images: list[Image.Image] = []
    described: list[dict[str, str]] = []
    for ids, batch in source.batches(range(first_image, first_image + num_images)):
        images += to_pil(batch)
        described += source.described(ids, batch)
    return images, None if source.labels is None else [row["label"] for row in described]


def class_indices(names: Sequence[str], wanted: Sequence[str] | None, num_images: int) -> list[int]:
    """The class of each image: the wanted names (default all) in turn.

    Raises:
        UserError: a name that is not among the classes.
    """
    places = {name: place for place, name in enumerate(names)}
    unknown = [name for name in wanted or () if name not in places]
    if unknown:
        raise UserError(f"--class_labels {unknown[0]!r} is not a class of this adapter. There is: {', '.join(names)}")
    chosen = [places[name] for name in wanted or names]
    return [chosen[i % len(chosen)] for i in range(num_images)]
