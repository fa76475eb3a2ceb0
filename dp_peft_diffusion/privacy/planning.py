"""What a budget buys, before anything is spent: noise, passes over the data, signal against noise, plain words.

Everything here is computed from public quantities only.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

from dp_peft_diffusion.privacy.accounting import MAX_EXAMPLES, check_count
from dp_peft_diffusion.privacy.mechanism import DPMechanism

SIGNAL = (0.1, 0.3)  # norm of the mean clipped gradient in units of the clip bound: what runs have shown
TYPICAL_SIGNAL = 0.2
FAINT, USEFUL = 1.0, 5.0  # signal to noise below which next to nothing, and above which something useful, is learned


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of the table of `dp-peft plan`.

    Attributes:
        mechanism: calibrated.
        noise_per_step: noise on one coordinate of the mean gradient, in units of the clip bound.
        passes: expected number of times each record is used.
    """

    mechanism: DPMechanism
    noise_per_step: float
    passes: float


def plan_rows(
    num_examples: int, epsilon: float, delta: float, expected_batch_sizes: Iterable[float], steps: Iterable[int]
) -> Iterator[PlanRow]:
    """One row for every batch size and number of steps under zero_out, as they are calibrated (seconds each).

    Raises:
        UserError: a number is out of range, or a batch is larger than the data set.
    """
    check_count("num_examples", num_examples, MAX_EXAMPLES, "--num_examples 60000")
    steps = tuple(steps)
    for batch in expected_batch_sizes:
        for count in steps:
            mechanism = DPMechanism(
                sampling_prob=batch / num_examples, steps=count, expected_batch_size=batch, num_examples=num_examples
            ).calibrate(epsilon, delta)
            yield PlanRow(mechanism, noise_per_step(mechanism), count * mechanism.sampling_prob)


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
