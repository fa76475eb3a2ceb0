"""Which example ids take part in step t."""

import numpy as np

from dp_peft_diffusion.privacy.randomness import Purpose, generator


def example_ids(
    key: bytes, step: int, num_examples: int, sampling_prob: float, truncated_batch_size: int | None = None
) -> np.ndarray:
    """The Poisson sample of one step: each id in [0, num_examples) kept independently with `sampling_prob`.

    Id i is kept when the i-th uniform number of the step's stream is below q, whatever the records hold and
    whoever else takes part (invariant 5). The sample can be empty, and is a step all the same (invariant 6).
    Of a sample above `truncated_batch_size`, a subset of that size stays, each as likely as any other.

    Returns:
        Sorted int64 ids, (b,). Secret: neither they nor their number leave the private folder (invariant 13).
    """
    uniform = generator(key, Purpose.SAMPLING, step).random(num_examples)
    ids = np.flatnonzero(uniform < sampling_prob).astype(np.int64)
    if truncated_batch_size is None or len(ids) <= truncated_batch_size:
        return ids
    kept = generator(key, Purpose.TRUNCATION, step).choice(len(ids), truncated_batch_size, replace=False)
    return ids[np.sort(kept)]
