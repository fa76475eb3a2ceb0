"""Arrays of bytes as pictures, one by one or all in a grid."""

import numpy as np
import torch
from PIL import Image


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(n, c, h, w) uint8 -> PIL images, grey or RGB."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def image_grid(images: torch.Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """One picture of all images (n, c, h, w) uint8, row by row, with a thin grey line between."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 96, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = 1 + index // columns * (h + 1), 1 + index % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
