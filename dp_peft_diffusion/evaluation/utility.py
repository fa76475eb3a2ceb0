"""Utility of synthetic images: classifiers trained on them, tested on real images.

The protocol of Ghalebikesabi et al. (arXiv 2302.13861, section 4) and DPDM (2210.09929, section 5): classifiers see no
real image before they are tested, and nothing of them, not even the epoch, is chosen by how the test goes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.classifiers import predict, training_of
from dp_peft_diffusion.evaluation.synthetic_images import load_synthetic, to_side

__all__ = ["NOT_COVERED", "evaluate", "learning_curve", "load_synthetic", "reference", "to_side"]
DEFAULT_CLASSIFIERS = ("logistic_regression", "cnn")
NOT_COVERED = (
    "These numbers were computed from real private images without noise: the privacy guarantee of the "
    "synthetic images does not cover them. Publish them only if every real image that they were computed from may be "
    "published: those they were tested on, and the training images where something looks at these."
)


def evaluate(
    synthetic_images: np.ndarray,  # (n, c, h, w) uint8
    synthetic_labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8
    real_labels: np.ndarray,  # (m,) class indices
    *,
    declared_public: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """How many real images are classified right by classifiers trained on synthetic ones.

    Args:
        synthetic_images: to train on.
        synthetic_labels: their classes.
        real_images: to test on, once.
        real_labels: their classes.
        declared_public: the real images need no protection.
        how: as of `train_and_test`.

    Returns:
        What `train_and_test` gives, the counts of images, and, unless the real images are declared public,
        `covered_by_guarantee` False and a `statement`: every number tells of the real images.

    Raises:
        UserError: images of other shapes, no real images, synthetic ones of a single class, or no such classifier.
    """
    result = train_and_test(synthetic_images, synthetic_labels, real_images, real_labels, **how)
    result |= {"num_synthetic_images": len(synthetic_images), "num_real_images": len(real_images)}
    if not declared_public:
        result |= {"covered_by_guarantee": False, "statement": NOT_COVERED}
    return result


def reference(
    training_images: np.ndarray,  # (n, c, h, w) uint8
    training_labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8, none of them a training image
    real_labels: np.ndarray,  # (m,) class indices
    **how: Any,
) -> dict[str, Any]:
    """The same classifiers trained on real images: what synthetic ones are measured against.

    The guarantee covers neither the numbers nor the classifiers, which saw private images without any noise.

    Returns:
        What `train_and_test` gives, and the counts of images.

    Raises:
        UserError: as of `evaluate`.
    """
    result = train_and_test(training_images, training_labels, real_images, real_labels, **how)
    return result | {"num_training_images": len(training_images), "num_real_images": len(real_images)}


def learning_curve(
    synthetic_images: np.ndarray,  # (n, c, h, w) uint8
    synthetic_labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8
    real_labels: np.ndarray,  # (m,) class indices
    *,
    sizes: Sequence[int] = (),
    **how: Any,
) -> list[dict[str, Any]]:
    """`train_and_test` on more and more synthetic images: does sampling more of them still help?

    Each point trains on all images of the point before and on further ones, all classes alike, in the order they were
    sampled in. Epochs are the same everywhere, so steps grow with the images. The last point, of all images, is what
    `evaluate` gives. The guarantee does not cover these numbers, unless the real images are public.

    Args:
        synthetic_images: to train on.
        synthetic_labels: their classes.
        real_images: to test on.
        real_labels: their classes.
        sizes: numbers of synthetic images; empty: n, n / 2, n / 4, ... down to ten for each class.
        how: as of `train_and_test`.

    Returns:
        For each size, the smallest first, what `train_and_test` gives, with `num_synthetic_images`.

    Raises:
        UserError: a size that there are no images for, or as of `evaluate`.
    """
    order = balanced_order(synthetic_labels)
    sizes = sorted(set(sizes)) or geometric_sizes(len(order), len(np.unique(synthetic_labels)))
    if not 2 <= sizes[0] <= sizes[-1] <= len(order):
        raise UserError(f"A learning curve of {len(order)} images has points from 2 to {len(order)}, not {sizes}.")
    points = []
    for size in sizes:
        chosen = np.sort(order[:size])
        result = train_and_test(synthetic_images[chosen], synthetic_labels[chosen], real_images, real_labels, **how)
        points.append({"num_synthetic_images": size, **result})
    return points


def train_and_test(
    images: np.ndarray,  # (n, c, h, w) uint8
    labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8
    real_labels: np.ndarray,  # (m,) class indices
    *,
    classifiers: Sequence[str] = DEFAULT_CLASSIFIERS,
    seed: int = 0,
    num_seeds: int = 1,
    ensemble: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Train classifiers on `images`, once for each seed, and test them on real images.

    Args:
        images: to train on.
        labels: their classes.
        real_images: to test on.
        real_labels: their classes.
        classifiers: names from `classifiers.NAMES`.
        seed: the first of the seeds.
        num_seeds: how many seeds, one after the other.
        ensemble: nets that vote, for each seed.
        changes: fields of `classifiers.Training` that are not to be as each protocol has them.

    Returns:
        For each classifier what `scores` gives and `training`, how it trained (None: no epochs); `seed`, `num_seeds`
        and `ensemble`.

    Raises:
        UserError: images of other shapes, no real images, training images of a single class, no such classifier, or a
            number out of range.
    """
    check_images(images, labels, real_images)
    if num_seeds < 1:
        raise UserError(f"num_seeds is {num_seeds}. Choose 1 or more.")
    trainings = {name: training_of(name, **changes) for name in classifiers}  # a wrong name, before anything trains
    result: dict[str, Any] = {}
    for name, training in trainings.items():
        seeds = range(seed, seed + num_seeds) if training else [seed]  # logistic regression draws nothing
        predictions = [
            predict(name, images, labels, real_images, seed=each, ensemble=ensemble, **changes) for each in seeds
        ]
        result[name] = scores(predictions, real_labels) | {"training": asdict(training) if training else None}
    return result | {"seed": seed, "num_seeds": num_seeds, "ensemble": ensemble}


def scores(predictions: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """How well predictions (m,), one array for each seed, agree with labels (m,).

    Returns:
        `accuracy`, the mean over the seeds; `accuracies`; `accuracy_stddev` over the seeds, None for a single one;
        `test_standard_error`, of the accuracy as an estimate from m images; `per_class_accuracy` by class index, the
        mean over the seeds; `confusion`, counts over all seeds, of real classes (rows) taken for others (columns).
    """
    right = np.stack(predictions) == labels  # (seeds, m)
    accuracy, accuracies = float(right.mean()), right.mean(axis=1)
    classes = range(int(max(labels.max(), *(one.max() for one in predictions))) + 1)
    return {
        "accuracy": accuracy,
        "accuracies": accuracies.tolist(),
        "accuracy_stddev": float(accuracies.std(ddof=1)) if len(predictions) > 1 else None,
        "test_standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(labels))),
        "per_class_accuracy": {int(label): float(right[:, labels == label].mean()) for label in np.unique(labels)},
        "confusion": np.sum([confusion_matrix(labels, one, labels=classes) for one in predictions], axis=0).tolist(),
    }


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """(n,): how many images of its class stand before each image."""
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        (positions,) = np.nonzero(labels == label)
        ranks[positions] = np.arange(len(positions))
    return ranks


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Positions (n,) in which classes take turns, each in its own order: every start of it is as balanced as can be."""
    return np.argsort(rank_in_class(labels), kind="stable")


def geometric_sizes(num_images: int, num_classes: int) -> list[int]:
    """num_images, its half, its quarter ..., while that is ten or more for each class; the smallest first."""
    sizes = [num_images]
    while sizes[0] // 2 >= 10 * num_classes:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def check_images(images: np.ndarray, labels: np.ndarray, real_images: np.ndarray) -> None:
    """Whether `images` (n, c, h, w) of classes `labels` can be trained on and `real_images` tested on.

    Raises:
        UserError: images of other shapes, no real images, or training images of a single class.
    """
    if images.shape[1:] != real_images.shape[1:]:
        shapes = " and ".join("x".join(map(str, array.shape[1:])) for array in (images, real_images))
        raise UserError(f"synthetic and real images differ in shape: {shapes}. Set --evaluation_resolution.")
    if len(real_images) == 0 or len(np.unique(labels)) < 2:
        raise UserError("there must be real images, and synthetic ones of at least two classes. Sample more.")
