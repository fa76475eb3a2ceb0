"""Images as a few numbers, which captions can be asked to say."""

import torch
from torch import nn

from dp_peft_diffusion.diffusion.image_codes import on_canvas, principal_directions
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.recipe import PretrainRecipe

IMAGES_FOR_CODES = 16_384


class Sketch(nn.Module):
    """An image as `rank` numbers: principal components of small public images, by the square root of their spread.

    small: (n, pixels) as `on_canvas` gives them. The codes of these have root mean square 1.
    """

    mean: torch.Tensor  # (pixels,)
    directions: torch.Tensor  # (rank, pixels)

    def __init__(self, small: torch.Tensor, rank: int):
        super().__init__()
        mean, directions, spread = principal_directions(small, rank)  # (pixels,), (rank, pixels), (rank,)
        spread = spread / len(small) ** 0.5
        scale = (spread * spread.mean()).rsqrt()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions * scale[:, None])

    def forward(self, small: torch.Tensor) -> torch.Tensor:
        """Small images (b, pixels) -> codes (b, rank)."""
        return (small - self.mean) @ self.directions.T


def known_codes(
    images: PublicImages | Characters, recipe: PretrainRecipe, generator: torch.Generator
) -> tuple[Sketch, torch.Tensor, torch.Tensor]:
    """A sketch made of images as training draws them, and of each class the sum of their codes, and how many.

    Mean codes of classes have root mean square 1.
    """
    drawn = (images.draw(generator) for _ in range(-(-IMAGES_FOR_CODES // recipe.train_batch_size)))
    batches = [(on_canvas(pixels), classes) for pixels, classes in drawn]
    sketch = Sketch(torch.cat([small for small, _ in batches[: len(batches) // 8 + 1]]), recipe.class_code_rank)
    sums, counts = torch.zeros(images.num_classes, recipe.class_code_rank), torch.zeros(images.num_classes)
    for small, classes in batches:
        sums.index_add_(0, classes, sketch(small))
        counts.index_add_(0, classes, torch.ones(len(classes)))
    scale = (counts.sum() / (sums.square() / counts.clamp(min=1)[:, None]).mean(dim=1).sum()).sqrt()
    sketch.directions *= scale
    return sketch, sums * scale, counts
