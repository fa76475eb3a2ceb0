"""What a mechanism promises, in numbers and in plain words."""

import math
from typing import Any

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.mechanism import DPMechanism

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
PROFILE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)


def promised_epsilon(mechanism: DPMechanism, delta: float, epsilon: float | None = None) -> float:
    """The epsilon to state: `epsilon` when asked for and kept, else the price rounded up to 4 digits.

    Raises:
        UserError: the mechanism costs more than `epsilon`, or more than can be promised.
    """
    priced = mechanism.epsilon(delta)
    largest = accounting.EPSILONS[1] if epsilon is None else accounting.check_epsilon(epsilon)
    if priced > largest:
        raise UserError(
            f"this mechanism costs epsilon {priced:.4g} at delta {delta:g}, above {largest:g}. "
            "Raise --noise_multiplier, take fewer --max_train_steps or a smaller --train_batch_size."
        )
    return accounting.round_up(priced) if epsilon is None else float(epsilon)


def guarantee(mechanism: DPMechanism, promised: float, delta: float) -> dict[str, Any]:
    """The numbers of the promise: epsilon, delta, mu-GDP, profile and attack odds, all rounded up."""
    event, relation = mechanism.event, mechanism.neighboring_relation
    return {
        "epsilon": promised,
        "delta": delta,
        "mu_gdp": accounting.mu_gdp(event, relation),
        "profile": [
            {"epsilon": accounting.round_up(accounting.epsilon(event, d, relation)), "delta": d} for d in PROFILE_DELTAS
        ],
        "max_tpr_at_fpr": {
            f"{rate:g}": accounting.max_tpr_at_fpr(event, relation, rate) for rate in FALSE_POSITIVE_RATES
        },
    }


def statement(guarantee: dict[str, Any], neighboring_relation: str, num_examples: int | None) -> str:
    """The promise in plain words."""
    if neighboring_relation == "zero_out":
        difference = "one record (an image with its label) was used or replaced by nothing"
        known = f"The number of records, {num_examples}, is public."
    else:
        difference = "one record (an image with its label) was in the data set or not"
        known = "The number of records is not public."
    epsilon, delta = guarantee["epsilon"], guarantee["delta"]
    found = 100 * guarantee["max_tpr_at_fpr"]["0.01"]
    return (
        f"Whether {difference} changes the probability of any outcome of this training by a factor of at most "
        f"e^{epsilon:g} = {math.exp(epsilon):.4g}, and by {delta:g} on top. {known} An attacker who knows everything "
        f"else and accuses 1 % of the records that were not used finds at most {found:.4g} % of those that were. "
        f"(epsilon {epsilon:g}, delta {delta:g}, neighbouring relation {neighboring_relation}, "
        f"{guarantee['mu_gdp']:g}-GDP.)"
    )
