"""Price an event: PLD (the promise), RDP (the cross-check), and what the price means for an attacker.

An event is a `dp_accounting` DpEvent: inert data that says which noise met which sampling, how often.
Every number is checked before an accountant sees it: some accountants answer 0 for a noise of NaN.
"""

import contextlib
import decimal
import functools
import logging
import math
from collections.abc import Callable, Iterator

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from dp_peft_diffusion.errors import UserError

NEIGHBORING_RELATIONS = {
    "zero_out": NeighboringRelation.REPLACE_SPECIAL,
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
}
DISCRETIZATION_INTERVAL = 1e-4  # of the privacy loss, rounded pessimistically
SAMPLING_PROBS = (1e-12, 1.0)
NOISE_MULTIPLIERS = (1e-3, 1e5)
EPSILONS = (1e-3, 100.0)  # above 100 nothing worth the name is promised
DELTAS = (1e-12, 1e-3)
MAX_STEPS = 10_000_000
MAX_EXAMPLES = 10**12
SMALLEST_PROFILE_DELTA = 1e-10  # below, the floating-point error of the accountant shows


def check_number(name: str, value: object, low: float, high: float, hint: str) -> float:
    """A finite int or float in [low, high].

    Raises:
        UserError: it is anything else, a bool or a string included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}. Try {hint}.")
    return value


def check_count(name: str, value: object, high: int, hint: str) -> int:
    """A whole number in [1, high].

    Raises:
        UserError: it is anything else, a bool or a float included.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise UserError(f"{name} is {value!r}; it must be a whole number from 1 to {high}. Try {hint}.")
    return value


def check_sampling_prob(value: object) -> float:
    """A probability in [1e-12, 1].

    Raises:
        UserError: it is anything else.
    """
    return check_number("sampling_prob", value, *SAMPLING_PROBS, "a smaller --train_batch_size")


def check_noise_multiplier(value: object) -> float:
    """A noise multiplier that can be priced.

    Raises:
        UserError: it is anything else.
    """
    return check_number("noise_multiplier", value, *NOISE_MULTIPLIERS, "--noise_multiplier 1.0, or --epsilon 1")


def check_epsilon(value: object) -> float:
    """An epsilon that can be promised.

    Raises:
        UserError: it is anything else.
    """
    return check_number("epsilon", value, *EPSILONS, "--epsilon 1")


def check_delta(value: object) -> float:
    """A delta that can be promised.

    Raises:
        UserError: it is anything else.
    """
    return check_number("delta", value, *DELTAS, "--delta 1e-5")


def check_neighboring_relation(value: object) -> NeighboringRelation:
    """The accountant's name for a neighbouring relation.

    Raises:
        UserError: the relation is not known.
    """
    if not isinstance(value, str) or value not in NEIGHBORING_RELATIONS:
        known = ", ".join(NEIGHBORING_RELATIONS)
        raise UserError(
            f"neighboring_relation {value!r} is not known; there is: {known}. Try --neighboring_relation zero_out."
        )
    return NEIGHBORING_RELATIONS[value]


def round_up(value: float, digits: int = 4) -> float:
    """`value` rounded up to `digits` significant digits; never below `value`."""
    return float(decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(repr(float(value))))


def gaussian_event(sampling_prob: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """`steps` Gaussian mechanisms, each on a Poisson sample.

    Raises:
        UserError: a number is out of range.
    """
    check_sampling_prob(sampling_prob)
    check_noise_multiplier(noise_multiplier)
    check_count("steps", steps, MAX_STEPS, "--max_train_steps 100")
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(float(noise_multiplier))
    if sampling_prob < 1:
        step = dp_accounting.PoissonSampledDpEvent(float(sampling_prob), step)
    return dp_accounting.SelfComposedDpEvent(step, steps)


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


def _rdp_epsilon(event: dp_accounting.DpEvent, delta: float, relation: NeighboringRelation) -> float:
    with _without_order_warnings():
        return float(RdpAccountant(neighboring_relation=relation).compose(event).get_epsilon(delta))


@functools.lru_cache(maxsize=8)
def _pld(
    event: dp_accounting.DpEvent, neighboring_relation: str, interval: float = DISCRETIZATION_INTERVAL
) -> PLDAccountant:
    """The privacy loss distribution of an event: built once, asked for every delta and epsilon."""
    relation = check_neighboring_relation(neighboring_relation)
    # Its arrays are as long as epsilon / interval. What RDP prices far above the largest promise is called
    # non-private (epsilon infinite, delta 1): an upper bound, and no hostile certificate can fill the memory.
    if _rdp_epsilon(event, DELTAS[1], relation) > 2 * EPSILONS[1]:
        event = dp_accounting.NonPrivateDpEvent()
    return PLDAccountant(relation, interval).compose(event)


def epsilon(event: dp_accounting.DpEvent, delta: float, neighboring_relation: str, accountant: str = "pld") -> float:
    """An upper bound of the epsilon of an event at `delta`; infinite when far above 100.

    Args:
        event: what happened, from `gaussian_event`.
        delta: in [1e-12, 1e-3].
        neighboring_relation: "zero_out" or "add_or_remove_one".
        accountant: "pld", the promise (connect the dots, arXiv 2207.04380; pessimistic up to the floating-point
            error of its FFT), or "rdp", an independent and looser bound (arXiv 1908.10530).

    Raises:
        UserError: delta is out of range, or the relation or the accountant is not known.
    """
    check_delta(delta)
    relation = check_neighboring_relation(neighboring_relation)
    if accountant == "pld":
        return float(_pld(event, neighboring_relation).get_epsilon(delta))
    if accountant == "rdp":
        return _rdp_epsilon(event, delta, relation)
    raise UserError(f"accountant {accountant!r} is not known; there is: pld, rdp. Try pld.")


@functools.lru_cache(maxsize=8)
def profile(event: dp_accounting.DpEvent, neighboring_relation: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of the privacy profile: epsilons (129,) from 0 up, deltas (129,) down to 1e-10."""
    accountant = _pld(event, neighboring_relation)
    largest = accountant.get_epsilon(SMALLEST_PROFILE_DELTA)
    if not math.isfinite(largest):
        return np.zeros(1), np.ones(1)
    epsilons = np.linspace(0.0, largest, 129)
    return epsilons, np.array([accountant.get_delta(e) for e in epsilons], dtype=np.float64)


def mu_gdp(event: dp_accounting.DpEvent, neighboring_relation: str) -> float:
    """The smallest mu whose Gaussian trade-off dominates the profile, rounded up to 3 digits.

    mu-GDP (arXiv 1905.02383) down to delta = 1e-10: delta(eps) <= Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)
    (its Corollary 1) at every computed point. The rounding is far above what can hide between two points.
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
        if high > 1e3:
            return math.inf
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if dominates(middle) else (middle, high)
    return round_up(high, 3)


def max_tpr_at_fpr(event: dp_accounting.DpEvent, neighboring_relation: str, fpr: float) -> float:
    """The most an attack can find (true positive rate) at false positive rate `fpr`, rounded up.

    min over eps of min(e^eps fpr + delta(eps), 1 - (1 - delta(eps) - fpr) e^-eps): arXiv 1311.0776, equations 1
    and 2. Each point of the profile gives a bound by itself, so the minimum over any set of points is one.
    """
    epsilons, deltas = profile(event, neighboring_relation)
    bounds = np.minimum(np.exp(epsilons) * fpr + deltas, 1 - (1 - deltas - fpr) * np.exp(-epsilons))
    return min(1.0, round_up(float(bounds.min())))


def smallest_noise_multiplier(
    sampling_prob: float, steps: int, target_epsilon: float, delta: float, neighboring_relation: str
) -> float:
    """The smallest noise multiplier of 4 digits that PLD prices at `target_epsilon` or less (invariant 11).

    Found on a ten times coarser grid, which is ten times faster and above the truth too, then corrected by a few
    prices on the real one.

    Raises:
        UserError: a number is out of range, or no noise multiplier up to 1e5 is enough.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)

    def excess(noise_multiplier: float, interval: float) -> float:
        """log(price / target): positive when the noise is too small."""
        event = gaussian_event(sampling_prob, noise_multiplier, steps)
        price = float(_pld(event, neighboring_relation, interval).get_epsilon(delta))
        return math.log(min(max(price, 1e-9), 1e9) / target_epsilon)

    def coarse(log_noise: float) -> float:
        return excess(float(np.clip(math.exp(log_noise), *NOISE_MULTIPLIERS)), 10 * DISCRETIZATION_INTERVAL)

    low, high = _bracket(coarse, _first_guess(sampling_prob, steps, target_epsilon, delta))
    root = brentq(coarse, low, high, xtol=1e-5) if coarse(low) > 0 else low
    slope = max((coarse(root) - coarse(root + 0.01)) / 0.01, 0.1)
    failed, passed, candidate = 0.0, math.inf, min(round_up(math.exp(root)), NOISE_MULTIPLIERS[1])
    while failed < candidate < passed:
        gap = min(excess(candidate, DISCRETIZATION_INTERVAL), 0.05)  # a small step up, even from an infinite price
        failed, passed = (candidate, passed) if gap > 0 else (failed, candidate)
        candidate = round_up(max(candidate * math.exp(gap / slope), math.nextafter(failed, math.inf)))
    return passed


def _first_guess(sampling_prob: float, steps: int, target_epsilon: float, delta: float) -> float:
    """Log of a noise multiplier to start from: the central limit theorem (arXiv 1911.11607), never the answer."""
    gaussian_event(sampling_prob, 1.0, steps)  # checks both before they are computed with
    mu = 1 / dp_accounting.get_sigma_gaussian(target_epsilon, delta)
    guess = -math.log(math.log1p(mu**2 / (sampling_prob**2 * steps))) / 2
    return min(max(guess, math.log(NOISE_MULTIPLIERS[0])), math.log(NOISE_MULTIPLIERS[1]))


def _bracket(excess: Callable[[float], float], guess: float) -> tuple[float, float]:
    """Logs of noise multipliers (low, high) around the answer: excess(high) <= 0 < excess(low)."""
    smallest, largest = (math.log(noise_multiplier) for noise_multiplier in NOISE_MULTIPLIERS)
    low = high = guess
    width = 0.05
    while excess(high) > 0:
        if high == largest:
            raise UserError(
                f"that epsilon needs a noise multiplier above {NOISE_MULTIPLIERS[1]:g}. "
                "Take fewer --max_train_steps, a smaller --train_batch_size or a larger --epsilon."
            )
        low, high, width = high, min(high + width, largest), 2 * width
    while excess(low) <= 0 and low > smallest:
        low, high, width = max(low - width, smallest), low, 2 * width
    return low, high
