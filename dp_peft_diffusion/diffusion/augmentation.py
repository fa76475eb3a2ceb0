"""Random changes of images, keyed by (step, example id, view): whoever else is in the batch, a view is the same.

Each image is changed by itself, pixel by pixel, in float32 on the CPU: nothing sums over pixels or images.
"""

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_peft_diffusion.privacy.randomness import Purpose, generator

LEAST_CROP = 0.8  # side of the cut square, as a share of the image's
SHIFT = 8  # at most side / 8 pixels: 4 of 32, as in De et al. 2022, arXiv 2204.13650
COLOR = 0.2  # contrast and saturation times 0.8 to 1.2; brightness up or down by at most a tenth of black to white
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, ITU-R BT.601


def augment(images: Tensor, names: Collection[str], key: bytes, step: int, ids: np.ndarray, views: int) -> Tensor:
    """Changed versions of each image, (b, A, c, side, side) in [-1, 1].

    Always the same for one key, step, id and view, alone or in any batch (invariant 8); a change draws the same
    whichever others are named.

    Args:
        images: (b, c, side, side) float32 in [-1, 1]; c is 1 or 3.
        names: which changes, of `recipe.AUGMENTATIONS`: "flip" mirrors left and right every other time, "crop" cuts a
            square out and enlarges it, "shift" moves by whole pixels and repeats the border, "color" changes
            brightness, contrast, and saturation where there are colours.
        key: of the run.
        step: of the update, or another number that tells draws apart.
        ids: (b,) example ids.
        views: A.
    """
    streams = [generator(key, Purpose.AUGMENTATION, step, int(i), view) for i in ids for view in range(views)]
    uniform = torch.from_numpy(np.stack([stream.random(9) for stream in streams]))  # (b * A, 9)
    x = images.repeat_interleave(views, dim=0)  # (b * A, c, side, side)
    if "flip" in names:
        x = torch.where(uniform[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
    if "crop" in names:
        x = _crop(x, uniform[:, 1].float(), uniform[:, 2:4].float())
    if "shift" in names:
        x = _shift(x, uniform[:, 4:6])
    if "color" in names:
        x = _color(x, 2 * uniform[:, 6:9].float() - 1)
    return x.clamp(-1, 1).unflatten(0, (len(ids), views))


def _crop(x: Tensor, size: Tensor, place: Tensor) -> Tensor:
    """A square of LEAST_CROP to all of the side, anywhere, brought back to the whole by bilinear interpolation.

    x: (n, c, side, side). size: (n,) in [0, 1). place: (n, 2) in [0, 1), across and down.
    """
    n, side = len(x), x.shape[-1]
    share = (LEAST_CROP + (1 - LEAST_CROP) * size).view(n, 1)
    pixels = (2 * torch.arange(side) + 1) / side - 1  # their middles; the image is [-1, 1] in both directions
    across, down = (share * pixels + (1 - share) * (2 * where - 1).view(n, 1) for where in place.T)  # (n, side) each
    grid = torch.stack([across[:, None, :].expand(n, side, side), down[:, :, None].expand(n, side, side)], dim=3)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _shift(x: Tensor, amount: Tensor) -> Tensor:
    """Whole pixels, so that nothing is blurred. x: (n, c, side, side). amount: (n, 2) in [0, 1), down and across."""
    side = x.shape[-1]
    most = side // SHIFT
    moves = (amount * (2 * most + 1)).long() - most  # (n, 2) in [-most, most]
    sources = (torch.arange(side) - moves[:, :, None]).clamp(0, side - 1)  # (n, 2, side)
    rows, columns = sources[:, 0].view(-1, 1, side, 1), sources[:, 1].view(-1, 1, 1, side)
    return x.gather(2, rows.expand_as(x)).gather(3, columns.expand_as(x))


def _color(x: Tensor, amount: Tensor) -> Tensor:
    """Contrast around mid-grey, brightness, saturation. x: (n, c, side, side). amount: (n, 3) in [-1, 1)."""
    brightness, contrast, saturation = (COLOR * amount).T.reshape(3, -1, 1, 1, 1)
    x = x * (1 + contrast) + brightness
    if x.shape[1] != 3:
        return x
    grey = sum(weight * x[:, channel : channel + 1] for channel, weight in enumerate(LUMA))
    return grey + (x - grey) * (1 + saturation)
