"""How well the Gaussians that `code_moments` releases tell MNIST's classes apart by their codes: a table of results.md.

    python docs/scripts/code_gaussians.py --mnist FOLDER       # with train.parquet and validation.parquet

No image is drawn. Noise comes from a public seed, so what this prints is no release: MNIST plays private data.
"""

import argparse
import math
from pathlib import Path

import torch

from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.code_moments import BELOW_BOUND, WEIGHTS, gaussians_of, log_densities, statistics
from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import Data

EPSILONS = (None, 10.0, 1.0, 0.2)
CLASSES, BATCH = 10, 500


@torch.no_grad()
def codes_of(file: Path, base: BaseModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n, d) and classes (n,) of the images in a parquet file."""
    images = open_examples(Data(dataset_name=str(file)), base, None, 0)
    assert base.codes is not None
    codes, labels = [], []
    for ids in torch.arange(len(images)).split(BATCH):
        examples = images.read(ids.numpy())
        codes.append(base.codes(examples.clean[:, 0]).double())
        labels.append(examples.labels)
    return torch.cat(codes), torch.cat(labels)


def noise_multiplier(epsilon: float | None, count: int) -> float:
    """Of one sum over all images."""
    if epsilon is None:
        return 0.0
    mechanism = DPMechanism(sampling_prob=1.0, steps=1, expected_batch_size=count, num_examples=count)
    return mechanism.calibrate(epsilon, 1e-5).noise_multiplier or 0.0


def accuracies(train: tuple[torch.Tensor, torch.Tensor], held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Print the share of held-out images told right, for each epsilon."""
    scale = BELOW_BOUND / math.hypot(*WEIGHTS)
    weights = tuple(scale * weight for weight in WEIGHTS)
    exact = torch.zeros(CLASSES, statistics(train[0][:1], weights).shape[1], dtype=torch.float64)
    for codes, labels in zip(train[0].split(BATCH), train[1].split(BATCH), strict=True):
        exact.index_add_(0, labels, statistics(codes, weights))
    for epsilon in EPSILONS:
        stddev = noise_multiplier(epsilon, len(train[0]))
        generator = torch.Generator().manual_seed(0)
        noisy = exact + stddev * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        gaussians = gaussians_of(noisy / len(train[0]), weights, stddev / len(train[0]))
        right = (log_densities(held_out[0], *gaussians).argmax(dim=1) == held_out[1]).double().mean()
        print(f"epsilon {epsilon or 'none'}: {100 * right:.1f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mnist", type=Path, required=True)
    folder = parser.parse_args().mnist
    shipped = load_base("builtin:handwriting_codes")
    accuracies(*(codes_of(folder / f"{part}.parquet", shipped) for part in ("train", "validation")))
