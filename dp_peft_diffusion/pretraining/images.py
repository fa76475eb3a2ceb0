"""Public images, read while they are needed. NOT for images that must not leak: they are cached in the clear."""

import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import torch

from dp_peft_diffusion.diffusion.datasets import open_dataset
from dp_peft_diffusion.diffusion.decoding import decode
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import PretrainRecipe


class PublicImages:
    """Images that stay on disk until a batch asks for them; `datasets` maps their file into memory.

    labels: (N,) int64; zeros without a label column. With captions of their own, images count as classes of one.
    num_classes: 0 without labels.
    captions: of each class.

    Raises:
        UserError: no such data set or column, no images, or labels that are no class numbers.
    """

    def __init__(self, recipe: PretrainRecipe):
        rows = open_public(recipe)
        if not isinstance(rows.features[recipe.image_column], datasets.Image):
            raise UserError(f"column {recipe.image_column!r} holds no images. Name the one that does: --image_column.")
        self.rows = rows.cast_column(recipe.image_column, datasets.Image(decode=False))
        self.recipe, self.num_classes = recipe, 0
        self.labels, self.captions = torch.zeros(len(rows), dtype=torch.int64), list[str]()
        if recipe.caption_column is not None:
            self.captions = own_captions(rows, recipe.caption_column)
            self.labels, self.num_classes = torch.arange(len(rows)), len(rows)
        elif recipe.label_column is not None:
            self.labels = class_numbers(rows, recipe.label_column)
            self.num_classes = count_classes(rows, recipe.label_column, self.labels)
            self.captions = class_captions(rows, recipe, self.num_classes)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Images (b, c, side, side) float32 in [-1, 1] of ids (b,).

        Raises:
            UserError: an image that cannot be decoded.
        """
        stored = self.rows[ids.tolist()][self.recipe.image_column]
        pixels = [self._decode(index, source) for index, source in zip(ids.tolist(), stored, strict=True)]
        return torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch for one update, with replacement: images (b, c, side, side), flipped at random, and labels (b,)."""
        b = self.recipe.train_batch_size
        ids = torch.randint(len(self), (b,), generator=generator)
        images = self.read(ids)
        if self.recipe.random_flip:
            flipped = torch.rand(b, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return images, self.labels[ids]

    def captions_of(self, ids: torch.Tensor) -> list[str]:
        """The captions of images."""
        return [self.captions[label] for label in self.labels[ids].tolist()]

    def _decode(self, index: int, source: dict) -> np.ndarray:
        recipe, stored = self.recipe, source["bytes"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PIL, about odd but readable files
                picture = Path(source["path"]) if stored is None else stored
                return decode(picture, recipe.resolution, recipe.image_channels, recipe.center_crop)
        except Exception as error:  # PIL raises what it likes
            raise UserError(
                f"image {index} of {recipe.dataset_name} cannot be decoded: {error}. Take it out of the data set."
            ) from error


def open_public(recipe: PretrainRecipe) -> datasets.Dataset:
    """The rows of the recipe's data set, of which there is at least one.

    Raises:
        UserError: no such data set, split or column, or no rows.
    """
    try:
        rows = open_dataset(recipe.dataset_name, recipe.split)
    except (ValueError, OSError) as error:  # of datasets: an unknown split, an empty folder
        raise UserError(f"--dataset_name {recipe.dataset_name!r} --split {recipe.split}: {error}") from error
    labels = recipe.label_column if recipe.caption_column is None else None
    for column in (recipe.image_column, labels, recipe.caption_column):
        if column is not None and column not in rows.column_names:
            raise UserError(f"the images have no column {column!r}; there is: {', '.join(rows.column_names)}.")
    if len(rows) == 0:
        raise UserError(f"--dataset_name {recipe.dataset_name!r} holds no images.")
    return rows


def class_numbers(rows: datasets.Dataset, column: str) -> torch.Tensor:
    """Labels (N,) int64.

    Raises:
        UserError: a label that is no whole number from 0 up.
    """
    labels = rows.select_columns([column])[:][column]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise UserError(
            f"the labels in {column!r} must be whole numbers from 0 up, one for each class. Rewrite them, or train "
            "without classes: --label_column none."
        )
    return torch.tensor(labels)


def count_classes(rows: datasets.Dataset, column: str | None, labels: torch.Tensor) -> int:
    """Classes: those that the data set names, or as many as its largest label says."""
    feature = rows.features[column]
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1


def class_captions(rows: datasets.Dataset, recipe: PretrainRecipe, num_classes: int) -> list[str]:
    """The prompt template filled in with the words of every class's name, or with its number if it has none."""
    feature = rows.features[recipe.label_column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else map(str, range(num_classes))
    return [recipe.prompt_template.replace("{label}", re.sub(r"[\W_]+", " ", name).strip()) for name in names]


def own_captions(rows: datasets.Dataset, column: str) -> list[str]:
    """The caption of every row.

    Raises:
        UserError: one that is no text.
    """
    captions = rows.select_columns([column])[:][column]
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"column {column!r} must hold a text for every image. Name another: --caption_column.")
    return list(captions)
