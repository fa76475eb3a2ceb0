"""What tuning costs when only the best of a random number of runs is ever seen (arXiv 2110.03620)."""

import math

import dp_accounting
from dp_accounting.dp_event import RepeatAndSelectDpEvent

from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.promise import Promise, composed_event
from dp_peft_diffusion.privacy.ranges import round_up

CONDITIONS = (
    "only if the number of runs is drawn at random so, nobody sees any run but the winner, and runs are scored without "
    "private data (or with data that is paid for)"
)


def selection_epsilons(promise: Promise) -> dict[str, float] | None:
    """Epsilon, by RDP, if the runs were drawn at random with mean `tuning_runs`: geometric or Poisson.

    Information only: a promise of ours is priced by composition, which needs no conditions.

    Returns:
        None if no runs are declared, or RDP has no price for the mechanism.
    """
    relation = promise.mechanism.neighboring_relation
    if promise.tuning_runs is None or not accounting.rdp_can_price(promise.event, relation):
        return None
    earlier = [composed_event(release.mechanism, release.runs) for release in promise.prior]
    found = {}
    for name, shape in (("geometric", 1.0), ("Poisson", math.inf)):
        selection = RepeatAndSelectDpEvent(promise.mechanism.event, float(promise.tuning_runs), shape)
        event = dp_accounting.ComposedDpEvent((selection, *earlier))
        found[name] = round_up(accounting.epsilon(event, promise.delta, relation, "rdp"))
    return found
