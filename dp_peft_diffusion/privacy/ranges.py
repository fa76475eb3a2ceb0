"""Ranges of the numbers of a promise, checked before any accountant is imported or sees them.

Some accountants answer 0 for a noise of NaN, others never answer.
"""

import decimal

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import NEIGHBORING_RELATIONS

SAMPLING_PROBS = (1e-12, 1.0)
NOISE_MULTIPLIERS = (1e-3, 1e5)
EPSILONS = (1e-3, 100.0)  # above 100 nothing worth the name is promised
DELTAS = (1e-12, 1e-3)
MAX_STEPS = 100_000  # of everything composed; beyond, rounding_allowance would leave nothing of delta = 1e-10
MAX_EXAMPLES = 10**12
MAX_EXAMPLES_PER_GROUP = 1024
MAX_RUNS = 100_000
MAX_RELEASES = 64


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


def check_neighboring_relation(value: object) -> str:
    """A neighbouring relation that has a price.

    Raises:
        UserError: the relation is not known.
    """
    if not isinstance(value, str) or value not in NEIGHBORING_RELATIONS:
        known = ", ".join(NEIGHBORING_RELATIONS)
        raise UserError(
            f"neighboring_relation {value!r} is not known; there is: {known}. Try --neighboring_relation zero_out."
        )
    return value


def round_up(value: float, digits: int = 4) -> float:
    """`value` rounded up to `digits` significant digits; never below `value`."""
    return float(decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(repr(float(value))))
