"""Public augmentation of handwritten strokes, on the device, for pretraining the handwriting base."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from dp_peft_diffusion.diffusion.warping import affine, bend

CANVAS = 64  # side in which strokes are stored and thickened, before they shrink to the base's side
DIHEDRAL = 8  # four quarter turns, each also mirrored: as many classes from one character
STROKE_WIDTHS = (1, 3, 5, 7)  # side of the dilation window on the canvas, in pixels


def crop_glyph(image: Image.Image, invert: bool) -> torch.Tensor:
    """One character, white on black, cropped to its strokes and centred: (1, CANVAS, CANVAS) uint8."""
    grey = image.convert("L")
    grey = ImageOps.invert(grey) if invert else grey
    strokes = grey.crop(grey.point(lambda value: 255 if value > 64 else 0).getbbox())
    side = max(strokes.size)
    square = Image.new("L", (side, side), 0)
    square.paste(strokes, ((side - strokes.width) // 2, (side - strokes.height) // 2))
    return torch.from_numpy(np.array(square.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)))[None]


def augment(
    glyphs: torch.Tensor,  # (b, 1, CANVAS, CANVAS) uint8
    turns: torch.Tensor,  # (b,) integers in [0, DIHEDRAL)
    side: int,
    generator: torch.Generator,
    soften: bool = True,
) -> torch.Tensor:
    """Thicken, turn, shear, bend, shrink and, if they may be soft, blur at random: (b, 1, side, side) in [-1, 1]."""
    thick = torch.cat([_thicken(part, generator) for part in (glyphs.float() / 255).tensor_split(8)])
    grid = F.affine_grid(_affine(turns, generator), [len(glyphs), 1, CANVAS, CANVAS], align_corners=False)
    bent = F.grid_sample(thick, grid + bend(len(glyphs), CANVAS, CANVAS, 0.07, generator), align_corners=False)
    small = F.interpolate(bent, size=(side, side), mode="area")
    soft = torch.cat([_soften(part, generator) for part in small.tensor_split(8)]) if soften else small
    gain = 0.8 + 0.6 * torch.rand(len(glyphs), 1, 1, 1, generator=generator)
    return 2 * (soft * gain).clamp(0, 1) - 1


def _thicken(strokes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    width = STROKE_WIDTHS[_integer(len(STROKE_WIDTHS), generator)]
    return F.max_pool2d(strokes, width, stride=1, padding=width // 2)


def _affine(turns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Where each output pixel looks in the canvas: (b, 2, 3)."""
    b = len(turns)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(b, generator=generator)

    angle = uniform(-0.22, 0.22) + (turns % 4) * (math.pi / 2)  # radians
    fill, aspect, shear = uniform(0.6, 1.0), uniform(-0.25, 0.25).exp(), uniform(-0.35, 0.35)
    shift = torch.stack([uniform(-0.12, 0.12), uniform(-0.12, 0.12)], 1)
    return affine(angle, fill, aspect, shear, shift, mirror=1.0 - 2.0 * (turns // 4))


def _soften(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half stay sharp; the others look like small images that were enlarged."""
    small = (None, None, 8, 14)[_integer(4, generator)]
    if small is None:
        return images
    return F.interpolate(
        F.interpolate(images, size=(small, small), mode="area"), size=images.shape[-1], mode="bilinear"
    )


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))
