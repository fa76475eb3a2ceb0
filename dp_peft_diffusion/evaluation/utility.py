"""Utility of synthetic images: classifiers trained on them, tested on real images.

The protocol of Ghalebikesabi et al. (arXiv 2302.13861, section 4) and DPDM (2210.09929, section 5): logistic
regression and a small convolutional net see no real image before they are tested.
"""

import csv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from dp_peft_diffusion.errors import UserError

EPOCHS = 20
LEARNING_RATE = 3e-3
BATCH = 100
NOT_COVERED = (
    "These numbers were computed from real private images without noise: the privacy guarantee of the "
    "synthetic images does not cover them. Publish them only if the images they were tested on may be published."
)


def evaluate(
    synthetic_images: np.ndarray,  # (n, c, h, w) uint8
    synthetic_labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8
    real_labels: np.ndarray,  # (m,) class indices
    *,
    seed: int = 0,
    declared_public: bool = False,
) -> dict:
    """Accuracy on real images of a logistic regression and a small CNN trained on synthetic ones.

    Returns, for each of `logistic_regression` and `cnn`, `accuracy` and `per_class_accuracy` (by class index); the
    counts of images; and, unless the real images are declared public, `covered_by_guarantee` False and a `statement`.

    Raises:
        UserError: images of other shapes, no real images, or synthetic ones of a single class.
    """
    if synthetic_images.shape[1:] != real_images.shape[1:]:
        shapes = " and ".join("x".join(map(str, images.shape[1:])) for images in (synthetic_images, real_images))
        raise UserError(f"synthetic and real images differ in shape: {shapes}. Set --evaluation_resolution.")
    if len(real_images) == 0 or len(set(synthetic_labels.tolist())) < 2:
        raise UserError("there must be real images, and synthetic ones of at least two classes. Sample more.")
    predictions = {
        "logistic_regression": _logistic_regression(synthetic_images, synthetic_labels, real_images),
        "cnn": _cnn(synthetic_images, synthetic_labels, real_images, seed),
    }
    result: dict = {name: _accuracies(predicted, real_labels) for name, predicted in predictions.items()}
    result |= {"num_synthetic_images": len(synthetic_images), "num_real_images": len(real_images), "seed": seed}
    if not declared_public:
        result |= {"covered_by_guarantee": False, "statement": NOT_COVERED}
    return result


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


def _accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict:
    right = predicted == labels
    per_class = {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    return {"accuracy": float(right.mean()), "per_class_accuracy": per_class}


def _logistic_regression(images: np.ndarray, labels: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], not standardised: a pixel almost constant in synthetic images must not explode in real ones."""
    flat, flat_tested = (x.reshape(len(x), -1) / 255 for x in (images, tested))
    return LogisticRegression(max_iter=1000).fit(flat, labels).predict(flat_tested)


def _cnn(images: np.ndarray, labels: np.ndarray, tested: np.ndarray, seed: int) -> np.ndarray:
    """Two convolutions and two linear layers, Adam, `EPOCHS` epochs of images shifted by a few pixels."""
    inputs, targets = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _make_cnn(inputs.shape[1:], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(net(_shift(inputs[batch], generator)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        chunks = (torch.from_numpy(tested).float() / 127.5 - 1).split(500)
        return torch.cat([net(chunk).argmax(dim=1) for chunk in chunks]).numpy()


def _make_cnn(shape: torch.Size, num_classes: int) -> nn.Sequential:
    c, h, w = shape
    return nn.Sequential(
        nn.Conv2d(c, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(32 * -(-h // 4) * -(-w // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by its own few pixels, at most a sixteenth of its side; edges repeat."""
    b, _, h, w = images.shape
    most = min(h, w) // 16
    down, right = torch.randint(-most, most + 1, (2, b, 1), generator=generator)
    rows = (torch.arange(h) + down).clamp(0, h - 1)
    columns = (torch.arange(w) + right).clamp(0, w - 1)
    moved = images[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
