import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting

DELTA = 1e-5
MNIST = 4096 / 60000
DIGITS = 500 / 1797


def price(sampling_prob, noise_multiplier, steps, delta=DELTA, accountant="pld"):
    event = accounting.gaussian_event(sampling_prob, noise_multiplier, steps)
    return accounting.epsilon(event, delta, "zero_out", accountant)


# Noise multipliers by PLD and by RDP at which each accountant gives the epsilon, found once by bisection.
GOLDEN = [
    (MNIST, 200, 0.2, 15.86, 17.51),
    (MNIST, 200, 1.0, 3.778, 4.096),
    (MNIST, 1000, 0.2, 35.26, 38.93),
    (MNIST, 1000, 1.0, 8.134, 8.821),
    (MNIST, 1000, 10.0, 1.297, 1.363),
    (MNIST, 5000, 0.2, 78.82, 86.97),
    (MNIST, 5000, 1.0, 18.05, 19.57),
    (DIGITS, 200, 0.2, 64.25, 70.96),
    (DIGITS, 200, 1.0, 14.78, 16.04),
    (DIGITS, 1000, 1.0, 32.87, 35.65),
    (DIGITS, 5000, 10.0, 9.870, 10.60),
]


@pytest.mark.parametrize(("sampling_prob", "steps", "epsilon", "by_pld", "by_rdp"), GOLDEN)
def test_golden_prices_stay(sampling_prob, steps, epsilon, by_pld, by_rdp):
    assert price(sampling_prob, by_pld, steps) == pytest.approx(epsilon, rel=1e-3)
    assert price(sampling_prob, by_rdp, steps, accountant="rdp") == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize(("sampling_prob", "steps", "epsilon", "by_pld", "_"), [*GOLDEN[:4], *GOLDEN[7:]])
def test_calibration_gives_the_golden_noise_multiplier_and_never_less_noise(sampling_prob, steps, epsilon, by_pld, _):
    noise_multiplier = accounting.smallest_noise_multiplier(sampling_prob, steps, epsilon, DELTA, "zero_out")
    assert noise_multiplier == pytest.approx(by_pld, rel=1e-3)
    assert price(sampling_prob, noise_multiplier, steps) <= epsilon
    assert accounting.round_up(noise_multiplier, 4) == noise_multiplier
    assert price(sampling_prob, noise_multiplier * (1 - 2e-3), steps) > epsilon


@pytest.mark.parametrize("noise_multiplier", [3.0, 10.0, 50.0])
@pytest.mark.parametrize("steps", [1, 100])
def test_without_sampling_the_price_is_the_closed_form_and_never_below_it(noise_multiplier, steps):
    exact = dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), DELTA)
    assert exact <= price(1.0, noise_multiplier, steps) <= exact * 1.0005 + 1e-6


def test_both_relations_have_the_same_price_and_replace_one_is_refused():
    event = accounting.gaussian_event(MNIST, 8.134, 1000)
    assert accounting.epsilon(event, DELTA, "zero_out") == accounting.epsilon(event, DELTA, "add_or_remove_one")
    with pytest.raises(UserError, match="zero_out, add_or_remove_one"):
        accounting.epsilon(event, DELTA, "replace_one")


def usual_noise(sampling_prob, epsilon, steps):
    """A noise multiplier of at least 2 (RDP is loose below) that costs about `epsilon` or less."""
    mu = 1 / dp_accounting.get_sigma_gaussian(epsilon, DELTA)
    return max(2.0, sampling_prob * math.sqrt(steps) / mu)


usual = {"q": st.floats(0.1, 0.5), "epsilon": st.floats(0.3, 3.0), "steps": st.integers(50, 1000)}


@settings(max_examples=6, deadline=None)
@given(**usual, factor=st.floats(1.05, 1.5))
def test_price_falls_with_noise_and_delta_and_rises_with_steps_and_sampling(q, epsilon, steps, factor):
    noise = usual_noise(q, epsilon, steps)
    here = price(q, noise, steps)
    assert price(q, noise * factor, steps) <= here
    assert price(q, noise, steps, DELTA * factor) <= here
    assert price(q, noise, math.ceil(steps * factor)) >= here
    assert price(q * factor, noise, steps) >= here


@settings(max_examples=10, deadline=None)
@given(**usual)
def test_rdp_is_above_pld_and_close(q, epsilon, steps):
    noise = usual_noise(q, epsilon, steps)
    pld, rdp = price(q, noise, steps), price(q, noise, steps, accountant="rdp")
    assert pld <= rdp <= 1.2 * pld


def test_a_hopeless_mechanism_costs_infinity_at_once():
    for q, noise, steps in [(1.0, 1e-3, 10**7), (0.3, 1e-3, 10), (1e-3, 0.3, 10**6)]:
        assert price(q, noise, steps) == math.inf
        event = accounting.gaussian_event(q, noise, steps)
        assert accounting.mu_gdp(event, "zero_out") == math.inf
        assert accounting.max_tpr_at_fpr(event, "zero_out", 0.01) == 1.0


GARBAGE = [math.nan, math.inf, -math.inf, -1, 0, True, "8", None, 1e300]


@pytest.mark.parametrize("bad", [*GARBAGE, 1.5])
def test_garbage_sampling_probabilities_are_refused(bad):
    if bad is not True:
        with pytest.raises(UserError, match="sampling_prob"):
            accounting.gaussian_event(bad, 1.0, 10)
    with pytest.raises(UserError, match="steps"):
        accounting.gaussian_event(0.1, 1.0, bad)


@pytest.mark.parametrize("bad", [*GARBAGE, 1e-4, 1e6])
def test_garbage_noise_multipliers_are_refused(bad):
    with pytest.raises(UserError, match="noise_multiplier"):
        accounting.gaussian_event(0.1, bad, 10)


@pytest.mark.parametrize("bad", [*GARBAGE, 1e-13, 0.01])
def test_garbage_deltas_and_epsilons_are_refused_before_any_accountant(bad, monkeypatch):
    monkeypatch.setattr(accounting, "_pld", None)
    event = accounting.gaussian_event(0.1, 1.0, 10)
    with pytest.raises(UserError, match="delta"):
        accounting.epsilon(event, bad, "zero_out")
    with pytest.raises(UserError, match="delta"):
        accounting.smallest_noise_multiplier(0.1, 10, 1.0, bad, "zero_out")
    if bad != 0.01:
        with pytest.raises(UserError, match="epsilon"):
            accounting.smallest_noise_multiplier(0.1, 10, bad, DELTA, "zero_out")


def test_no_noise_is_enough_for_ten_million_full_batches_at_a_tiny_epsilon():
    with pytest.raises(UserError, match="noise multiplier above 100000"):
        accounting.smallest_noise_multiplier(1.0, 10**7, 1e-3, 1e-12, "zero_out")


@settings(max_examples=200)
@given(st.floats(1e-12, 1e6), st.integers(1, 6))
def test_rounding_up_never_goes_down_and_stays_within_one_unit(value, digits):
    rounded = accounting.round_up(value, digits)
    assert value <= rounded <= value * (1 + 1.000001 * 10.0 ** (1 - digits))
    assert accounting.round_up(rounded, digits) == rounded


@pytest.mark.parametrize("noise_multiplier", [0.8, 3.731, 20.0])
def test_one_gaussian_has_mu_one_over_sigma(noise_multiplier):
    mu = accounting.mu_gdp(accounting.gaussian_event(1.0, noise_multiplier, 1), "zero_out")
    assert 1 / noise_multiplier <= mu <= 1.012 / noise_multiplier


@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.1])
def test_attack_odds_bound_the_best_attack_on_a_gaussian_closely(fpr):
    noise_multiplier = 2.0
    best_attack = norm.cdf(norm.ppf(fpr) + 1 / noise_multiplier)  # Neyman-Pearson
    bound = accounting.max_tpr_at_fpr(accounting.gaussian_event(1.0, noise_multiplier, 1), "zero_out", fpr)
    assert best_attack <= bound <= best_attack * 1.01


def test_attack_odds_bound_a_simulated_attack_on_a_sampled_mechanism():
    q, noise, steps, trials = 0.5, 2.0, 8, 200_000
    rng = np.random.default_rng(0)

    def log_likelihood_ratio(z):
        return np.log(1 - q + q * np.exp((2 * z - 1) / (2 * noise**2))).sum(axis=1)

    without = rng.normal(0, noise, (trials, steps))
    used = without + (rng.random((trials, steps)) < q)
    threshold = np.quantile(log_likelihood_ratio(without), 0.99)
    found = np.mean(log_likelihood_ratio(used) > threshold)
    bound = accounting.max_tpr_at_fpr(accounting.gaussian_event(q, noise, steps), "zero_out", 0.01)
    assert found - 5 * math.sqrt(found / trials) <= bound <= 1.15 * found


def test_mu_gdp_dominates_the_price_at_every_delta():
    event = accounting.gaussian_event(MNIST, 3.778, 200)
    mu = accounting.mu_gdp(event, "zero_out")
    for delta in 10.0 ** np.arange(-9.9, -3.0, 0.7):
        by_mu = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
        assert accounting.epsilon(event, float(delta), "zero_out") <= by_mu


def test_the_distribution_is_built_once_for_all_deltas(monkeypatch):
    accounting._pld.cache_clear()
    event = accounting.gaussian_event(0.1, 5.0, 10)
    for delta in (1e-5, 1e-6, 1e-7):
        accounting.epsilon(event, delta, "zero_out")
    accounting.mu_gdp(event, "zero_out")
    assert accounting._pld.cache_info().misses == 1
