"""What one example draws in one step: keyed by (purpose, step, example id), never by its place in a batch."""

import numpy as np
import torch

from dp_peft_diffusion.privacy.randomness import Purpose, generator


def draw_timesteps(key: bytes, step: int, ids: np.ndarray, draws: int, num_timesteps: int) -> torch.Tensor:
    """Timesteps (b, K), uniform, spread evenly over the K draws of one example.

    Draw j falls into the j-th of K equal parts of [0, num_timesteps): less variance inside the
    example, and no example knows of another (invariant 9).
    """
    uniform = np.stack([generator(key, Purpose.TIMESTEP, step, int(i)).random(draws) for i in ids])
    return torch.from_numpy(((np.arange(draws) + uniform) / draws * num_timesteps).astype(np.int64))


def draw_noise(key: bytes, step: int, ids: np.ndarray, draws: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (b, K, *shape), float32."""
    parts = [
        generator(key, Purpose.DIFFUSION_NOISE, step, int(i)).standard_normal((draws, *shape), dtype=np.float32)
        for i in ids
    ]
    return torch.from_numpy(np.stack(parts))


def draw_dropped_labels(key: bytes, step: int, ids: np.ndarray, draws: int, label_dropout: float) -> torch.Tensor:
    """Which draws see no label, (b, K) bool (Ho and Salimans 2022, algorithm 1)."""
    uniform = np.stack([generator(key, Purpose.LABEL_DROPOUT, step, int(i)).random(draws) for i in ids])
    return torch.from_numpy(uniform < label_dropout)
