"""From a stored image to pixels, whatever state it is in."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Decoded in this process, without helpers such as Ghostscript, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}
MAX_PIXELS = 2**26  # of one image before resizing: 64 MiB per byte of pixel


def image_extensions() -> set[str]:
    """File name endings of `FORMATS`, in lower case with the dot."""
    return {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}


def decode(source: Path | bytes | Image.Image, side: int, channels: int, center_crop: bool) -> np.ndarray:
    """Pixels (c, side, side) uint8. Raises whatever PIL raises on a broken image, and ValueError."""
    image: Image.Image
    if isinstance(source, bytes):
        image = Image.open(BytesIO(source), formats=FORMATS)
    elif isinstance(source, Path):
        image = Image.open(source, formats=FORMATS)
    else:
        image = source
    with image:
        if image.width * image.height > MAX_PIXELS:  # the header's claim: nothing is allocated yet
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        ImageOps.exif_transpose(image, in_place=True)
        flat = flatten(image, MODES[channels])
    width, height = flat.size
    crop = min(width, height)
    left, top = (width - crop) / 2, (height - crop) / 2
    box = (left, top, left + crop, top + crop) if center_crop else (0, 0, width, height)
    square = flat.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(square).reshape(side, side, -1).transpose(2, 0, 1)


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """8 bits per channel, no transparency."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # v / 257, rounded
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


@contextmanager
def silence() -> Iterator[None]:
    """No message of a decoder or tokenizer reaches the terminal: it would tell what is in a record (invariant 17).

    libtiff writes to the file descriptor itself, below Python's warnings and loggers.
    """
    disabled, stderr, nowhere = logging.root.manager.disable, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    logging.disable(logging.CRITICAL)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        logging.disable(disabled)
        os.close(stderr)
        os.close(nowhere)
