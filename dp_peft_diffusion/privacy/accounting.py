"""Price an event: PLD (the promise), RDP (the cross-check), and what the price means for an attacker.

An event is a `dp_accounting` DpEvent: inert data that says which noise met which sampling, how often.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.pricing_grid import discretization_interval, rounding_allowance
from dp_peft_diffusion.privacy.ranges import (
    DELTAS,
    EPSILONS,
    MAX_EXAMPLES,
    MAX_EXAMPLES_PER_GROUP,
    MAX_STEPS,
    check_count,
    check_delta,
    check_neighboring_relation,
    check_noise_multiplier,
    check_sampling_prob,
    round_up,
)

RELATIONS = {
    "zero_out": NeighboringRelation.REPLACE_SPECIAL,
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,  # doubles the sensitivity by itself: nobody else may (invariant 11)
}
SMALLEST_PROFILE_DELTA = 1e-10  # below, the floating-point error of the accountant shows
NEGLIGIBLE = 1e-25  # chance of a number of sampled records of one group, far below every delta


def gaussian_event(
    sampling_prob: float,
    noise_multiplier: float,
    steps: int,
    *,
    max_examples_per_group: int = 1,
    truncated_batch_size: int | None = None,
    num_examples: int | None = None,
) -> dp_accounting.DpEvent:
    """`steps` Gaussian mechanisms, each on a Poisson sample of records of sensitivity 1.

    Args:
        sampling_prob: q of each record.
        noise_multiplier: standard deviation of the noise.
        steps: how often.
        max_examples_per_group: k, when the neighbour differs in all records of one group: the number of those in a
            sample is Binomial(k, q), and so is the change of the sum at most (arXiv 2401.10294).
        truncated_batch_size: B, when a sample keeps at most B records, chosen uniformly (arXiv 2508.15089).
        num_examples: public N, which truncation needs.

    Raises:
        UserError: a number is out of range, or the combination has no price.
    """
    q, sigma = float(check_sampling_prob(sampling_prob)), float(check_noise_multiplier(noise_multiplier))
    check_count("steps", steps, MAX_STEPS, "--max_train_steps 100")
    k = check_count("max_examples_per_group", max_examples_per_group, MAX_EXAMPLES_PER_GROUP, "4")
    step: dp_accounting.DpEvent
    if truncated_batch_size is not None:
        if k > 1:
            raise UserError("truncated_batch_size together with groups has no known price. Leave one of them out.")
        n = check_count("num_examples, which truncated_batch_size needs,", num_examples, MAX_EXAMPLES, "your N")
        cap = check_count("truncated_batch_size", truncated_batch_size, n, "twice the --train_batch_size")
        step = dp_accounting.TruncatedSubsampledGaussianDpEvent(n, q, cap, sigma)
    elif q == 1:
        step = dp_accounting.GaussianDpEvent(sigma / k)
    elif k == 1:
        step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    else:
        step = MixtureOfGaussiansDpEvent(sigma, *_sampled_of_group(k, q))
    return dp_accounting.SelfComposedDpEvent(step, steps)


def _sampled_of_group(k: int, q: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numbers of sampled records of a group and their probabilities, Binomial(k, q).

    Negligible chances are given to larger numbers, which dominate (arXiv 2310.15526) and so cost more.
    """
    counts = np.arange(k + 1)
    chances = binom.pmf(counts, k, q)
    low = int(np.searchsorted(binom.cdf(counts, k, q), NEGLIGIBLE))
    high = int(np.argmax(binom.sf(counts, k, q) <= NEGLIGIBLE))
    chances[low] += chances[:low].sum()
    chances[k] += chances[high + 1 : k].sum()
    kept = [*range(low, high + 1), *([k] if high < k and chances[k] > 0 else [])]
    return tuple(float(count) for count in kept), tuple(float(chances[count]) for count in kept)


@contextlib.contextmanager
def _without_order_warnings() -> Iterator[None]:
    """RDP leaves out orders whose series does not converge: safe (looser), and not for users to read."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def rdp_can_price(event: dp_accounting.DpEvent, neighboring_relation: str) -> bool:
    """Whether RDP has a price: not for groups and truncation, nor under replace_one, which it does not double."""
    relation = RELATIONS[check_neighboring_relation(neighboring_relation)]
    return neighboring_relation != "replace_one" and RdpAccountant(neighboring_relation=relation).supports(event)


@functools.lru_cache(maxsize=16)
def _pld(event: dp_accounting.DpEvent, neighboring_relation: str, smallest_interval: float) -> PLDAccountant:
    """The privacy loss distribution of an event: built once, asked for every delta and epsilon.

    What is too far above the largest promise to be priced in a second or two is called non-private (epsilon
    infinite, delta 1): an upper bound, and no hostile certificate can fill the memory.
    """
    relation = RELATIONS[check_neighboring_relation(neighboring_relation)]
    interval = discretization_interval(event, relation, smallest_interval)
    with contextlib.suppress(RecursionError, ValueError, ArithmeticError):  # the accountant gives up on absurd events
        if interval is not None:
            accountant = PLDAccountant(relation, interval).compose(event)
            if accountant.get_epsilon(DELTAS[1]) <= 2 * EPSILONS[1]:
                return accountant
    return PLDAccountant(relation).compose(dp_accounting.NonPrivateDpEvent())


def interval_of(event: dp_accounting.DpEvent, neighboring_relation: str) -> float | None:
    """Of the privacy loss, at which PLD prices an event; None where it calls it non-private without a look."""
    return discretization_interval(event, RELATIONS[check_neighboring_relation(neighboring_relation)])


# The same price is asked for by plan, promise, certificate and metrics.
@functools.lru_cache(maxsize=1024)
def _pld_epsilon(
    event: dp_accounting.DpEvent, delta: float, neighboring_relation: str, smallest_interval: float
) -> float:
    left = delta - rounding_allowance(event)
    return float(_pld(event, neighboring_relation, smallest_interval).get_epsilon(left)) if left > 0 else math.inf


@functools.lru_cache(maxsize=64)
def _rdp_epsilon(event: dp_accounting.DpEvent, delta: float, neighboring_relation: str) -> float:
    with _without_order_warnings():
        rdp = RdpAccountant(neighboring_relation=RELATIONS[neighboring_relation]).compose(event)
        return float(rdp.get_epsilon(delta))


def epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    neighboring_relation: str,
    accountant: str = "pld",
    smallest_interval: float = 1e-4,
) -> float:
    """An upper bound of the epsilon of an event at `delta`; infinite when far above 100, or lost in rounding.

    Args:
        event: what happened, from `gaussian_event`.
        delta: in [1e-12, 1e-3].
        neighboring_relation: "zero_out", "add_or_remove_one" or "replace_one".
        accountant: "pld", the promise (connect the dots, arXiv 2207.04380; pessimistic, with an
            allowance for the rounding of its FFT), or "rdp", an independent and looser bound (arXiv 1908.10530).
        smallest_interval: of the discretized privacy loss; a coarser one is faster, and above the truth too.

    Raises:
        UserError: delta is out of range, the relation or the accountant is not known, or has no price for the event.
    """
    check_delta(delta)
    check_neighboring_relation(neighboring_relation)
    if accountant == "pld":
        return _pld_epsilon(event, delta, neighboring_relation, smallest_interval)
    if accountant == "rdp":
        if not rdp_can_price(event, neighboring_relation):
            raise UserError("RDP has no price for groups, truncated batches or replace_one. Take pld.")
        return _rdp_epsilon(event, delta, neighboring_relation)
    if accountant == "gdp":
        raise UserError(
            "accountant gdp is refused: the central limit theorem is no bound. On runs of this kind it claims "
            "epsilon 10 where even a lower bound of the truth is 11.26. Take pld."
        )
    raise UserError(f"accountant {accountant!r} is not known; there is: pld, rdp. Try pld.")


@functools.lru_cache(maxsize=8)
def profile(event: dp_accounting.DpEvent, neighboring_relation: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of the privacy profile: epsilons (129,) from 0 up, deltas (129,) down to 1e-10."""
    largest = epsilon(event, SMALLEST_PROFILE_DELTA, neighboring_relation)
    if not math.isfinite(largest):
        return np.zeros(1), np.ones(1)
    epsilons = np.linspace(0.0, largest, 129)
    accountant = _pld(event, neighboring_relation, 1e-4)
    deltas = np.array([accountant.get_delta(e) for e in epsilons], dtype=np.float64)
    return epsilons, np.minimum(deltas + rounding_allowance(event), 1.0)


def mu_gdp(event: dp_accounting.DpEvent, neighboring_relation: str) -> float:
    """The smallest mu whose Gaussian trade-off dominates the profile, rounded up to 3 digits.

    mu-GDP (arXiv 1905.02383) down to delta = 1e-10: delta(eps) <= Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)
    (its Corollary 1) at every computed point. One in a thousand is added for what can hide between two points.
    """
    epsilons, deltas = profile(event, neighboring_relation)
    if deltas[0] >= 1:
        return math.inf

    def dominates(mu: float) -> bool:
        gaussian = ndtr(mu / 2 - epsilons / mu) - np.exp(epsilons + log_ndtr(-mu / 2 - epsilons / mu))
        return bool(np.all(gaussian >= deltas))

    low, high = 1e-9, 1e-6
    while not dominates(high):
        low, high = high, 2 * high
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if dominates(middle) else (middle, high)
    return round_up(high * 1.001, 3)


def max_tpr_at_fpr(event: dp_accounting.DpEvent, neighboring_relation: str, fpr: float) -> float:
    """The most an attack can find (true positive rate) at false positive rate `fpr`, rounded up.

    min over eps of min(e^eps fpr + delta(eps), 1 - (1 - delta(eps) - fpr) e^-eps): arXiv 1311.0776, equations 1
    and 2. Each point of the profile gives a bound by itself, so the minimum over any set of points is one.
    """
    epsilons, deltas = profile(event, neighboring_relation)
    with np.errstate(over="ignore"):  # e^eps above 1e308 is as good as infinite: the other bound is smaller
        bounds = np.minimum(np.exp(epsilons) * fpr + deltas, 1 - (1 - deltas - fpr) * np.exp(-epsilons))
    return min(1.0, round_up(float(bounds.min())))
