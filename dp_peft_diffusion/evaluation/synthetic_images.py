"""Synthetic images with their classes, read from files and brought to the size that classifiers see."""

import csv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dp_peft_diffusion.errors import UserError


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
        UserError: no such files, labels that are no classes, or images that differ in shape.
    """
    try:
        rows = _read_folder(path) if path.is_dir() else _read_parquet(path)
        arrays = [np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image, _ in rows]
    except KeyError as error:
        raise UserError(
            f"the images of {str(path)!r} have no {error}. Classifiers need a class for each: type dp-peft sample with "
            "--class_labels, without --prompt, and an adapter that has classes."
        ) from error
    except (OSError, ValueError) as error:  # PIL, pyarrow and csv raise these
        raise UserError(f"{str(path)!r} holds no labelled synthetic images ({error}). Run dp-peft sample.") from error
    if len({(array.shape, array.dtype) for array in arrays}) != 1:
        raise UserError(f"{str(path)!r}: the images differ in size or kind, or there are none. Sample them in one go.")
    positions = {str(index): index for index in range(len(class_names))}
    positions |= {name: index for index, name in enumerate(class_names)}
    if unknown := sorted({str(label) for _, label in rows} - set(positions)):
        raise UserError(f"{str(path)!r}: label {unknown[0]!r} is none of the classes {', '.join(class_names)}.")
    return np.stack(arrays), np.array([positions[str(label)] for _, label in rows], np.int64)


def _read_folder(folder: Path) -> list[tuple[Image.Image, str | int]]:
    place = folder / "images" if (folder / "images").is_dir() else folder
    if shards := sorted(place.glob("*.parquet")):
        return [row for shard in shards for row in _read_parquet(shard)]
    with open(place / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(Image.open(BytesIO((place / row["file_name"]).read_bytes())), row["label"]) for row in rows]


def _read_parquet(path: Path) -> list[tuple[Image.Image, str | int]]:
    rows = pq.read_table(path).to_pylist()
    return [(Image.open(BytesIO(row["image"]["bytes"])), row["label"]) for row in rows]


def _coverage(size: int, side: int) -> np.ndarray:
    """(side, size): the share that each old pixel has in each new one."""
    edges = np.linspace(0, size, side + 1)[:, None]
    old = np.arange(size)
    overlap = np.minimum(edges[1:], old + 1) - np.maximum(edges[:-1], old)
    return overlap.clip(0) * side / size
