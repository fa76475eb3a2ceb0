"""The noise: its size, where it goes, how often, and what it depends on."""

import numpy as np
import pytest
import torch
from scipy import stats

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.privacy.randomness import generator

KEY = bytes(range(16))
STDDEV = 0.7
SHAPES = {"a.weight": (40, 50), "b.weight": (1500,), "c.weight": (8, 4, 5, 5), "table": (64, 30)}


def totals(value=0.0):
    return {name: torch.full(shape, value, dtype=torch.float64) for name, shape in SHAPES.items()}


def two_sided(statistic, distribution):
    return 2 * min(distribution.cdf(statistic), distribution.sf(statistic))


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_every_tensor_gets_noise_of_the_promised_size_once(step):
    noise = add_noise(totals(), STDDEV, KEY, step)
    assert list(noise) == list(SHAPES)
    for name in SHAPES:
        values = noise[name].double().numpy().ravel() / STDDEV
        assert two_sided((values**2).sum(), stats.chi2(values.size)) > 1e-6, name
        assert two_sided(values.sum() / np.sqrt(values.size), stats.norm()) > 1e-6, name
        assert stats.kstest(values, "norm").pvalue > 1e-6, name


def test_every_row_of_a_class_table_gets_noise():
    rows = add_noise(totals(), STDDEV, KEY, 3)["table"].double().numpy() / STDDEV
    for row in rows:
        assert two_sided((row**2).sum(), stats.chi2(row.size)) > 1e-6


def test_noise_is_added_to_the_sum_and_cast_to_float32_once():
    noise, noisy = add_noise(totals(), STDDEV, KEY, 5), add_noise(totals(3.0), STDDEV, KEY, 5)
    for name, shape in SHAPES.items():
        assert noisy[name].dtype == torch.float32 and noisy[name].shape == shape
        torch.testing.assert_close(noisy[name] - 3.0, noise[name], rtol=0, atol=1e-6)
    # Below half a float32 step of 1e9, noise survives only if it is added in float64, before the cast.
    large = {"a": torch.full((4000,), 1e9 + 31, dtype=torch.float64)}
    assert len(add_noise(large, 5.0, KEY, 0)["a"].unique()) == 2


def test_each_number_is_the_half_sum_of_four_normals_of_the_steps_stream_in_float64():
    noisy, stream = add_noise(totals(3.0), STDDEV, KEY, 6), generator(KEY, "noise", 6)
    for name, shape in SHAPES.items():
        one, two, three, four = (stream.standard_normal(shape) for _ in range(4))
        expected = 3.0 + STDDEV * ((one + two + three + four) / 2)
        assert np.array_equal(noisy[name].numpy(), expected.astype(np.float32)), name


def test_the_same_key_and_step_give_the_same_bits_and_other_ones_do_not():
    first, again = add_noise(totals(), STDDEV, KEY, 7), add_noise(totals(), STDDEV, KEY, 7)
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)
    for other in (add_noise(totals(), STDDEV, KEY, 8), add_noise(totals(), STDDEV, bytes(16), 7)):
        for name in SHAPES:
            correlation = np.corrcoef(first[name].numpy().ravel(), other[name].numpy().ravel())[0, 1]
            assert abs(correlation) * first[name].numel() ** 0.5 < 6


def test_tensors_of_one_step_are_independent():
    twins = {name: torch.zeros(3000, dtype=torch.float64) for name in ("a", "b")}
    noise = add_noise(twins, STDDEV, KEY, 0)
    assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) * 3000**0.5 < 6


def test_the_clipped_sum_is_not_changed_in_place():
    total = totals(1.0)
    add_noise(total, STDDEV, KEY, 0)
    assert all((tensor == 1.0).all() for tensor in total.values())


@pytest.mark.parametrize("stddev", [0.0, -1.0, float("nan"), float("inf")])
def test_a_noise_stddev_that_protects_nothing_is_refused(stddev):
    with pytest.raises(PrivacyError, match="noise_stddev"):
        add_noise(totals(), stddev, KEY, 0)
