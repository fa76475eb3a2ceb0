"""Whether samples come too near to training images: nearest neighbours in feature space, against held-out images.

All of it is computed from private images without noise: the guarantee covers none of it. Which training image is whose
neighbour, and its picture, go into a private folder and nowhere else.
"""

import csv
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import PrivacyError, UserError

COPY = 1 / 3  # of the distance to the second nearest image (Gu et al. 2023, arXiv 2310.02664, section 2)
SAME = 1e-5  # of the spread of the images: nearer ones differ by rounding alone
DRAWS = 19_999  # of which images are called training images, for the p-value
PAIRS_SHOWN, PAIRS_IN_A_ROW = 40, 5
LIST_FILE, PICTURE_FILE = "nearest_training_images.csv", "nearest_training_images.png"


@dataclass(frozen=True)
class Nearest:
    """Of each sample the nearest images of a set. Private, where the set is.

    Attributes:
        index: (n,) position of the nearest image.
        distance: (n,) to it.
        second: (n,) to the second nearest that is another image, not the same once more; infinite if there is none.
        same: at this distance or below, two images are one.
    """

    index: np.ndarray
    distance: np.ndarray
    second: np.ndarray
    same: float

    @property
    def copies(self) -> np.ndarray:
        """(n,) bool: the sample is the image, or much nearer to it than to any other."""
        much_nearer = (self.distance < COPY * self.second) & np.isfinite(self.second)
        return much_nearer | (self.distance <= self.same)


@dataclass(frozen=True)
class Neighbours:
    """The nearest training and held-out images of each sample. Private."""

    training: Nearest
    held_out: Nearest

    @property
    def nearness(self) -> np.ndarray:
        """(n,) distance to the nearest training image over that to the nearest held-out one; 0 of a copy."""
        ones = np.ones_like(self.training.distance)
        return np.divide(self.training.distance, self.held_out.distance, out=ones, where=self.held_out.distance > 0)

    def suspects(self, most: int) -> np.ndarray:
        """Positions of the samples that hug a training image most, by `nearness`, the worst first."""
        return np.argsort(self.nearness, kind="stable")[:most]


def compare_neighbours(
    samples: np.ndarray, training: np.ndarray, held_out: np.ndarray, seed: int = 0
) -> tuple[dict[str, Any], Neighbours]:
    """Whether samples are nearer to training images than to held-out images of the same distribution.

    If the samples owe nothing to single training images, training and held-out images could be exchanged: of m and k of
    them, a share m / (m + k) of the samples has its nearest one among the training images (Platzer and Reutterer 2021,
    arXiv 2104.00635). How far the share strays by chance follows from drawing which m of the m + k images are called
    training images, so samples that share a neighbour are not taken for independent; `p_value` comes from such draws,
    as a normal one is far too small where most samples share a few neighbours.

    Args:
        samples: features (n, d), Euclidean distances of which mean something.
        training: (m, d).
        held_out: (k, d), of images that were not trained on.
        seed: of the images that `median_distance_ratio` is computed from, as many of a kind as there are of both, and
            of the draws of the p-value. Public.

    Returns:
        Numbers for JSON, and the neighbours, which are for `write_neighbours` alone. The numbers are not covered by the
        guarantee: `share_nearer_to_training`, its `expected_share`, `z` and one-sided `p_value`;
        `median_distance_ratio`, 1 if all is well and less if samples hug training images; `share_of_copies`, nearer to
        a training image than a third of the distance to the second, or that image itself, and the same share of
        held-out images, which is what chance gives; and counts.

    Raises:
        UserError: there are no samples, fewer than two training or held-out images, or features of other widths.
    """
    if len(samples) == 0 or min(len(training), len(held_out)) < 2:
        raise UserError("nearest neighbours need samples, and two training and two held-out images. Give more images.")
    if len({features.shape[1] for features in (samples, training, held_out)}) != 1:
        raise UserError("samples, training and held-out images have features of different widths. Extract them alike.")
    m, k = len(training), len(held_out)
    found = Neighbours(_nearest(samples, training), _nearest(samples, held_out))
    share, expected = float(np.mean(_in_training(found))), m / (m + k)
    stray = _stray(found, m, k)
    z = (share - expected) / stray if stray > 0 else 0.0  # it cannot stray where all images have equally many samples
    order = np.random.default_rng(seed)
    equal = [features[order.permutation(len(features))[: min(m, k)]] for features in (training, held_out)]
    ratios = Neighbours(*(_nearest(samples, features) for features in equal)).nearness
    numbers = {
        "share_nearer_to_training": share,
        "expected_share": expected,
        "z": float(z),
        "p_value": _p_value(found, m, k, seed),
        "median_distance_ratio": float(np.median(ratios)),
        "share_of_copies": float(np.mean(found.training.copies)),
        "share_of_copies_of_held_out_images": float(np.mean(found.held_out.copies)),
        "num_samples": len(samples),
        "num_training_images": m,
        "num_held_out_images": k,
    }
    return numbers, found


def write_neighbours(
    private_folder: Path, neighbours: Neighbours, samples: np.ndarray, training_images: np.ndarray
) -> tuple[Path, Path]:
    """Write the list of nearest training images and a picture of the nearest pairs into a private folder.

    The list has a line for each sample, the most suspicious first: position of the sample, of its nearest training
    image among those given, both distances. The picture shows the first pairs, the sample on the left.

    Args:
        private_folder: the `NAME.private` of a run, mode 0700.
        neighbours: from `compare_neighbours`.
        samples: (n, c, h, w) uint8, in the order of its features.
        training_images: (m, c, h, w) uint8, in the order of theirs.

    Returns:
        The paths of both files.

    Raises:
        PrivacyError: the folder is not a private one; nothing is written.
        UserError: samples and training images differ in shape.
    """
    check_private(private_folder)
    if samples.shape[1:] != training_images.shape[1:]:
        raise UserError("samples and training images differ in shape. Resize them alike.")
    text, near = io.StringIO(), neighbours.training
    writer = csv.writer(text)
    writer.writerow(["sample", "training_image", "distance", "distance_to_nearest_held_out_image"])
    for i in neighbours.suspects(len(samples)):
        writer.writerow([i, near.index[i], f"{near.distance[i]:.6g}", f"{neighbours.held_out.distance[i]:.6g}"])
    shown = neighbours.suspects(PAIRS_SHOWN)
    pairs = np.stack([samples[shown], training_images[near.index[shown]]], axis=1)  # (p, 2, c, h, w)
    picture = io.BytesIO()
    image_grid(torch.from_numpy(pairs).flatten(0, 1), 2 * PAIRS_IN_A_ROW).save(picture, format="PNG")
    paths = private_folder / LIST_FILE, private_folder / PICTURE_FILE
    for path, content in zip(paths, (text.getvalue().encode(), picture.getvalue()), strict=True):
        write_durably(path, content, 0o600)
    return paths


def check_private(folder: Path) -> None:
    """A folder that nobody else can read, and whose name says that it is never shared.

    Raises:
        PrivacyError: it is another.
    """
    if not folder.name.endswith(".private") or folder.is_symlink() or not folder.is_dir():
        raise PrivacyError(f"{folder} is no private folder: pictures of private images go into a run's NAME.private.")
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        raise PrivacyError(f"{folder} can be read by others. Type: chmod 700 {folder}")


def _nearest(samples: np.ndarray, images: np.ndarray) -> Nearest:
    same = SAME * float(np.sqrt(images.var(axis=0).sum()))
    kept = _distinct(images, same)
    search = NearestNeighbors(n_neighbors=min(2, len(kept)), algorithm="brute").fit(images[kept])
    index = kept[search.kneighbors(samples, return_distance=False)]
    distances = [np.linalg.norm(samples - images[column], axis=1) for column in index.T]  # exact, 0 of a copy
    second = distances[1] if len(kept) > 1 else np.full(len(samples), np.inf)
    return Nearest(index[:, 0], distances[0], second, same)


def _distinct(images: np.ndarray, same: float) -> np.ndarray:
    """Positions of images that repeat none: equal ones have equal projections, and so stand side by side."""
    direction = np.random.default_rng(0).normal(size=images.shape[1])
    projected = images @ (direction / np.linalg.norm(direction))
    order = np.argsort(projected, kind="stable")
    near = np.flatnonzero(np.diff(projected[order]) <= same)
    apart = np.linalg.norm(images[order[near + 1]] - images[order[near]], axis=1) > same
    return np.sort(np.delete(order, near[~apart] + 1))


def _in_training(found: Neighbours) -> np.ndarray:
    """(n,) bool: whether the nearest of all images is a training image."""
    return found.training.distance < found.held_out.distance


def _stray(found: Neighbours, m: int, k: int) -> float:
    """Standard deviation of the share if which m of the m + k images are training images were drawn at random.

    With c_j samples that have image j as their nearest, the share is sum_j c_j s_j / n, s_j in {0, 1} drawn without
    replacement (Cochran 1977, theorem 2.2).
    """
    counts, pool = _counts(found, m, k), m + k
    spread = np.square(counts - counts.mean()).sum()
    return float(np.sqrt(m * k / (pool * (pool - 1)) * spread) / counts.sum())


def _p_value(found: Neighbours, m: int, k: int, seed: int) -> float:
    """The chance of as many samples nearest to training images, by `DRAWS` draws of which images are called so.

    Images with equally many samples are drawn together: how many of them are called training images is hypergeometric.
    """
    counts, images = np.unique(_counts(found, m, k), return_counts=True)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(images, m, size=DRAWS) @ counts
    return float((1 + np.sum(drawn >= _in_training(found).sum())) / (1 + DRAWS))


def _counts(found: Neighbours, m: int, k: int) -> np.ndarray:
    """(m + k,) how many samples have each image, training images first, as their nearest of all."""
    nearest = np.where(_in_training(found), found.training.index, m + found.held_out.index)
    return np.bincount(nearest, minlength=m + k)
