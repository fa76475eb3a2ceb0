"""Synthetic images with their classes, read from files and brought to the size that classifiers see."""

import csv
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dp_peft_diffusion.diffusion.decoding import FORMATS, MAX_PIXELS, flatten
from dp_peft_diffusion.errors import UserError

GREY = ("1", "L", "LA", "La")


class Row(NamedTuple):
    """A synthetic image as stored: where, for messages; its bytes, or what stands in their place; its class."""

    place: str
    image: Any
    label: Any


def to_side(images: np.ndarray, side: int) -> np.ndarray:
    """(n, c, h, w) uint8 -> (n, c, side, side) uint8, each new pixel the mean of the area it covers.

    Resize synthetic and real images the same way, so that classifiers see the pixels that real images have.
    """
    rows, columns = (_coverage(size, side) for size in images.shape[2:])
    return np.rint(rows @ images.astype(np.float64) @ columns.T).astype(np.uint8)


def load_synthetic(path: Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, c, h, w) uint8 and class indices (n,) of a folder that `dp-peft sample` wrote, or a parquet file.

    A folder holds images/metadata.csv (or metadata.csv), with columns file_name and label, or parquet files in images/
    (or itself); these have columns image and label. Labels are class names, or their indices.

    Raises:
        UserError: no such files, an image that cannot be read, labels that are no classes, or images that differ in
            shape.
    """
    try:
        rows = list(_read_folder(path) if path.is_dir() else _read_parquet(path))
    except KeyError as error:
        raise UserError(
            f"the images of {str(path)!r} have no {error}. Classifiers need a class for each: type dp-peft sample with "
            "--class_labels, without --prompt, and an adapter that has classes."
        ) from error
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises these
        raise UserError(f"{str(path)!r} holds no labelled synthetic images ({error}). Run dp-peft sample.") from error
    arrays = [_pixels(row) for row in rows]
    if len({array.shape for array in arrays}) != 1:
        raise UserError(f"{str(path)!r}: the images differ in size or kind, or there are none. Sample them in one go.")
    positions = {str(index): index for index in range(len(class_names))}
    positions |= {name: index for index, name in enumerate(class_names)}
    if unknown := [row for row in rows if str(row.label) not in positions]:
        row, classes = unknown[0], ", ".join(class_names)
        raise UserError(f"{row.place}: label {str(row.label)!r} is none of the classes {classes}. Correct it.")
    return np.stack(arrays), np.array([positions[str(row.label)] for row in rows], np.int64)


def _read_folder(folder: Path) -> Iterator[Row]:
    place = folder / "images" if (folder / "images").is_dir() else folder
    if shards := sorted(place.glob("*.parquet")):
        for shard in shards:
            yield from _read_parquet(shard)
        return
    with open(place / "metadata.csv", newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            for line in lines:
                name, label = line["file_name"], line["label"]
                if not name or not (place / name).is_file():
                    raise UserError(
                        f"{file.name} line {lines.line_num}: there is no image {name!r}. Run dp-peft sample."
                    )
                yield Row(str(place / name), (place / name).read_bytes(), label)
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{file.name} after line {lines.line_num}: {error}. Run dp-peft sample again.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    for number, row in enumerate(pq.read_table(path).to_pylist()):
        image = row["image"]
        yield Row(f"{path} row {number}", image.get("bytes") if isinstance(image, dict) else image, row["label"])


def _pixels(row: Row) -> np.ndarray:
    """(c, h, w) uint8: one channel of what is stored as grey or as black and white, else RGB.

    Raises:
        UserError: there is no image, or none that can be read.
    """
    try:
        if not isinstance(row.image, bytes):
            raise ValueError("no encoded image")
        with Image.open(BytesIO(row.image), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # the header's claim: nothing is allocated yet
                raise ValueError(f"more than {MAX_PIXELS} pixels")
            grey = image.mode in GREY or image.mode.startswith("I")
            return np.atleast_3d(np.asarray(flatten(image, "L" if grey else "RGB"))).transpose(2, 0, 1)
    except Exception as error:  # whatever PIL raises of a broken image
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{row.place} cannot be read as an image ({reason}). Run dp-peft sample again.") from error


def _coverage(size: int, side: int) -> np.ndarray:
    """(side, size): the share that each old pixel has in each new one."""
    edges = np.linspace(0, size, side + 1)[:, None]
    old = np.arange(size)
    overlap = np.minimum(edges[1:], old + 1) - np.maximum(edges[:-1], old)
    return overlap.clip(0) * side / size
