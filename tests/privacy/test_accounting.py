import math
import time

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.calibration import guess_noise_multiplier, smallest_noise_multiplier
from dp_peft_diffusion.privacy.pricing_grid import INTERVALS
from dp_peft_diffusion.privacy.ranges import MAX_STEPS, round_up

DELTA = 1e-5
MNIST = 4096 / 60000
DIGITS = 500 / 1797


def price(sampling_prob, noise_multiplier, steps, delta=DELTA, accountant="pld", relation="zero_out", **unit):
    event = accounting.gaussian_event(sampling_prob, noise_multiplier, steps, **unit)
    return accounting.epsilon(event, delta, relation, accountant)


def calibrated(sampling_prob, steps, epsilon, delta=DELTA):
    def event(noise_multiplier):
        return accounting.gaussian_event(sampling_prob, noise_multiplier, steps)

    guess = guess_noise_multiplier(sampling_prob, steps, epsilon, delta)
    return smallest_noise_multiplier(event, epsilon, delta, "zero_out", guess)


# Noise multipliers by PLD and by RDP at which each accountant gives the epsilon, found once by bisection.
GOLDEN = [
    (MNIST, 200, 0.2, 15.86, 17.51),
    (MNIST, 200, 1.0, 3.778, 4.096),
    (MNIST, 200, 10.0, 0.8180, 0.8635),
    (MNIST, 1000, 0.2, 35.26, 38.93),
    (MNIST, 1000, 1.0, 8.134, 8.821),
    (MNIST, 1000, 10.0, 1.297, 1.363),
    (MNIST, 5000, 0.2, 78.82, 86.97),
    (MNIST, 5000, 1.0, 18.05, 19.57),
    (MNIST, 5000, 10.0, 2.525, 2.6675),
    (DIGITS, 200, 0.2, 64.25, 70.96),
    (DIGITS, 200, 1.0, 14.78, 16.04),
    (DIGITS, 200, 10.0, 2.122, 2.254),
    (DIGITS, 1000, 0.2, 143.5, 158.5),
    (DIGITS, 1000, 1.0, 32.87, 35.65),
    (DIGITS, 1000, 10.0, 4.473, 4.767),
    (DIGITS, 5000, 0.2, 321.2, 354.3),
    (DIGITS, 5000, 1.0, 73.43, 79.63),
    (DIGITS, 5000, 10.0, 9.870, 10.60),
]


@pytest.mark.parametrize(("sampling_prob", "steps", "epsilon", "by_pld", "by_rdp"), GOLDEN)
def test_golden_prices_stay(sampling_prob, steps, epsilon, by_pld, by_rdp):
    assert price(sampling_prob, by_pld, steps) == pytest.approx(epsilon, rel=1e-3)
    assert price(sampling_prob, by_rdp, steps, accountant="rdp") == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize(("sampling_prob", "steps", "epsilon", "by_pld", "_"), [*GOLDEN[:4], *GOLDEN[9:12]])
def test_calibration_gives_the_golden_noise_multiplier_and_never_less_noise(sampling_prob, steps, epsilon, by_pld, _):
    noise_multiplier = calibrated(sampling_prob, steps, epsilon)
    assert noise_multiplier == pytest.approx(by_pld, rel=1e-3)
    assert price(sampling_prob, noise_multiplier, steps) <= epsilon
    assert round_up(noise_multiplier, 4) == noise_multiplier
    assert price(sampling_prob, noise_multiplier * (1 - 2e-3), steps) > epsilon


@pytest.mark.parametrize("noise_multiplier", [3.0, 10.0, 50.0])
@pytest.mark.parametrize("steps", [1, 100])
def test_without_sampling_the_price_is_the_closed_form_and_never_below_it(noise_multiplier, steps):
    exact = dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), DELTA)
    assert exact <= price(1.0, noise_multiplier, steps) <= exact * 1.0005 + 1e-6


def gaussian_delta(mu, epsilon):
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize(("steps", "mu"), [(20_000, 0.3), (20_000, 1.0), (100_000, 1.0), (100_000, 3.0)])
def test_over_many_updates_rounding_takes_no_price_below_the_closed_form(steps, mu):
    event = accounting.gaussian_event(1 - 1e-12, math.sqrt(steps) / mu, steps)  # sampled, so that it is convolved
    for delta in (1e-12, 1e-11, 1e-10, 1e-9, 1e-8, DELTA):
        priced = accounting.epsilon(event, delta, "zero_out")
        assert math.isinf(priced) or gaussian_delta(mu, priced) <= delta
        assert delta < 1e-8 or math.isfinite(priced)
    for epsilon, delta in zip(*accounting.profile(event, "zero_out"), strict=True):
        assert gaussian_delta(mu, epsilon) <= delta


def test_at_the_most_updates_the_whole_profile_can_still_be_stated():
    event = accounting.gaussian_event(1 - 1e-12, math.sqrt(MAX_STEPS), MAX_STEPS)
    assert accounting.epsilon(event, accounting.SMALLEST_PROFILE_DELTA, "zero_out") < 10
    assert accounting.mu_gdp(event, "zero_out") < 1.2


@pytest.mark.parametrize(
    ("k", "q", "noise", "steps", "near"),
    [(8, 1e-4, 0.5, 100, 1.92), (16, 0.0068, 1.0, 300, 15.8), (32, 0.01, 2.0, 300, 17.7)],
)
def test_large_groups_on_small_samples_have_a_price(k, q, noise, steps, near):
    assert price(q, noise, steps, max_examples_per_group=k) == pytest.approx(near, rel=0.02)


def test_zero_out_and_add_or_remove_have_the_same_price_and_replace_one_the_known_higher_one():
    event = accounting.gaussian_event(MNIST, 8.1338, 1000)
    assert accounting.epsilon(event, DELTA, "zero_out") == accounting.epsilon(event, DELTA, "add_or_remove_one")
    assert accounting.epsilon(event, DELTA, "replace_one") == pytest.approx(2.130, rel=1e-3)
    with pytest.raises(UserError, match="zero_out, add_or_remove_one, replace_one"):
        accounting.epsilon(event, DELTA, "replace_special")


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(3.0, 1), (8.0, 10), (40.0, 300)])
def test_replace_one_doubles_the_sensitivity_once(noise_multiplier, steps):
    replaced = price(1.0, noise_multiplier, steps, relation="replace_one")
    assert replaced == pytest.approx(price(1.0, noise_multiplier / 2, steps), rel=1e-4)


@pytest.mark.parametrize(("k", "epsilon"), [(2, 2.16), (4, 4.75), (8, 10.9), (16, 26.8)])
def test_groups_cost_what_was_computed_once_for_the_mixture(k, epsilon):
    assert price(MNIST, 8.134, 1000, max_examples_per_group=k) == pytest.approx(epsilon, rel=5e-3)


def test_little_noise_on_small_samples_has_a_price_for_groups_too():
    assert price(0.001, 0.5, 100, max_examples_per_group=2) < 10


def test_a_group_is_cheaper_than_the_group_property_and_dearer_than_one_record():
    one, group = price(0.1, 2.0, 50), price(0.1, 2.0, 50, max_examples_per_group=3)
    assert 2 * one < group
    shifted = accounting.gaussian_event(1.0, 2.0, 50, max_examples_per_group=3)  # all three in every step
    assert group < accounting.epsilon(shifted, DELTA, "zero_out") == price(1.0, 2.0 / 3, 50)


@pytest.mark.parametrize(("q", "noise", "k"), [(0.5, 600.0, 300), (0.01, 30.0, 300)])
def test_merging_negligible_numbers_of_sampled_records_changes_no_price(q, noise, k):
    sensitivities, chances = accounting._sampled_of_group(k, q)
    assert len(sensitivities) < k and sum(chances) == pytest.approx(1, abs=1e-12)
    mean = sum(i * p for i, p in zip(sensitivities, chances, strict=True))
    assert mean == pytest.approx(k * q, rel=1e-12)
    whole = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        noise, tuple(range(k + 1)), tuple(binom.pmf(range(k + 1), k, q))
    )
    merged = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(noise, sensitivities, chances)
    prices = [
        accounting.epsilon(dp_accounting.SelfComposedDpEvent(e, 2), DELTA, "zero_out", smallest_interval=INTERVALS[-1])
        for e in (whole, merged)
    ]
    assert prices[1] == pytest.approx(prices[0], rel=1e-6)


@pytest.mark.parametrize(("k", "q"), [(40, 0.5), (40, 0.02), (40, 0.98)])
def test_merging_never_counts_fewer_sampled_records_than_there_are(k, q, monkeypatch):
    monkeypatch.setattr(accounting, "NEGLIGIBLE", 0.01)  # so that it shows
    sensitivities, chances = accounting._sampled_of_group(k, q)
    merged = np.zeros(k + 1)
    merged[np.array(sensitivities, dtype=int)] = chances
    at_least = merged[::-1].cumsum()[::-1]
    assert at_least[0] == pytest.approx(1, abs=1e-12)
    assert np.all(at_least >= binom.sf(np.arange(k + 1) - 1, k, q) - 1e-12)  # stochastic dominance
    assert len(sensitivities) < k / 2


@pytest.mark.parametrize(("cap", "epsilon"), [(4096, 3.23), (4352, 1.0001), (4608, 0.99994)])
def test_truncated_batches_cost_what_was_computed_once(cap, epsilon):
    found = price(MNIST, 8.134, 1000, truncated_batch_size=cap, num_examples=60000)
    assert found == pytest.approx(epsilon, rel=1e-3)


def test_a_cap_at_n_changes_nothing():
    capped = price(0.1, 2.0, 50, truncated_batch_size=1000, num_examples=1000)
    assert capped == pytest.approx(price(0.1, 2.0, 50), rel=1e-9)


def test_what_has_no_price_is_refused():
    with pytest.raises(UserError, match="no known price"):
        price(0.1, 2.0, 50, max_examples_per_group=2, truncated_batch_size=10, num_examples=100)
    with pytest.raises(UserError, match="num_examples"):
        price(0.1, 2.0, 50, truncated_batch_size=10)
    for cap in (0, 101, 1.5, True):
        with pytest.raises(UserError, match="truncated_batch_size"):
            price(0.1, 2.0, 50, truncated_batch_size=cap, num_examples=100)
    for k in (0, 1025, 2.0, True, math.nan):
        with pytest.raises(UserError, match="max_examples_per_group"):
            price(0.1, 2.0, 50, max_examples_per_group=k)


def test_rdp_says_where_it_has_no_price_and_gdp_is_refused_with_the_reason():
    for unit, relation in (
        ({"max_examples_per_group": 2}, "zero_out"),
        ({"truncated_batch_size": 10, "num_examples": 100}, "zero_out"),
        ({}, "replace_one"),
    ):
        event = accounting.gaussian_event(0.1, 2.0, 50, **unit)
        assert not accounting.rdp_can_price(event, relation)
        with pytest.raises(UserError, match="RDP has no price"):
            accounting.epsilon(event, DELTA, relation, "rdp")
    whole = accounting.gaussian_event(1.0, 20.0, 50)
    assert accounting.rdp_can_price(whole, "zero_out") and not accounting.rdp_can_price(whole, "replace_one")
    with pytest.raises(UserError, match="no bound"):
        price(0.1, 2.0, 50, accountant="gdp")
    with pytest.raises(UserError, match="there is: pld, rdp"):
        price(0.1, 2.0, 50, accountant="prv")


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
    for q, noise, steps in [(1.0, 1e-3, 100_000), (0.3, 1e-3, 10), (1e-2, 0.3, 100_000), (0.9, 10.0, 100_000)]:
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
        smallest_noise_multiplier(lambda _: event, 1.0, bad, "zero_out")
    if bad != 0.01:
        with pytest.raises(UserError, match="epsilon"):
            smallest_noise_multiplier(lambda _: event, bad, DELTA, "zero_out")


def test_no_noise_is_enough_for_100000_full_batches_at_a_tiny_epsilon():
    with pytest.raises(UserError, match="noise multiplier above 100000"):
        calibrated(1.0, 100_000, 1e-3, 1e-12)


@pytest.mark.parametrize("guess", [1e-9, 0.3, 400.0, 1e9])
def test_the_guess_changes_no_calibration(guess):
    found = smallest_noise_multiplier(
        lambda noise: accounting.gaussian_event(MNIST, noise, 200), 1.0, DELTA, "zero_out", guess
    )
    assert found == calibrated(MNIST, 200, 1.0)


def test_where_nothing_needs_noise_the_least_is_found():
    assert smallest_noise_multiplier(lambda _: dp_accounting.ComposedDpEvent(()), 1.0, DELTA, "zero_out") == 1e-3


@pytest.mark.parametrize(
    ("q", "noise", "steps", "unit", "relation"),
    [
        (MNIST, 1.297, 1000, {}, "zero_out"),
        (MNIST, 30.0, 100, {"max_examples_per_group": 16}, "zero_out"),
        (0.9, 3.0, 30, {}, "replace_one"),
        (0.3, 2.0, 20, {"truncated_batch_size": 400, "num_examples": 1000}, "zero_out"),
    ],
)
def test_a_coarser_grid_is_above_the_finer_one_and_near(q, noise, steps, unit, relation):
    event = accounting.gaussian_event(q, noise, steps, **unit)
    fine = accounting.epsilon(event, DELTA, relation)
    coarse = accounting.epsilon(event, DELTA, relation, smallest_interval=6.4e-3)
    assert fine * (1 - 1e-6) <= coarse <= fine * 1.05
    assert coarse * (1 - 1e-6) <= accounting.epsilon(event, DELTA, relation, smallest_interval=INTERVALS[-1])


def test_absurd_events_are_not_priced_for_ever():
    """Each in a second or two on an idle machine; the accountant alone takes minutes and gigabytes for most of them."""
    absurd = [
        (1e-6, 0.1, 1, {}, "zero_out"),
        (0.9, 225.0, 100_000, {}, "zero_out"),
        (0.99, 225.0, 100, {"max_examples_per_group": 64}, "zero_out"),
        (1e-12, 1e5, 1, {"max_examples_per_group": 3}, "zero_out"),
        (0.99, 0.1, 1000, {}, "replace_one"),
        (0.5, 1e-3, 1, {"truncated_batch_size": 1, "num_examples": 10**12}, "zero_out"),
    ]
    for q, noise, steps, unit, relation in absurd:
        began = time.process_time()
        price(q, noise, steps, relation=relation, **unit)
        assert time.process_time() - began < 10


@settings(max_examples=200)
@given(st.floats(1e-12, 1e6), st.integers(1, 6))
def test_rounding_up_never_goes_down_and_stays_within_one_unit(value, digits):
    rounded = round_up(value, digits)
    assert value <= rounded <= value * (1 + 1.000001 * 10.0 ** (1 - digits))
    assert round_up(rounded, digits) == rounded


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


def test_mu_gdp_holds_between_the_computed_points_too():
    event = accounting.gaussian_event(MNIST, 3.778, 200)
    mu, (epsilons, _) = accounting.mu_gdp(event, "zero_out"), accounting.profile(event, "zero_out")
    for between in np.linspace(0, epsilons[-1], 1000):
        gaussian = norm.cdf(mu / 2 - between / mu) - math.exp(between) * norm.cdf(-mu / 2 - between / mu)
        assert accounting._pld(event, "zero_out", 1e-4).get_delta(between) <= gaussian


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
