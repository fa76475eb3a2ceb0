import numpy as np
import pytest
import torch

from dp_peft_diffusion.diffusion.draws import draw_dropped_labels, draw_noise, draw_timesteps

KEY = b"0123456789abcdef"


def all_draws(step, ids):
    return (
        draw_timesteps(KEY, step, ids, 4, 1000),
        draw_noise(KEY, step, ids, 4, (2, 3)),
        draw_dropped_labels(KEY, step, ids, 4, 0.5),
    )


def test_an_example_draws_the_same_alone_and_in_any_batch():
    together = all_draws(7, np.array([5, 2, 9]))
    for place, example in enumerate([5, 2, 9]):
        alone = all_draws(7, np.array([example]))
        assert all(torch.equal(a[place], b[0]) for a, b in zip(together, alone, strict=True))


def test_draws_differ_between_steps_and_examples():
    _, noise, _ = all_draws(0, np.arange(3))
    _, later, _ = all_draws(1, np.arange(3))
    rows = torch.cat([noise, later]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 6
    ids = np.arange(50)
    for now, then in zip(all_draws(0, ids), all_draws(1, ids), strict=True):
        assert not torch.equal(now, then)


def test_timesteps_are_uniform_and_spread_over_the_draws_of_one_example():
    timesteps = draw_timesteps(KEY, 0, np.arange(5000), 4, 1000)
    parts = timesteps // 250
    assert torch.equal(parts, torch.arange(4).expand(5000, 4))
    counts = np.bincount(timesteps.flatten() // 10, minlength=100)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 180  # 99 degrees of freedom: p below 1e-6


def test_noise_is_standard_normal_and_labels_drop_at_their_rate():
    _, noise, _ = all_draws(3, np.arange(5000))
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    dropped = draw_dropped_labels(KEY, 3, np.arange(5000), 4, 0.2).double().mean().item()
    assert dropped == pytest.approx(0.2, abs=5 * (0.16 / 20000) ** 0.5)
