"""What is promised: a Poisson-sampled Gaussian mechanism, its noise and its price, in one frozen object."""

import dataclasses
import math

import dp_accounting

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.calibration import guess_noise_multiplier, smallest_noise_multiplier
from dp_peft_diffusion.privacy.ranges import (
    MAX_EXAMPLES,
    MAX_EXAMPLES_PER_GROUP,
    MAX_STEPS,
    check_count,
    check_delta,
    check_neighboring_relation,
    check_noise_multiplier,
    check_number,
    check_sampling_prob,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMechanism:
    """`steps` noisy sums of clipped per-example gradients over Poisson samples.

    Attributes:
        sampling_prob: q in (0, 1], of each record in each step (invariant 5).
        steps: planned number of noisy updates; the promise is for all of them (invariant 16).
        noise_multiplier: standard deviation of the noise in units of `max_grad_norm`; None until calibrated.
        max_grad_norm: clip bound C of one record's gradient (invariant 1).
        expected_batch_size: public divisor of the noisy sum (invariant 3).
        num_examples: N, public under zero_out and replace_one, which need it; private under add_or_remove_one, which
            refuses it.
        neighboring_relation: "zero_out" (one record replaced by nothing), "add_or_remove_one" or "replace_one" (by
            another record).
        truncated_batch_size: most records of one sample, the rest left out at random; None for no cap. Needs N.
        max_examples_per_group: k; above 1 the neighbour differs in all records of one group of at most k.

    Raises:
        UserError: a field is out of range, sampling_prob * num_examples is not expected_batch_size, or the
            combination has no known price.
    """

    sampling_prob: float
    steps: int
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    expected_batch_size: float
    num_examples: int | None = None
    neighboring_relation: str = "zero_out"
    truncated_batch_size: int | None = None
    max_examples_per_group: int = 1

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        check_count("steps", self.steps, MAX_STEPS, "--max_train_steps 100")
        if self.noise_multiplier is not None:
            check_noise_multiplier(self.noise_multiplier)
        check_number("max_grad_norm", self.max_grad_norm, 1e-9, 1e9, "--max_grad_norm 1.0")
        check_number("expected_batch_size", self.expected_batch_size, 1e-9, 1e12, "--train_batch_size 256")
        check_neighboring_relation(self.neighboring_relation)
        check_count("max_examples_per_group", self.max_examples_per_group, MAX_EXAMPLES_PER_GROUP, "4")
        self._check_num_examples()
        self._check_combination()

    def _check_num_examples(self) -> None:
        if self.neighboring_relation == "add_or_remove_one":
            if self.num_examples is not None:
                raise UserError(
                    "num_examples is private under add_or_remove_one, and nothing may be derived from it. "
                    "Leave it out, or take --neighboring_relation zero_out."
                )
            return
        num_examples = check_count("num_examples", self.num_examples, MAX_EXAMPLES, "the number of images")
        if not math.isclose(self.sampling_prob * num_examples, self.expected_batch_size, rel_tol=1e-9):  # invariant 5
            raise UserError(
                f"sampling_prob * num_examples is {self.sampling_prob * num_examples:g}, but expected_batch_size is "
                f"{self.expected_batch_size:g}. Take sampling_prob = expected_batch_size / num_examples."
            )

    def _check_combination(self) -> None:
        """Refuse what has no known price; certificates come from strangers."""
        if self.max_examples_per_group > 1 and self.neighboring_relation == "replace_one":
            raise UserError(
                "groups (max_examples_per_group above 1) under replace_one have no known price. "
                "Take --neighboring_relation zero_out."
            )
        if self.truncated_batch_size is None:
            return
        if self.num_examples is None:
            raise UserError(
                "truncated_batch_size has a price only where the number of records is public. "
                "Leave it out, or take --neighboring_relation zero_out."
            )
        if self.max_examples_per_group > 1:
            raise UserError("truncated_batch_size together with groups has no known price. Leave one of them out.")
        check_count("truncated_batch_size", self.truncated_batch_size, self.num_examples, "twice --train_batch_size")

    @property
    def event(self) -> dp_accounting.DpEvent:
        """What the accountants price.

        Raises:
            UserError: the noise multiplier is not chosen yet.
        """
        return accounting.gaussian_event(
            self.sampling_prob,
            self._chosen_noise_multiplier(),
            self.steps,
            max_examples_per_group=self.max_examples_per_group,
            truncated_batch_size=self.truncated_batch_size,
            num_examples=self.num_examples,
        )

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on every coordinate of the clipped sum (invariant 11).

        Raises:
            UserError: the noise multiplier is not chosen yet.
        """
        return self._chosen_noise_multiplier() * self.max_grad_norm  # invariant 11: under every relation

    def epsilon(self, delta: float) -> float:
        """The price of all planned steps at `delta`, by PLD.

        Raises:
            UserError: delta is out of range or not below 1/N, or the noise multiplier is not chosen yet.
        """
        self.check_delta(delta)
        return accounting.epsilon(self.event, delta, self.neighboring_relation)

    def calibrate(self, epsilon: float, delta: float) -> "DPMechanism":
        """The same mechanism with the smallest noise multiplier (4 digits, rounded up) that keeps the promise.

        Raises:
            UserError: epsilon or delta is out of range, delta is not below 1/N, or no noise is enough.
        """
        self.check_delta(delta)
        noise_multiplier = smallest_noise_multiplier(
            lambda noise_multiplier: dataclasses.replace(self, noise_multiplier=noise_multiplier).event,
            epsilon,
            delta,
            self.neighboring_relation,
            guess_noise_multiplier(self.sampling_prob * self.max_examples_per_group, self.steps, epsilon, delta),
        )
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    def check_delta(self, delta: float) -> None:
        """Delta in range and below 1/N: at 1/N, publishing one whole record would keep the promise.

        Raises:
            UserError: it is not.
        """
        check_delta(delta)
        if self.num_examples is not None and delta * self.num_examples >= 1:
            raise UserError(
                f"delta {delta:g} is not below 1/N = 1/{self.num_examples}: publishing one whole image would keep "
                f"such a promise. Try --delta {min(1e-5, 10.0 ** math.floor(-math.log10(10 * self.num_examples))):g}."
            )

    def _chosen_noise_multiplier(self) -> float:
        if self.noise_multiplier is None:
            raise UserError("the noise multiplier is not chosen yet. Call calibrate(epsilon, delta), or give it.")
        return self.noise_multiplier
