"""What a budget buys, before anything is spent: noise, steps, passes over the data, the knee, plain words.

Everything here is computed from public quantities only.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.composition import read_prior
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise, composed_event, make_promise
from dp_peft_diffusion.privacy.question import Question
from dp_peft_diffusion.privacy.ranges import MAX_EXAMPLES, MAX_STEPS, check_count, check_epsilon, check_sampling_prob

BATCHES = (64, 256, 1024, 4096, 16384)
STEPS = (100, 1000)
KNEE = 1.1  # noise per step over that of a full batch, at which a larger batch is hardly worth its time
SIGNAL = (0.1, 0.3)  # norm of the mean clipped gradient in units of the clip bound: what runs have shown
TYPICAL_SIGNAL = 0.2
FAINT, USEFUL = 1.0, 5.0  # signal to noise below which next to nothing, and above which something useful, is learned


def answers(question: Question) -> Iterator[Promise]:
    """One promise for every batch size and number of steps, small batches first, as they are found (seconds each).

    Raises:
        UserError: a number is out of range, the question leaves something open, or no mechanism keeps the promise.
    """
    if question.epsilon is None and question.noise_multiplier is None:
        raise UserError("give --epsilon, --noise_multiplier or both. Type for example --epsilon 1.")
    if question.epsilon is not None and question.noise_multiplier is not None:
        if question.max_train_steps is not None:
            raise UserError("--epsilon and --noise_multiplier together give the steps. Leave --max_train_steps out.")
        for batch in _batch_sizes(question):
            yield _promise(question, batch, _most_steps(question, batch))
        return
    for batch, steps in itertools.product(_batch_sizes(question), question.max_train_steps or STEPS):
        yield _promise(question, batch, steps)


def answers_with_knee(question: Question) -> Iterator[tuple[Promise, bool]]:
    """Every answer, and whether its batch is the knee: the smallest whose noise per step is near that of a full batch.

    Near is at most 10 % above. A smaller batch has more noise than its share, as amplification by sampling wears off;
    with a larger one the noise grows as the batch does, and only the time of a step grows on. Only where the noise is
    sought and N is public is any batch the knee, and not where a full batch has no price.
    """
    limits: dict[int, float] = {}
    for promise in answers(question):
        steps, knee = promise.mechanism.steps, False
        if question.num_examples is not None and question.noise_multiplier is None:
            if steps not in limits:
                limits[steps], full = 0.0, dataclasses.replace(question, truncated_batch_size=None)
                with contextlib.suppress(UserError):
                    limits[steps] = KNEE * noise_per_step(_promise(full, question.num_examples, steps).mechanism)
            knee = noise_per_step(promise.mechanism) <= limits[steps]
            limits[steps] = 0.0 if knee else limits[steps]  # the smallest only
        yield promise, knee


def _batch_sizes(question: Question) -> Sequence[int]:
    n, batches = question.num_examples, question.train_batch_size
    if question.neighboring_relation == "add_or_remove_one":
        if n is not None or question.sampling_prob is None or batches is None or len(batches) != 1:
            raise UserError(
                "--neighboring_relation add_or_remove_one hides the number of images. Give --sampling_prob and one "
                "--train_batch_size, and no --num_examples."
            )
        return batches
    if question.sampling_prob is not None:
        raise UserError("--sampling_prob belongs to --neighboring_relation add_or_remove_one. Leave it out.")
    n = check_count("num_examples", n, MAX_EXAMPLES, "--num_examples 60000")
    for batch in batches or ():
        if not 1 <= batch <= n:
            raise UserError(f"--train_batch_size {batch} is not between 1 and --num_examples {n}.")
    return sorted(batches or (*[batch for batch in BATCHES if 4 * batch <= n][-2:], max(1, n // 2)))


def _mechanism(question: Question, batch: int, steps: int) -> DPMechanism:
    sampling_prob = question.sampling_prob
    if question.num_examples is not None:
        sampling_prob = batch / question.num_examples
    return DPMechanism(
        sampling_prob=check_sampling_prob(sampling_prob),
        steps=steps,
        noise_multiplier=question.noise_multiplier,
        expected_batch_size=batch,
        num_examples=question.num_examples,
        neighboring_relation=question.neighboring_relation,
        truncated_batch_size=question.truncated_batch_size,
        max_examples_per_group=question.max_examples_per_group,
    )


def _promise(question: Question, batch: int, steps: int) -> Promise:
    mechanism = _mechanism(question, batch, steps)
    return make_promise(
        mechanism,
        delta=question.delta,
        epsilon=question.epsilon,
        tuning_runs=question.tuning_runs,
        prior=read_prior(question.prior_event or (), mechanism),
    )


def _most_steps(question: Question, batch: int) -> int:
    """The largest number of steps that keeps epsilon with the given noise."""
    epsilon = check_epsilon(question.epsilon)
    prior = read_prior(question.prior_event or (), _mechanism(question, batch, 1))

    def kept(steps: int) -> bool:
        mechanism = _mechanism(question, batch, steps)
        mechanism.check_delta(question.delta)
        event = composed_event(mechanism, question.tuning_runs, prior)
        return accounting.epsilon(event, question.delta, question.neighboring_relation) <= epsilon

    if not kept(1):
        raise UserError(
            f"one update of batch {batch} with --noise_multiplier {question.noise_multiplier:g} costs more than "
            f"--epsilon {epsilon:g}. Raise --noise_multiplier."
        )
    spent = sum(release.mechanism.steps * release.runs for release in prior)
    largest = (MAX_STEPS - spent) // (question.tuning_runs or 1)
    good, bad = 1, 2
    while bad <= largest and kept(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, largest + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if kept(middle) else (good, middle)
    return good


def noise_per_step(mechanism: DPMechanism, trainable_parameters: int = 1) -> float:
    """Expected norm of the noise on the mean gradient, in units of the clip bound: sigma sqrt(d) / B.

    Args:
        mechanism: calibrated.
        trainable_parameters: d; 1 gives the noise on one coordinate.
    """
    noise = mechanism.noise_stddev / mechanism.max_grad_norm
    return noise * math.sqrt(trainable_parameters) / mechanism.expected_batch_size


def signal_to_noise(mechanism: DPMechanism, trainable_parameters: int, signal: float = TYPICAL_SIGNAL) -> float:
    """Signal to noise of the whole run: s B sqrt(T) / (sigma sqrt(d)).

    T steps of one direction add up to s B T, their noise to sigma sqrt(T d). With mu = q sqrt(T) / sigma, the mu-GDP
    of the mechanism for all but tiny noise multipliers, this is s N mu / sqrt(d): whatever the number of steps, and
    s N 0.268 / sqrt(d) at epsilon 1, delta 1e-5.

    Args:
        mechanism: calibrated.
        trainable_parameters: d.
        signal: s, norm of the mean clipped gradient in units of the clip bound.
    """
    return signal / (noise_per_step(mechanism, trainable_parameters) / math.sqrt(mechanism.steps))


def outlook(mechanism: DPMechanism, trainable_parameters: int) -> str:
    """What to expect of a run, and what would help, in plain words."""
    ratio = signal_to_noise(mechanism, trainable_parameters)
    low, high = (signal_to_noise(mechanism, trainable_parameters, signal) for signal in SIGNAL)
    figures = (
        f"Noise per step is {noise_per_step(mechanism, trainable_parameters):.2g} times the clip bound; over the whole "
        f"run the signal is about {low:.2g} to {high:.2g} times the noise."
    )
    if ratio >= USEFUL:
        return f"{figures} Expect samples that follow the private images."
    expected = (
        "Expect next to nothing: the samples will look like the base's own."
        if ratio < FAINT
        else "Expect the coarse features of the private images, and many wrong samples."
    )
    lacking = USEFUL / ratio
    fewer = max(1, math.floor(trainable_parameters / lacking**2))
    return (
        f"{figures} {expected} What would help: {lacking:.2g} times as many images, a larger epsilon, "
        f"or about {fewer:,} trainable parameters instead of {trainable_parameters:,}."
    )
