"""Small labelled images that a classifier can learn, for tests."""

import numpy as np


def make_stripes(n: int, seed: int, classes: int = 3, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """n 8 x 8 images whose class is the pair of rows that is bright, under strong noise; and their classes (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    images = rng.integers(0, 120, (n, channels, 8, 8))
    for index, label in enumerate(labels):
        images[index, :, 2 * label : 2 * label + 2] += 100
    return images.astype(np.uint8), labels
