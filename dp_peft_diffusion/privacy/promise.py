"""What an epsilon covers: a run, the runs that tuned it, and what was released before; in numbers and in words."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import dp_accounting

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.calibration import guess_noise_multiplier, smallest_noise_multiplier
from dp_peft_diffusion.privacy.certificate_form import FALSE_POSITIVE_RATES, PROFILE_DELTAS
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.ranges import (
    EPSILONS,
    MAX_RELEASES,
    MAX_RUNS,
    MAX_STEPS,
    check_count,
    check_epsilon,
    round_up,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """Noisy updates given away earlier from the same records.

    Attributes:
        mechanism: with its noise multiplier, under the same neighbouring relation and for the same unit.
        runs: how often it ran.
        source: where that is known from: "certificate <sha256>" or "an earlier attempt of this run".
    """

    mechanism: DPMechanism
    runs: int = 1
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """What epsilon and delta cover, from `make_promise`.

    Attributes:
        mechanism: of this run, with its noise multiplier.
        epsilon: promised for everything below together.
        delta: promised for everything below together.
        tuning_runs: runs of this mechanism in all, this one included; None when nothing is declared.
        unpaid_runs: earlier runs from which options were chosen and that epsilon is NOT for; told, never priced.
        prior: what was released before.
    """

    mechanism: DPMechanism
    epsilon: float
    delta: float
    tuning_runs: int | None = None
    unpaid_runs: int | None = None
    prior: tuple[Release, ...] = ()

    @property
    def event(self) -> dp_accounting.DpEvent:
        """Everything that epsilon is for."""
        return composed_event(self.mechanism, self.tuning_runs, self.prior)

    @property
    def priced(self) -> float:
        """The price of all of it at `delta`, by PLD; at most `epsilon`."""
        return accounting.epsilon(self.event, self.delta, self.mechanism.neighboring_relation)

    @property
    def priced_by_rdp(self) -> float | None:
        """The same by RDP, an independent and looser bound; None where RDP has no price."""
        event, relation = self.event, self.mechanism.neighboring_relation
        if not accounting.rdp_can_price(event, relation):
            return None
        return accounting.epsilon(event, self.delta, relation, "rdp")


def composed_event(
    mechanism: DPMechanism, tuning_runs: int | None = None, prior: Sequence[Release] = ()
) -> dp_accounting.DpEvent:
    """`tuning_runs` times the mechanism, and every earlier release; equal mechanisms are priced as one.

    Raises:
        UserError: a count is out of range, there are too many updates or releases in all, or a release has another
            relation or unit, so that no price adds up.
    """
    runs = 1 if tuning_runs is None else check_count("tuning_runs", tuning_runs, MAX_RUNS, "--tuning_runs 10")
    if len(prior) > MAX_RELEASES:
        raise UserError(
            f"{len(prior)} earlier releases, unfinished attempts of this run included, are more than the "
            f"{MAX_RELEASES} that a certificate can list. No more can be promised to these records; train on others."
        )
    updates, times = mechanism.steps * runs, Counter({mechanism.event: runs})
    for release in prior:
        check_same_unit(release.mechanism, mechanism, release.source)
        updates += release.mechanism.steps * check_count("runs", release.runs, MAX_RUNS, "1")
        times[release.mechanism.event] += release.runs
    if updates > MAX_STEPS:
        raise UserError(
            f"{updates:,} noisy updates in all, tuning and earlier releases included, are more than the {MAX_STEPS:,} "
            "that can be priced. Take fewer --max_train_steps or --tuning_runs."
        )
    events = [
        event if count == 1 else dp_accounting.SelfComposedDpEvent(event, count) for event, count in times.items()
    ]
    return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(tuple(events))


def check_same_unit(earlier: DPMechanism, mechanism: DPMechanism, source: str) -> None:
    """Refuse to add up prices of different neighbouring relations or units.

    Raises:
        UserError: they differ; the message says in what.
    """
    for name in ("neighboring_relation", "max_examples_per_group"):
        before, now = getattr(earlier, name), getattr(mechanism, name)
        if before != now:
            raise UserError(
                f"the earlier release ({source}) has {name} {before}, this run {now}: their prices do not add up. "
                f"Give this run --{name} {before}."
            )


def make_promise(
    mechanism: DPMechanism,
    *,
    delta: float,
    epsilon: float | None,
    tuning_runs: int | None = None,
    unpaid_runs: int | None = None,
    prior: Sequence[Release] = (),
) -> Promise:
    """The promise of a run: its noise calibrated to `epsilon`, or the epsilon of its noise.

    Args:
        mechanism: without a noise multiplier it gets the smallest of 4 digits that keeps everything together at
            `epsilon` (invariant 11).
        delta: of the promise.
        epsilon: for everything together; None states the price, rounded up to 4 digits.
        tuning_runs: runs of this mechanism in all, this one included.
        unpaid_runs: earlier runs that the promise is not for, which it will say.
        prior: what was released before from the same records.

    Raises:
        UserError: a number is out of range, both kinds of runs are given, `epsilon` is not kept or cannot be, or
            neither noise nor epsilon is given.
    """
    mechanism.check_delta(delta)
    if unpaid_runs is not None:
        check_count("unpaid_runs", unpaid_runs, MAX_RUNS, "--unpaid_runs 10")
        if tuning_runs is not None:
            raise UserError("--tuning_runs pays for earlier runs and --unpaid_runs does not. Leave one of them out.")
    largest = EPSILONS[1] if epsilon is None else check_epsilon(epsilon)
    if mechanism.noise_multiplier is None:
        if epsilon is None:
            raise UserError("give either an epsilon or a noise multiplier. Type for example --epsilon 1.")
        mechanism = _calibrated(mechanism, epsilon, delta, tuning_runs, prior)
    promise = Promise(
        mechanism=mechanism,
        epsilon=largest,
        delta=delta,
        tuning_runs=tuning_runs,
        unpaid_runs=unpaid_runs,
        prior=tuple(prior),
    )
    if promise.priced > largest:
        rest = ", with what it is composed with," if tuning_runs or prior else ""
        raise UserError(
            f"this mechanism{rest} costs epsilon {promise.priced:.4g} at delta {delta:g}, above {largest:g}. "
            "Raise --noise_multiplier, take fewer --max_train_steps or a smaller --train_batch_size."
        )
    return promise if epsilon is not None else dataclasses.replace(promise, epsilon=round_up(promise.priced))


def _calibrated(
    mechanism: DPMechanism, epsilon: float, delta: float, tuning_runs: int | None, prior: Sequence[Release]
) -> DPMechanism:
    def with_noise(noise_multiplier: float) -> DPMechanism:
        return dataclasses.replace(mechanism, noise_multiplier=noise_multiplier)

    if prior:
        first, *others = prior
        spent_event = composed_event(first.mechanism, first.runs, others)
        spent = accounting.epsilon(spent_event, delta, mechanism.neighboring_relation)
        if spent >= epsilon:
            raise UserError(
                f"the earlier releases alone cost epsilon {spent:.4g} at delta {delta:g}; --epsilon {epsilon:g} is the "
                f"total, this run included. Give --epsilon above {spent:.4g}."
            )
    guess = guess_noise_multiplier(
        mechanism.sampling_prob * mechanism.max_examples_per_group, mechanism.steps * (tuning_runs or 1), epsilon, delta
    )
    return with_noise(
        smallest_noise_multiplier(
            lambda noise_multiplier: composed_event(with_noise(noise_multiplier), tuning_runs, prior),
            epsilon,
            delta,
            mechanism.neighboring_relation,
            guess,
        )
    )


def guarantee(promise: Promise) -> dict[str, Any]:
    """The numbers of the promise: epsilon, delta, mu-GDP, profile, attack odds and other units, all rounded up."""
    event, relation = promise.event, promise.mechanism.neighboring_relation
    return {
        "epsilon": promise.epsilon,
        "delta": promise.delta,
        "mu_gdp": accounting.mu_gdp(event, relation),
        "mu_gdp_smallest_delta": accounting.SMALLEST_PROFILE_DELTA,
        "profile": [
            {"epsilon": round_up(accounting.epsilon(event, delta, relation)), "delta": delta}
            for delta in PROFILE_DELTAS
        ],
        "max_tpr_at_fpr": {
            f"{rate:g}": accounting.max_tpr_at_fpr(event, relation, rate) for rate in FALSE_POSITIVE_RATES
        },
        "epsilon_replace_one": _replace_one(promise),
        "epsilon_per_image": _per_image(promise),
    }


def _replace_one(promise: Promise) -> float | None:
    """Epsilon for one record replaced by another, beside a zero_out promise; None where it has no finite price."""
    if promise.mechanism.neighboring_relation != "zero_out" or promise.mechanism.max_examples_per_group > 1:
        return None
    epsilon = accounting.epsilon(promise.event, promise.delta, "replace_one")
    return round_up(epsilon) if math.isfinite(epsilon) else None


def _per_image(promise: Promise) -> float | None:
    """Epsilon for one image of a group, mostly smaller than that of the group; None without groups.

    An image that is taken out may let another of its group step in, where the group has more than count: the change
    is that of one record replaced by another.
    """
    if promise.mechanism.max_examples_per_group == 1:
        return None

    def single(mechanism: DPMechanism) -> DPMechanism:
        return dataclasses.replace(mechanism, max_examples_per_group=1)

    prior = [dataclasses.replace(release, mechanism=single(release.mechanism)) for release in promise.prior]
    event = composed_event(single(promise.mechanism), promise.tuning_runs, prior)
    epsilon = accounting.epsilon(event, promise.delta, "replace_one")
    return round_up(epsilon) if math.isfinite(epsilon) else None


def not_counted(promise: Promise) -> str:
    """The sentence on runs that epsilon is not for; empty where none are told."""
    if promise.unpaid_runs is None:
        return ""
    return f"NOT counted: {promise.unpaid_runs} earlier run(s) on the same records, from which options were chosen."


def statement(promise: Promise, guarantee: dict[str, Any]) -> str:
    """The promise in plain words, with the figures of `guarantee`."""
    mechanism, epsilon, delta = promise.mechanism, guarantee["epsilon"], guarantee["delta"]
    k = mechanism.max_examples_per_group
    group = f"one group (at most {k} images with their labels or captions)"
    one = "one record (an image with its label or caption)" if k == 1 else group
    change = {
        "zero_out": f"Whether {one} was used or replaced by nothing",
        "add_or_remove_one": f"Whether {one} was in the data set or not",
        "replace_one": f"Whether {one} was used or another in its place",
    }[mechanism.neighboring_relation]
    known = "The number of records is not public."
    if mechanism.num_examples is not None:
        known = f"The number of records, {mechanism.num_examples}, is public."
    runs = promise.tuning_runs
    covered = ["this training" if runs is None else f"{runs} such trainings, this one included,"]
    covered += [f"of {len(promise.prior)} earlier release(s) from the same records"] if promise.prior else []
    accused = {"replace_one": "1 % of the records that another one replaced"}.get(
        mechanism.neighboring_relation, f"1 % of the {'records' if k == 1 else 'groups'} that were not used"
    )
    beside = ""
    if guarantee["epsilon_replace_one"] is not None:
        beside = f" For one record replaced by another, epsilon is {guarantee['epsilon_replace_one']:g}."
    if guarantee["epsilon_per_image"] is not None:
        smaller = "the smaller " if guarantee["epsilon_per_image"] < epsilon else ""
        beside = f" For one image of a group, epsilon is {smaller}{guarantee['epsilon_per_image']:g}."
    if promise.unpaid_runs is not None:
        beside += f" {not_counted(promise)}"
    return (
        f"{change} changes the probability of any outcome of {' and '.join(covered)} by a factor of at most "
        f"e^{epsilon:g} = {math.exp(epsilon):.4g}, and by {delta:g} on top. {known} An attacker who knows everything "
        f"else and accuses {accused} finds at most {100 * guarantee['max_tpr_at_fpr']['0.01']:.4g} % of those that "
        f"were.{beside} (epsilon {epsilon:g}, delta {delta:g}, neighbouring relation "
        f"{mechanism.neighboring_relation}, {guarantee['mu_gdp']:g}-GDP down to delta "
        f"{guarantee['mu_gdp_smallest_delta']:g}.)"
    )
