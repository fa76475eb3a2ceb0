"""How often each noise level is drawn, as quantile functions: uniform numbers go in, noise levels come out.

A quantile function rises, so numbers spread evenly over [0, 1) give levels spread over their distribution.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri

from dp_peft_diffusion.diffusion.objectives import Discrete, Objective
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Train

LevelQuantile = Callable[[np.ndarray], np.ndarray]

# DPDM's v setting (Dockhorn et al. 2022, arXiv 2210.09929): t is uniform and log SNR = -2 log tan(angle), with an angle
# linear in t, from log SNR 13 to -9.
FIRST_ANGLE, LAST_ANGLE = math.atan(math.exp(-13 / 2)), math.atan(math.exp(9 / 2))


def level_quantile(train: Train, objective: Objective) -> LevelQuantile:
    """What turns uniform float64 numbers in [0, 1) into noise levels of the same shape.

    A train.timestep_distribution of None is uniform over timesteps, and log_normal where noise levels are continuous.
    Timesteps, int64, where the objective has them; else sigma, float32.

    Raises:
        UserError: the distribution and the base's noise schedule do not fit.
    """
    if isinstance(objective, Discrete):
        cumulative = timestep_probabilities(train, objective).cumsum()
        cumulative /= cumulative[-1]  # ends at 1, so a number below 1 never falls behind the last timestep
        return lambda uniform: cumulative.searchsorted(uniform, side="right")
    if train.timestep_distribution not in (None, "log_normal", "cosine"):
        raise UserError(
            f"--timestep_distribution {train.timestep_distribution} (train.timestep_distribution in a recipe) is over "
            "timesteps, and this base has continuous noise levels. Type --timestep_distribution log_normal."
        )
    if train.timestep_range is not None:
        raise UserError(
            "--timestep_range (train.timestep_range in a recipe) is over timesteps, and this base has continuous noise "
            "levels. Leave it out, and move --timestep_distribution log_normal with --p_mean and --p_std instead."
        )
    if train.timestep_distribution == "cosine":
        return lambda uniform: np.tan(FIRST_ANGLE + uniform * (LAST_ANGLE - FIRST_ANGLE)).astype(np.float32)
    # Karras et al. 2022, table 1. The least double above 0 that random() draws is 2^-53; ndtri(0) is no number.
    return lambda uniform: np.exp(train.p_mean + train.p_std * ndtri(uniform.clip(2**-54))).astype(np.float32)


def timestep_probabilities(train: Train, objective: Discrete) -> np.ndarray:
    """Share of draws of each timestep, (T,) float64, sum 1.

    uniform: all alike (Ho et al. 2020). mixture: uniform inside each interval of train.timestep_edges, which has the
    share of train.timestep_weights (Ghalebikesabi et al. 2023, arXiv 2302.13861). log_normal and cosine:
    those of EDM and DPDM for sigma, each sigma counted to the timestep that is nearest in log sigma.
    train.timestep_range keeps an interval of timesteps.

    Raises:
        UserError: edges or range end behind the last timestep, or nothing is left in the range.
    """
    steps = objective.num_timesteps
    if train.timestep_distribution in (None, "uniform"):
        shares = np.full(steps, 1 / steps)
    elif train.timestep_distribution == "mixture":
        shares = _mixture(train, steps)
    else:
        log_sigmas = objective.log_sigmas
        borders = (log_sigmas[1:] + log_sigmas[:-1]) / 2  # (T - 1,) between neighbours
        shares = np.diff(_sigma_below(train, borders), prepend=0, append=1)
    first, end = train.timestep_range or (0, steps)
    if end > steps:
        raise UserError(
            f"--timestep_range {first},{end} (train.timestep_range in a recipe) ends behind this base's {steps} "
            f"timesteps. Type for example --timestep_range {min(first, steps - 1)},{steps}."
        )
    shares[:first] = shares[end:] = 0
    if shares.sum() < 1e-12:
        raise UserError(
            f"--timestep_distribution {train.timestep_distribution} draws no timestep of --timestep_range {first},"
            f"{end} (train in a recipe). Change one of them."
        )
    return shares / shares.sum()


def _mixture(train: Train, steps: int) -> np.ndarray:
    edges, shares = train.timestep_edges, np.zeros(steps)
    if edges[-1] > steps:
        raise UserError(
            f"--timestep_edges {','.join(map(str, edges))} (train.timestep_edges in a recipe) end behind this base's "
            f"{steps} timesteps. The last edge must be at most {steps}."
        )
    for first, end, weight in zip(edges[:-1], edges[1:], train.timestep_weights, strict=True):
        shares[first:end] = weight / (end - first)
    return shares


def _sigma_below(train: Train, log_sigmas: np.ndarray) -> np.ndarray:
    """Chance that a drawn sigma lies below each, of the continuous distributions."""
    if train.timestep_distribution == "log_normal":
        return ndtr((log_sigmas - train.p_mean) / train.p_std)
    angles = np.arctan(np.exp(log_sigmas))
    return ((angles - FIRST_ANGLE) / (LAST_ANGLE - FIRST_ANGLE)).clip(0, 1)
