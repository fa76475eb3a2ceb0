"""Time distributions against their exact cell probabilities."""

import math

import numpy as np
import pytest
from diffusers import DDPMScheduler, EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_peft_diffusion.diffusion.noise_levels import level_quantile, timestep_probabilities
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Train

DISCRETE = make_objective(DDPMScheduler())
ZERO_SNR = make_objective(DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))
EDM = make_objective(EDMEulerScheduler())
MIXTURE = {"timestep_edges": (0, 30, 600, 1000), "timestep_weights": (0.03, 0.57, 0.4)}
NARROW = {"timestep_edges": (0, 9), "timestep_weights": (1.0,)}
DISTRIBUTIONS = {
    "uniform": Train(),
    "mixture": Train(timestep_distribution="mixture", **MIXTURE),
    "log_normal": Train(timestep_distribution="log_normal"),
    "log_normal of more noise": Train(timestep_distribution="log_normal", p_mean=1.0, p_std=2.0),
    "cosine": Train(timestep_distribution="cosine"),
    "uniform in a range": Train(timestep_range=(100, 600)),
    "mixture in a range": Train(timestep_distribution="mixture", timestep_range=(20, 700)),
    "log_normal in a range": Train(timestep_distribution="log_normal", timestep_range=(100, 600)),
    "cosine in a range": Train(timestep_distribution="cosine", timestep_range=(0, 300)),
}
CONTINUOUS = ["log_normal", "log_normal of more noise", "cosine"]


def uniform_numbers(count, seed=0):
    return np.random.default_rng(seed).random(count)


def sigma_cdf(train, sigma):
    """Chance of a smaller sigma, from scipy and from DPDM's definition of t."""
    if train.timestep_distribution == "log_normal":
        return stats.lognorm.cdf(sigma, train.p_std, scale=math.exp(train.p_mean))

    def t_of(log_snr):
        return 2 / np.pi * np.arccos(1 / np.sqrt(1 + np.exp(-log_snr)))

    return np.clip((t_of(-2 * np.log(sigma)) - t_of(13.0)) / (t_of(-9.0) - t_of(13.0)), 0, 1)


def expected_shares(train, objective):
    """Of every timestep, one at a time from the definitions."""
    shares = np.zeros(1000)
    sigmas = np.sqrt(1 / objective.alphas_cumprod.double().numpy() - 1)
    for t in range(1000):
        if train.timestep_distribution in (None, "uniform"):
            shares[t] = 1 / 1000
        elif train.timestep_distribution == "mixture":
            k = max(k for k, edge in enumerate(train.timestep_edges) if edge <= t)
            shares[t] = train.timestep_weights[k] / (train.timestep_edges[k + 1] - train.timestep_edges[k])
        else:
            low = math.sqrt(sigmas[t - 1] * sigmas[t]) if t > 0 else 0  # nearest in log sigma
            high = math.sqrt(sigmas[t] * sigmas[t + 1]) if t < 999 else math.inf
            shares[t] = (1 if high == math.inf else sigma_cdf(train, high)) - (sigma_cdf(train, low) if low else 0)
    first, end = train.timestep_range or (0, 1000)
    shares[:first] = shares[end:] = 0
    return shares / shares.sum()


def p_of_counts(counts, expected):
    """Chi-square, with neighbouring cells joined until each expects 10."""
    group = (np.cumsum(expected) // 10).astype(int)
    joined = [np.bincount(group, weights) for weights in (counts, expected)]
    kept = joined[1] > 5
    return stats.chisquare(joined[0][kept], joined[1][kept] * joined[0][kept].sum() / joined[1][kept].sum()).pvalue


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_timesteps_are_drawn_as_their_distribution_says(name):
    train, n = DISTRIBUTIONS[name], 200_000
    timesteps = level_quantile(train, DISCRETE)(uniform_numbers(n))
    assert timesteps.dtype == np.int64
    expected = n * expected_shares(train, DISCRETE)
    counts = np.bincount(timesteps, minlength=1000)
    assert not counts[expected == 0].any()
    assert p_of_counts(counts, expected) > 1e-6


@pytest.mark.parametrize("name", CONTINUOUS)
def test_noise_levels_of_edm_are_drawn_as_their_distribution_says(name):
    train, n = DISTRIBUTIONS[name], 200_000
    sigmas = level_quantile(train, EDM)(uniform_numbers(n))
    assert sigmas.dtype == np.float32
    edges = np.exp(np.linspace(math.log(1e-4), math.log(1e4), 201))
    cumulative = np.concatenate([[0], sigma_cdf(train, edges), [1]])
    counts = np.bincount(np.digitize(sigmas, edges), minlength=202)
    assert p_of_counts(counts, n * np.diff(cumulative)) > 1e-6


@pytest.mark.parametrize("name", CONTINUOUS)
def test_on_timesteps_a_sigma_goes_to_the_timestep_nearest_in_log_sigma(name):
    uniform = uniform_numbers(2000)
    log_sigma = np.log(level_quantile(DISTRIBUTIONS[name], EDM)(uniform).astype(np.float64))
    nearest = np.abs(log_sigma[:, None] - DISCRETE.log_sigmas).argmin(axis=1)
    found = level_quantile(DISTRIBUTIONS[name], DISCRETE)(uniform)
    assert (np.abs(found - nearest) <= 1).all() and (found == nearest).mean() > 0.99  # float32 at the borders


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=20), st.sampled_from(sorted(DISTRIBUTIONS)))
@settings(max_examples=200, deadline=None)
def test_quantiles_rise_and_stay_finite_and_in_range(numbers, name):
    train, uniform = DISTRIBUTIONS[name], np.sort(np.array([0.0, *numbers, np.nextafter(1, 0)]))
    first, end = train.timestep_range or (0, 1000)
    timesteps = level_quantile(train, DISCRETE)(uniform)
    assert (np.diff(timesteps) >= 0).all() and first <= timesteps[0] and timesteps[-1] < end
    if name in CONTINUOUS:
        sigmas = level_quantile(train, EDM)(uniform)
        assert (np.diff(sigmas) >= 0).all() and 0 < sigmas[0] and np.isfinite(sigmas).all()


def test_dpdms_setting_ends_at_log_snr_13_and_minus_9():
    sigmas = level_quantile(DISTRIBUTIONS["cosine"], EDM)(np.array([0.0, np.nextafter(1, 0)]))
    assert -2 * np.log(sigmas) == pytest.approx([13, -9], abs=1e-5)


def test_a_timestep_of_noise_alone_is_drawn_by_uniform_and_never_by_a_distribution_of_sigma():
    assert timestep_probabilities(DISTRIBUTIONS["uniform"], ZERO_SNR)[-1] == pytest.approx(1e-3)
    for name in CONTINUOUS:
        shares = timestep_probabilities(DISTRIBUTIONS[name], ZERO_SNR)
        assert shares[-1] == 0 and shares.sum() == pytest.approx(1) and np.isfinite(shares).all()


@pytest.mark.parametrize(
    "train, objective, word",
    [
        (Train(timestep_distribution="uniform"), EDM, "log_normal"),
        (Train(timestep_distribution="mixture"), EDM, "log_normal"),
        (Train(timestep_distribution="log_normal", timestep_range=(0, 500)), EDM, "--timestep_range"),
        (Train(timestep_range=(0, 1001)), DISCRETE, "1000 timesteps"),
        (Train(timestep_distribution="mixture", timestep_edges=(0, 30, 600, 1001)), DISCRETE, "--timestep_edges"),
        (Train(timestep_distribution="mixture", **NARROW, timestep_range=(9, 10)), DISCRETE, "--timestep_range 9,10"),
        (Train(timestep_distribution="log_normal", p_std=0.1, timestep_range=(900, 999)), DISCRETE, "no timestep"),
    ],
)
def test_a_distribution_that_does_not_fit_the_base_is_refused(train, objective, word):
    with pytest.raises(UserError, match=word):
        level_quantile(train, objective)


def test_without_a_name_the_distribution_is_the_usual_one_of_the_base():
    numbers = uniform_numbers(100)
    for objective, usual in ((DISCRETE, "uniform"), (EDM, "log_normal")):
        named = level_quantile(Train(timestep_distribution=usual), objective)(numbers)
        assert np.array_equal(level_quantile(Train(), objective)(numbers), named)
