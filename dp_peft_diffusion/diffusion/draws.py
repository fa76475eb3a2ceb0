"""What one example draws in one step: keyed by (purpose, step, example id), never by its place in a batch.

Draws come in rows: K noise draws for each of A changed versions of the example, version by version.
"""

import numpy as np
import torch

from dp_peft_diffusion.diffusion.noise_levels import LevelQuantile
from dp_peft_diffusion.privacy.randomness import Purpose, generator


def draw_levels(
    key: bytes, step: int, ids: np.ndarray, draws: int, views: int, quantile: LevelQuantile
) -> torch.Tensor:
    """Noise levels (b, A * K), spread evenly over the K draws of one version.

    Draw j falls into the j-th of K parts of equal chance: less variance inside the example, and no example knows of
    another (invariant 9). quantile: from `level_quantile`.
    """
    uniform = np.stack([generator(key, Purpose.TIMESTEP, step, int(i)).random((views, draws)) for i in ids])
    spread = (np.arange(draws) + uniform) / draws  # (b, A, K)
    below_one = spread.clip(max=np.nextafter(1, 0))  # K - 1 + a number just below 1 rounds to K
    return torch.from_numpy(quantile(below_one.reshape(len(ids), views * draws)))


def draw_noise(key: bytes, step: int, ids: np.ndarray, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (b, rows, *shape), float32."""
    parts = [
        generator(key, Purpose.DIFFUSION_NOISE, step, int(i)).standard_normal((rows, *shape), dtype=np.float32)
        for i in ids
    ]
    return torch.from_numpy(np.stack(parts))


def draw_dropped_labels(key: bytes, step: int, ids: np.ndarray, rows: int, label_dropout: float) -> torch.Tensor:
    """Which rows see no label, (b, rows) bool (Ho and Salimans 2022, algorithm 1)."""
    uniform = np.stack([generator(key, Purpose.LABEL_DROPOUT, step, int(i)).random(rows) for i in ids])
    return torch.from_numpy(uniform < label_dropout)


def draw_variants(key: bytes, step: int, ids: np.ndarray, views: int, num_variants: int) -> torch.Tensor:
    """Which of the cached variants each version of an example is, (b, A) int64 in [0, num_variants).

    Each variant is as likely as any other; none comes twice before all have come once.
    """
    orders = [generator(key, Purpose.AUGMENTATION, step, int(i)).permutation(num_variants) for i in ids]
    return torch.from_numpy(np.stack([np.resize(order, views) for order in orders]))
