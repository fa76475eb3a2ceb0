"""Public characters, cropped once, and changed at random each time they are drawn."""

import datasets
import torch

from dp_peft_diffusion.diffusion.glyphs import DIHEDRAL, augment, crop_glyph
from dp_peft_diffusion.pretraining.images import class_captions, class_numbers, open_public
from dp_peft_diffusion.recipe import PretrainRecipe

TURNS = ("", ", turned left", ", upside down", ", turned right")  # quarter turns, as `augment` numbers them


class Characters:
    """Every character counts as eight classes: four quarter turns, each also mirrored.

    glyphs: (n, 1, CANVAS, CANVAS) uint8. labels: (n,) the character of each, before turns.
    captions: of each class. soften: blur half of what is drawn, as if small images had been enlarged.

    Raises:
        UserError: no such data set or column, or labels that are no numbers.
    """

    def __init__(self, recipe: PretrainRecipe, soften: bool = True):
        rows = open_public(recipe)
        images = [crop_glyph(image, recipe.invert) for image in rows[recipe.image_column]]
        self.glyphs, self.labels = torch.stack(images), class_numbers(rows, str(recipe.label_column))
        self.soften = soften
        self.recipe, self.num_classes = recipe, DIHEDRAL * (int(self.labels.max()) + 1)
        self.captions = turned_captions(rows, recipe, self.num_classes // DIHEDRAL)

    def __len__(self) -> int:
        return len(self.glyphs)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Images (b, 1, side, side) float32 in [-1, 1] of ids (b,), upright; the first id seeds how they change."""
        generator = torch.Generator().manual_seed(int(ids[0]))
        return augment(self.glyphs[ids], torch.zeros_like(ids), self.recipe.resolution, generator)

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch for one update, with replacement: images (b, 1, side, side) in [-1, 1], and their classes (b,)."""
        b = self.recipe.train_batch_size
        picked = torch.randint(len(self.glyphs), (b,), generator=generator)
        turns = torch.randint(DIHEDRAL, (b,), generator=generator)
        images = augment(self.glyphs[picked], turns, self.recipe.resolution, generator, self.soften)
        return images, DIHEDRAL * self.labels[picked] + turns

    def captions_of(self, ids: torch.Tensor) -> list[str]:
        """The captions of upright characters."""
        return [self.captions[DIHEDRAL * label] for label in self.labels[ids].tolist()]


def turned_captions(rows: datasets.Dataset, recipe: PretrainRecipe, characters: int) -> list[str]:
    """The caption of every class: of the character, and how it is turned."""
    mirrors = ("", ", mirrored")
    upright = class_captions(rows, recipe, characters)
    return [caption + mirror + turn for caption in upright for mirror in mirrors for turn in TURNS]
