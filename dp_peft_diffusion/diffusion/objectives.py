"""Per-example denoising losses, matched to the noise schedule of the base.

Whatever a network predicts, its input and its target are each a mix of the clean image x and the noise n. One row of a
batch therefore needs six numbers, and an objective is the formula that gives them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from dp_peft_diffusion.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]  # (network input (n, c, h, w), times (n,)) -> output (n, c, h, w)


class Mix(NamedTuple):
    """Of each row, (n,): the network sees `x_in * x + n_in * n` at `time` and should answer `x_out * x + n_out * n`."""

    x_in: Tensor
    n_in: Tensor
    x_out: Tensor
    n_out: Tensor
    time: Tensor
    weight: Tensor  # of the squared error


class Objective(ABC):
    """What the network is asked to predict, and how an error counts."""

    @property
    @abstractmethod
    def num_timesteps(self) -> int | None:
        """Timesteps of the schedule; None where noise levels are continuous."""

    @abstractmethod
    def mix(self, levels: Tensor) -> Mix:
        """Noise levels (n,) -> the numbers of each row."""

    def losses(self, predict: Predict, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Weighted mean squared error of each example, (b,).

        The rows of an example are averaged inside it, before any norm (invariant 2; noise multiplicity, Dockhorn et al.
        2022, eq. 7; augmentation multiplicity, De et al. 2022).

        Args:
            predict: the network.
            clean: (b, A, c, h, w), A changed versions of each example, in the network's space.
            noise: (b, A * K, c, h, w) standard normal; row v * K + j is noise draw j of version v.
            levels: (b, A * K) timesteps, or noise levels sigma where these are continuous.
        """
        b, rows = levels.shape
        x = clean.repeat_interleave(rows // clean.shape[1], dim=1).flatten(0, 1)  # (b * A * K, c, h, w)
        n = noise.flatten(0, 1)
        x_in, n_in, x_out, n_out, time, weight = self.mix(levels.flatten())
        output = predict(_scale(x_in, x) + _scale(n_in, n), time)
        squared = (output.float() - (_scale(x_out, x) + _scale(n_out, n))).square()
        return (weight * squared.flatten(1).mean(dim=1)).view(b, rows).mean(dim=1)


@dataclass(frozen=True)
class Discrete(Objective):
    """Timesteps of a variance-preserving schedule: the network sees sqrt(abar) x + sqrt(1 - abar) n.

    alphas_cumprod: abar of each timestep, (T,) float32 (Ho et al. 2020, eq. 4).
    prediction_type: "epsilon", the noise n (Ho et al. 2020, eq. 14), or "v_prediction", the velocity
        sqrt(abar) n - sqrt(1 - abar) x (Salimans and Ho 2022, section 4).
    snr_gamma: an error of x counts min(SNR, snr_gamma) with SNR = abar / (1 - abar) (Hang et al. 2023, arXiv
        2303.09556); None: every error of the prediction counts 1.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    snr_gamma: float | None = None

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def log_sigmas(self) -> np.ndarray:
        """Log of noise over signal, sqrt((1 - abar) / abar), of each timestep, (T,) float64; inf where SNR is 0."""
        abar = self.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):
            return (np.log1p(-abar) - np.log(abar)) / 2

    def mix(self, levels: Tensor) -> Mix:
        """Timesteps (n,) integers -> the numbers of each row."""
        abar = self.alphas_cumprod.to(levels.device)[levels]
        signal, spread = abar.sqrt(), (1 - abar).sqrt()
        weight = torch.ones_like(abar)
        if self.snr_gamma is not None:  # min(SNR, gamma) / (SNR + 1), without a division by an SNR of 0
            weight = torch.minimum(abar, self.snr_gamma * (1 - abar))
        if self.prediction_type == "v_prediction":
            return Mix(signal, spread, -spread, signal, levels, weight)
        if self.snr_gamma is not None:
            weight = weight / abar  # min(SNR, gamma) / SNR
        return Mix(signal, spread, torch.zeros_like(abar), torch.ones_like(abar), levels, weight)


@dataclass(frozen=True)
class Edm(Objective):
    """Continuous noise levels sigma (Karras et al. 2022, arXiv 2206.00364, table 1 and section 5).

    With y = x + sigma n, the network F sees c_in y at c_noise = ln(sigma) / 4 and makes the denoiser D = c_skip y +
    c_out F. The loss lambda |D - x|^2 with lambda = 1 / c_out^2 is |F - target|^2 with target = (x - c_skip y) / c_out,
    in which the small differences and the division cancel on paper.

    sigma_data: standard deviation of clean data, of the base's config and never of private images.
    sign: of c_out; -1 where diffusers' config says v_prediction.
    """

    sigma_data: float
    sign: int = 1

    @property
    def num_timesteps(self) -> None:
        """None: sigma is any number above 0."""

    def mix(self, levels: Tensor) -> Mix:
        """Noise levels sigma (n,) float32 -> the numbers of each row."""
        c_in = (levels**2 + self.sigma_data**2).rsqrt()
        x_out = self.sign * c_in * levels / self.sigma_data  # (1 - c_skip) / c_out
        n_out = -self.sign * c_in * self.sigma_data  # -c_skip sigma / c_out
        return Mix(c_in, c_in * levels, x_out, n_out, levels.log() / 4, torch.ones_like(levels))


def make_objective(scheduler: SchedulerMixin, snr_gamma: float | None = None) -> Objective:
    """The objective that the base's training noise schedule asks for.

    Args:
        scheduler: of the base; EDM's, or any that has timesteps with alphas.
        snr_gamma: cap of the signal-to-noise weight; None: no weight.

    Raises:
        UserError: the schedule has no such objective, or does not go with the weight.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if isinstance(scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler):
        if snr_gamma is not None:
            raise UserError(
                "--snr_gamma (train.snr_gamma in a recipe) weights timesteps, and this base has continuous noise "
                "levels with the weight of EDM. Leave it out."
            )
        return Edm(config.sigma_data, -1 if config.prediction_type == "v_prediction" else 1)
    if name not in KarrasDiffusionSchedulers.__members__:
        raise UserError(f"the base's noise schedule is a {name}, which has no alphas. Choose another base.")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base's scheduler has prediction_type {config.prediction_type!r}; "
            "epsilon, v_prediction and those of EDM are supported. Choose a base with one of these."
        )
    schedule = DDPMScheduler.from_config(config)
    if schedule.config.variance_type in ("learned", "learned_range"):
        raise UserError(
            f"the base's scheduler has variance_type {schedule.config.variance_type!r}, so its network also predicts "
            "a variance, for which there is no loss here. Choose a base with a fixed variance."
        )
    if config.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise UserError(
            "the base's last timestep is noise alone (rescale_betas_zero_snr), where predicting the noise teaches "
            "nothing. Choose a base with prediction_type v_prediction."
        )
    return Discrete(schedule.alphas_cumprod, config.prediction_type, snr_gamma)


def _scale(factors: Tensor, rows: Tensor) -> Tensor:
    """(n,) times (n, c, h, w)."""
    return factors.view(-1, 1, 1, 1) * rows
