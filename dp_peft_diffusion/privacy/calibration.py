"""The smallest noise multiplier that keeps a promise."""

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
from scipy.optimize import brentq

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.certificate_form import INTERVALS
from dp_peft_diffusion.privacy.ranges import NOISE_MULTIPLIERS, check_delta, check_epsilon, round_up

EventOf = Callable[[float], dp_accounting.DpEvent]


def smallest_noise_multiplier(
    event_of: EventOf, target_epsilon: float, delta: float, neighboring_relation: str, guess: float = 1.0
) -> float:
    """The smallest noise multiplier of 4 digits that PLD prices at `target_epsilon` or less (invariant 11).

    Found on an eight times coarser grid, which is as much faster and above the truth too, then corrected by a few
    prices on the real one.

    Args:
        event_of: noise multiplier -> everything that the epsilon is for.
        target_epsilon: to keep.
        delta: of the promise.
        neighboring_relation: under which it is priced.
        guess: a noise multiplier to start from; it changes the time and not the answer.

    Raises:
        UserError: a number is out of range, or no noise multiplier up to 1e5 is enough.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)

    def excess(noise_multiplier: float, interval: float) -> float:
        """log(price / target): positive when the noise is too small."""
        price = accounting.epsilon(event_of(noise_multiplier), delta, neighboring_relation, smallest_interval=interval)
        return math.log(min(max(price, 1e-9), 1e9) / target_epsilon)

    def coarse(log_noise: float) -> float:
        return excess(float(np.clip(math.exp(log_noise), *NOISE_MULTIPLIERS)), INTERVALS[3])

    low, high = _bracket(coarse, math.log(float(np.clip(guess, *NOISE_MULTIPLIERS))))
    root = brentq(coarse, low, high, xtol=1e-5) if coarse(low) > 0 else low
    slope = max((coarse(root) - coarse(root + 0.01)) / 0.01, 0.1)
    failed, passed, candidate = 0.0, math.inf, min(round_up(math.exp(root)), NOISE_MULTIPLIERS[1])
    while failed < candidate < passed:
        gap = min(excess(candidate, INTERVALS[0]), 0.05)  # a small step up, even from an infinite price
        failed, passed = (candidate, passed) if gap > 0 else (failed, candidate)
        at_least = max(NOISE_MULTIPLIERS[0], math.nextafter(failed, math.inf))
        candidate = round_up(max(candidate * math.exp(gap / slope), at_least))
    return passed


def guess_noise_multiplier(sampling_prob: float, steps: int, target_epsilon: float, delta: float) -> float:
    """A noise multiplier to start from, by the central limit theorem (arXiv 1911.11607); never the answer.

    Raises:
        UserError: epsilon or delta is out of range.
    """
    mu = 1 / dp_accounting.get_sigma_gaussian(check_epsilon(target_epsilon), check_delta(delta))
    return 1 / math.sqrt(math.log1p(mu**2 / (sampling_prob**2 * steps)))


def _bracket(excess: Callable[[float], float], guess: float) -> tuple[float, float]:
    """Logs of noise multipliers (low, high) around the answer: excess(high) <= 0 < excess(low)."""
    smallest, largest = (math.log(noise_multiplier) for noise_multiplier in NOISE_MULTIPLIERS)
    low = high = guess
    width = 0.05
    while excess(high) > 0:
        if high == largest:
            raise UserError(
                f"that epsilon needs a noise multiplier above {NOISE_MULTIPLIERS[1]:g}. "
                "Take fewer --max_train_steps, a smaller --train_batch_size, or a larger --epsilon or --delta."
            )
        low, high, width = high, min(high + width, largest), 2 * width
    while excess(low) <= 0 and low > smallest:
        low, high, width = max(low - width, smallest), low, 2 * width
    return low, high
