"""Per-example denoising losses; the target is read from the base's own scheduler."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

from dp_peft_diffusion.errors import UserError

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def denoising_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network is asked to predict, shape of `clean`.

    epsilon: the noise (Ho et al. 2020, eq. 14). v: sqrt(abar) noise - sqrt(1 - abar) clean
    (Salimans and Ho 2022, section 4).

    Raises:
        UserError: the scheduler predicts something else.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise UserError(
        f"the base's scheduler has prediction_type {prediction_type!r}; "
        "epsilon and v_prediction are supported. Choose a base with one of these."
    )


def denoising_losses(
    denoise: Denoiser,
    scheduler: DDPMScheduler,
    clean: torch.Tensor,  # (b, c, h, w) in model space, about [-1, 1]
    noise: torch.Tensor,  # (b, K, c, h, w) standard normal
    timesteps: torch.Tensor,  # (b, K) integers in [0, num_train_timesteps)
) -> torch.Tensor:
    """Mean squared denoising error of each example, (b,).

    The K draws are stacked example-major (row i * K + j) and averaged inside the example, before
    any norm (invariant 2; noise multiplicity, Dockhorn et al. 2022, eq. 7).
    """
    b, k = timesteps.shape
    clean_rows = clean.repeat_interleave(k, dim=0)  # (b * K, c, h, w)
    noise_rows, timestep_rows = noise.flatten(0, 1), timesteps.flatten()
    noisy = scheduler.add_noise(clean_rows, noise_rows, timestep_rows)
    target = denoising_target(scheduler, clean_rows, noise_rows, timestep_rows)
    squared = (denoise(noisy, timestep_rows).float() - target.float()).square()  # (b * K, c, h, w)
    return squared.flatten(1).mean(dim=1).view(b, k).mean(dim=1)
