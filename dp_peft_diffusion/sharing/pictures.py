"""Grids of samples, cut to what a page shows of them, as data URIs."""

import base64
import io
from pathlib import Path

from PIL import Image

GRIDS = 5  # of a strip, the first and the last among them
COLUMNS, ROWS = 10, 4  # images of a grid that are shown
ZOOM = 2  # of `image_grid`
WIDEST = 720  # pixels of a picture
PNG_BYTES = 120_000  # a picture that takes more is stored as JPEG


def strip(folder: Path, resolution: int) -> list[tuple[int, str]]:
    """(step, picture) of some of the grids in `folder`, in order: one row of each, and more of the last.

    resolution: pixels of a side of one image.
    """
    paths = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.png")}
    steps = sorted(paths)
    shown = sorted({steps[round(k * (len(steps) - 1) / (GRIDS - 1))] for k in range(GRIDS)})
    return [(step, picture(paths[step], resolution, ROWS if step == steps[-1] else 1)) for step in shown]


def picture(path: Path, resolution: int, rows: int) -> str:
    """The first rows of a grid as a data URI: each of its pixels once, or fewer where it is large."""
    with Image.open(path) as grid:
        cell = ZOOM * (resolution + 1)
        columns, rows = min(COLUMNS, grid.width // cell), min(rows, grid.height // cell)
        cut = grid.crop((0, 0, columns * cell + ZOOM, rows * cell + ZOOM))
    cut = cut.resize((cut.width // ZOOM, cut.height // ZOOM), Image.Resampling.NEAREST)
    cut.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    kind, content = "png", encoded(cut, format="PNG")
    if len(content) > PNG_BYTES:
        kind, content = "jpeg", encoded(cut, format="JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, **options)  # type: ignore[arg-type]
    return file.getvalue()
