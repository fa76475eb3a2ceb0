import numpy as np
import pytest
from scipy import stats

from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.randomness import generator

KEY = bytes(range(16))
N, Q, STEPS = 300, 0.2, 4000


@pytest.fixture(scope="module")
def masks():
    drawn = np.zeros((STEPS, N), dtype=bool)
    for step in range(STEPS):
        drawn[step, example_ids(KEY, step, N, Q)] = True
    return drawn


def chi_square(counts, trials):
    """p-value of counts ~ Binomial(trials, Q), by the sum of squared deviations."""
    statistic = np.sum((counts - trials * Q) ** 2) / (trials * Q * (1 - Q))
    return 2 * min(stats.chi2.cdf(statistic, len(counts)), stats.chi2.sf(statistic, len(counts)))


def test_batch_sizes_are_binomial_in_mean_and_spread(masks):
    sizes = masks.sum(axis=1)
    assert abs(sizes.mean() - N * Q) < 5 * np.sqrt(N * Q * (1 - Q) / STEPS)
    assert chi_square(sizes, N) > 1e-6


def test_each_example_takes_part_binomially_often(masks):
    assert chi_square(masks.sum(axis=0), STEPS) > 1e-6


def test_examples_are_pairwise_independent(masks):
    correlation = np.corrcoef(masks.T.astype(float))[np.triu_indices(N, 1)]
    assert np.abs(correlation).max() < stats.norm.isf(1e-6 / len(correlation) / 2) / np.sqrt(STEPS)


def test_consecutive_steps_overlap_as_independent_draws_do(masks):
    overlap = (masks[1:] & masks[:-1]).sum()
    expected = (STEPS - 1) * N * Q**2
    assert abs(overlap - expected) < 7 * np.sqrt(expected)


def test_ids_are_those_of_the_uniform_numbers_below_q_one_by_one():
    for step in range(5):
        uniform = generator(KEY, "sampling", step).random(N)
        assert example_ids(KEY, step, N, Q).tolist() == [i for i in range(N) if uniform[i] < Q]


def test_ids_are_sorted_int64_and_the_same_every_time():
    ids = example_ids(KEY, 3, N, Q)
    assert ids.dtype == np.int64
    assert np.all(np.diff(ids) > 0)
    assert np.array_equal(ids, example_ids(KEY, 3, N, Q))
    assert not np.array_equal(ids, example_ids(KEY, 4, N, Q))
    assert not np.array_equal(ids, example_ids(KEY[::-1], 3, N, Q))


def test_one_record_more_changes_nobody_elses_part():
    with_one_more = example_ids(KEY, 9, N + 1, Q)
    assert np.array_equal(with_one_more[with_one_more < N], example_ids(KEY, 9, N, Q))


def test_probability_one_takes_everybody_and_a_tiny_one_gives_empty_steps():
    assert np.array_equal(example_ids(KEY, 0, N, 1.0), np.arange(N))
    assert example_ids(KEY, 0, N, 1e-12).shape == (0,)


def test_a_cap_keeps_a_subset_of_the_sample_and_leaves_smaller_samples_alone():
    for step in range(200):
        whole, capped = example_ids(KEY, step, 60, 0.5), example_ids(KEY, step, 60, 0.5, 30)
        if len(whole) <= 30:
            assert np.array_equal(whole, capped)
        else:
            assert len(capped) == 30 and set(capped) <= set(whole) and np.array_equal(capped, np.sort(capped))


def test_of_a_sample_above_the_cap_every_member_is_kept_as_often():
    steps, n, cap = 4000, 20, 5
    counts = sum(np.bincount(example_ids(KEY, step, n, 1.0, cap), minlength=n) for step in range(steps))
    statistic = ((counts - steps * cap / n) ** 2).sum() / (steps * cap / n * (1 - cap / n)) * (n - 1) / n
    assert stats.chi2.sf(statistic, n - 1) > 5e-7 and stats.chi2.cdf(statistic, n - 1) > 5e-7
    pairs = np.zeros((n, n))
    for step in range(steps):
        ids = example_ids(KEY, step, n, 1.0, cap)
        pairs[np.ix_(ids, ids)] += 1
    expected = steps * cap * (cap - 1) / (n * (n - 1))
    off_diagonal = pairs[~np.eye(n, dtype=bool)]
    assert np.abs(off_diagonal - expected).max() < 6 * np.sqrt(expected)
