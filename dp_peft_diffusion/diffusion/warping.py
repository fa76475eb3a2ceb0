"""Where the pixels of a turned, stretched, sheared and bent image come from: grids for `grid_sample`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(
    angle: Tensor,  # (b,) radians
    size: Tensor,  # (b,) factor on both sides
    aspect: Tensor,  # (b,) factor on the width, and its inverse on the height
    shear: Tensor,  # (b,)
    shift: Tensor,  # (b, 2) in half sides
    mirror: Tensor,  # (b,) 1, or -1: left and right are exchanged
) -> Tensor:
    """Where each output pixel looks in its image, (b, 2, 3), as `affine_grid` takes it."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack([torch.stack([cos * mirror, -sin * mirror], 1), torch.stack([sin, cos], 1)], 1)
    stretch = torch.stack([torch.stack([1 / (size * aspect), shear], 1), torch.stack([zero, aspect / size], 1)], 1)
    return torch.cat([rotation @ stretch, shift[:, :, None]], dim=2)


def bend(b: int, height: int, width: int, deviation: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of a grid, of about this deviation, in half sides: (b, height, width, 2)."""
    coarse = deviation * torch.randn(b, 2, 4, 4, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").permute(0, 2, 3, 1)
