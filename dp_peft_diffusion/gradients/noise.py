"""The Gaussian noise of one step."""

import math

import torch

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.gradients.functional import Gradients
from dp_peft_diffusion.privacy.randomness import Purpose, generator

SUMMANDS = 4


def add_noise(total: Gradients, noise_stddev: float, key: bytes, step: int) -> Gradients:
    """Add N(0, noise_stddev^2) to every number of a clipped sum; once for each logical step (invariant 7).

    One stream for each step, read in the order of `total`; added in float64, cast to float32 once. Each number is the
    sum of 4 normals over 2 (Holohan and Braghin 2021, arXiv 2107.10138): the doubles that one normal can take have
    gaps, which can tell what it was added to; nobody can list the sums of four.

    Args:
        total: {name: clipped sum float64}, summed over all micro-batches of the step.
        noise_stddev: noise_multiplier * max_grad_norm (invariant 11), of the sum, not of a mean.
        key: the run's secret key.
        step: number of the step.

    Returns:
        {name: noisy sum float32}, same shapes and devices.

    Raises:
        PrivacyError: `noise_stddev` is not a finite number above 0.
    """
    if not (math.isfinite(noise_stddev) and noise_stddev > 0):
        raise PrivacyError(f"noise_stddev {noise_stddev} gives no privacy; it must be a finite number above 0.")
    stream = generator(key, Purpose.NOISE, step)
    noisy = {}
    for name, tensor in total.items():
        normal = sum(stream.standard_normal(tuple(tensor.shape)) for _ in range(SUMMANDS)) / math.sqrt(SUMMANDS)
        noise = torch.as_tensor(noise_stddev * normal, dtype=torch.float64)
        noisy[name] = (tensor.double() + noise.to(tensor.device)).float()
    return noisy
