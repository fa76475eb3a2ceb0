"""Small labelled images that a classifier can learn, for tests."""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def make_stripes(n: int, seed: int, classes: int = 3, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """n 8 x 8 images whose class is the pair of rows that is bright, under strong noise; and their classes (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    images = rng.integers(0, 120, (n, channels, 8, 8))
    for index, label in enumerate(labels):
        images[index, :, 2 * label : 2 * label + 2] += 100
    return images.astype(np.uint8), labels


def write_image_folder(folder: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Path:
    """Images (n, 1, h, w) as private images often lie: a sub-folder for each class."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / names[label] / f"{index}.png")
    return folder


def write_sampled_folder(folder: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Path:
    """The same as `dp-peft sample` writes them."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "images" / "metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "label"])
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image[0]).save(folder / "images" / f"{index}.png")
            lines.writerow([f"{index}.png", names[label]])
    return folder


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], **columns: list) -> Path:
    """The same as a parquet file, with further columns."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        encoded = io.BytesIO()
        Image.fromarray(image[0]).save(encoded, "png")
        rows.append({"image": {"bytes": encoded.getvalue(), "path": None}, "label": names[label]})
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    return path
