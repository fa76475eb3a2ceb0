"""What `dp-peft plan` can be asked; its options are made from these fields. Imports no accountant."""

from dataclasses import dataclass

from dp_peft_diffusion.recipe import NEIGHBORING_RELATIONS
from dp_peft_diffusion.typed_fields import option


@dataclass(frozen=True, kw_only=True)
class Question:
    """A promise with one thing left open: the noise, the epsilon, or, where both are given, the number of steps."""

    num_examples: int | None = option(None, help="images in the data set, N")
    epsilon: float | None = option(None, aliases=("target_epsilon",), help="promise of the whole run")
    delta: float = option(1e-5, aliases=("target_delta",), help="must be below 1/N")
    noise_multiplier: float | None = option(
        None, help="noise over clip bound, in place of epsilon; with epsilon, the most updates are found"
    )
    train_batch_size: tuple[int, ...] | None = option(
        None, aliases=("expected_batch_size",), help="expected batch sizes; none: three that suit N"
    )
    max_train_steps: tuple[int, ...] | None = option(None, help="updates; none: 100 and 1000")
    neighboring_relation: str = option(
        "zero_out", choices=NEIGHBORING_RELATIONS, help="how two data sets differ that must look alike"
    )
    sampling_prob: float | None = option(
        None, help="chance of each image in each update; add_or_remove_one needs it, in place of num_examples"
    )
    truncated_batch_size: int | None = option(None, help="most images in one update; none: no cap")
    max_examples_per_group: int = option(1, help="images of one owner, when the promise is for all of them")
    tuning_runs: int | None = option(None, help="runs on these images in all; epsilon is for all")
    prior_event: tuple[str, ...] | None = option(
        None, help="certificates of earlier releases from these images; epsilon is then for all together"
    )
