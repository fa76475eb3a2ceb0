"""The table of docs/explanation/fidelity.md: what the numbers of two halves of real images become when one is spoiled.

    python docs/scripts/fidelity.py IMAGES                 # a folder or parquet files with labels
    python docs/scripts/fidelity.py IMAGES --features clip

No guarantee covers these numbers: only for images that are public.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.evaluation.features import open_features
from dp_peft_diffusion.evaluation.fidelity import fidelity
from dp_peft_diffusion.recipe import Data

SIDE = 32
MEASURES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


def spoiled(images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """What is done to the second half -> the images (m, c, h, w) uint8."""
    noise = np.random.default_rng(0).normal(size=images.shape)

    def noisy(stddev: float) -> np.ndarray:
        return (images + stddev * noise).clip(0, 255).astype(np.uint8)

    def blurred(stddev: float) -> np.ndarray:
        return gaussian_filter(images.astype(float), (0, 0, stddev, stddev)).round().astype(np.uint8)

    def without(classes: int) -> np.ndarray:
        return images[labels >= classes]

    rows: dict[str, Callable[[], np.ndarray]] = {"nothing": lambda: images}
    rows |= {f"noise of {stddev} grey levels": lambda s=stddev: noisy(s) for stddev in (10, 20, 40, 80)}
    rows |= {f"blur of {stddev} pixel{'s' * (stddev > 1)}": lambda s=stddev: blurred(s) for stddev in (0.5, 1, 2)}
    return rows | {f"the first {n} class{'es' * (n > 1)} left out": lambda n=n: without(n) for n in (1, 3, 5)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--features", default="handwriting")
    given = parser.parse_args()
    pixels = PixelEncoder(resolution=SIDE, image_channels=1)
    images, labels = open_examples(Data(dataset_name=given.images), pixels, None).valid_arrays()
    order = np.random.default_rng(0).permutation(len(images))
    first, second = np.array_split(order, 2)
    features = open_features(given.features)
    print(f"| done to the second half | {' | '.join(name.replace('_', ' ') for name in MEASURES)} |")
    print(f"|---|{'---|' * len(MEASURES)}")
    for title, make in spoiled(images[second], labels[second]).items():
        found = fidelity(features, images[first], make())
        print(f"| {title} | {' | '.join(f'{found[measure]:.3f}' for measure in MEASURES)} |", flush=True)


if __name__ == "__main__":
    main()
