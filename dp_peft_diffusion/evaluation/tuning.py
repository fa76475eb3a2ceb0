"""Hyper-parameters of a classifier, chosen on synthetic images, against the choice that real ones would have made.

The claim of Ghalebikesabi et al. (arXiv 2302.13861): whoever has the synthetic images can tune on them. Such a choice
is post-processing and costs no privacy. What this module adds to show it, every number with "real" in its name and
the agreements, is computed from real images: the guarantee does not cover it, unless they are public.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from dp_peft_diffusion.evaluation.classifier_nets import small_cnn
from dp_peft_diffusion.evaluation.classifiers import PROTOCOLS, probabilities
from dp_peft_diffusion.evaluation.utility import check_images, rank_in_class

VALIDATION_EVERY = 5


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of the small CNN; `width` is the channels of its first convolution."""

    epochs: int
    width: int
    learning_rate: float


# From cheap to costly: of settings that score the same, the first is chosen.
SETTINGS = tuple(
    Setting(epochs, width, learning_rate)
    for epochs in (5, 20)
    for width in (8, 32)
    for learning_rate in (3e-4, 1e-3, 1e-2)
)


def tune(
    synthetic_images: np.ndarray,  # (n, c, h, w) uint8
    synthetic_labels: np.ndarray,  # (n,) class indices
    real_images: np.ndarray,  # (m, c, h, w) uint8
    real_labels: np.ndarray,  # (m,) class indices
    *,
    settings: Sequence[Setting] = SETTINGS,
    seed: int = 0,
    num_seeds: int = 1,
) -> dict[str, Any]:
    """Train every setting on synthetic images, and score it on synthetic and on real ones that it did not see.

    Every fifth synthetic image of each class is held out for the score; the others are trained on.

    Args:
        synthetic_images: to train on and to choose on.
        synthetic_labels: their classes.
        real_images: to show the agreement on. They do not enter the choice.
        real_labels: their classes.
        settings: the grid.
        seed: the first of the seeds.
        num_seeds: how many seeds, one after the other; a setting's scores are their means.

    Returns:
        What `agreement` gives; `settings`, the grid as dicts with `synthetic_accuracy` and `real_accuracy` (the points
        of a plot); `chosen_setting` and `best_real_setting`; the counts of images; `seed` and `num_seeds`.
        `chosen_setting` alone is covered by the guarantee.

    Raises:
        UserError: images of other shapes, no real images, or fewer than two classes with five synthetic images.
    """
    held_out = rank_in_class(synthetic_labels) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    check_images(synthetic_images, synthetic_labels[held_out], real_images)
    images, labels = synthetic_images[~held_out], synthetic_labels[~held_out]
    tested_images = np.concatenate([synthetic_images[held_out], real_images])
    tested_labels = np.concatenate([synthetic_labels[held_out], real_labels])
    scores = np.zeros((len(settings), 2))  # on synthetic, on real images
    for row, setting in enumerate(settings):
        training = replace(PROTOCOLS["cnn"], epochs=setting.epochs, learning_rate=setting.learning_rate)
        make_net = partial(small_cnn, width=setting.width)
        for each in range(seed, seed + num_seeds):
            found = probabilities(make_net, training, images, labels, tested_images, seed=each)
            right = found.argmax(axis=1) == tested_labels
            scores[row] += [part.mean() / num_seeds for part in np.split(right, [held_out.sum()])]
    synthetic_accuracies, real_accuracies = scores.T
    found_settings = [
        asdict(setting) | {"synthetic_accuracy": float(synthetic), "real_accuracy": float(real)}
        for setting, synthetic, real in zip(settings, synthetic_accuracies, real_accuracies, strict=True)
    ]
    return agreement(synthetic_accuracies, real_accuracies) | {
        "settings": found_settings,
        "chosen_setting": asdict(settings[int(synthetic_accuracies.argmax())]),
        "best_real_setting": asdict(settings[int(real_accuracies.argmax())]),
        "num_training_images": len(images),
        "num_validation_images": int(held_out.sum()),
        "num_real_images": len(real_images),
        "seed": seed,
        "num_seeds": num_seeds,
    }


def agreement(synthetic_scores: np.ndarray, real_scores: np.ndarray) -> dict[str, Any]:
    """Whether a choice by synthetic scores (s,) is as good as one by real scores (s,), of the same s settings.

    Of settings with equal synthetic scores the first is chosen, whatever it scores on real images. The best real score
    is the highest of s on the very images that it is reported on: it flatters that choice, so `accuracy_lost` errs on
    the high side.

    Returns:
        `num_settings`; `spearman` and `kendall` (tau-b: ties count neither way), each from -1 to 1, None where one side
        scores all settings the same; `real_accuracy_of_choice`, `best_real_accuracy` and `accuracy_lost` between them;
        `num_tied_for_choice`, settings that share the best synthetic score. All are computed from real images.
    """
    ranked = np.ptp(synthetic_scores) > 0 and np.ptp(real_scores) > 0
    chosen, best = float(real_scores[synthetic_scores.argmax()]), float(real_scores.max())
    return {
        "num_settings": len(synthetic_scores),
        "spearman": float(spearmanr(synthetic_scores, real_scores).statistic) if ranked else None,
        "kendall": float(kendalltau(synthetic_scores, real_scores).statistic) if ranked else None,
        "real_accuracy_of_choice": chosen,
        "best_real_accuracy": best,
        "accuracy_lost": best - chosen,
        "num_tied_for_choice": int((synthetic_scores == synthetic_scores.max()).sum()),
    }
