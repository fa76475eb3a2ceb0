"""Which example ids take part in step t."""

import numpy as np

from dp_peft_diffusion.privacy.randomness import Purpose, generator


def example_ids(key: bytes, step: int, num_examples: int, sampling_prob: float) -> np.ndarray:
    """The Poisson sample of one step: each id in [0, num_examples) kept independently with `sampling_prob`.

    Id i is kept when the i-th uniform number of the step's stream is below q, whatever the records hold and
    whoever else takes part (invariant 5). The sample can be empty, and is a step all the same (invariant 6).

    Returns:
        Sorted int64 ids, (b,). Secret: neither they nor their number leave the private folder (invariant 13).
    """
    uniform = generator(key, Purpose.SAMPLING, step).random(num_examples)
    return np.flatnonzero(uniform < sampling_prob).astype(np.int64)
