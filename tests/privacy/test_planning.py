import dataclasses
import math

import numpy as np
import pytest

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.planning import noise_per_step, outlook, plan_rows, signal_to_noise

N = 1437


def mechanism(noise_multiplier=14.78, steps=200, batch=400, num_examples=N, max_grad_norm=1.0):
    return DPMechanism(
        sampling_prob=batch / num_examples,
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=batch,
        num_examples=num_examples,
    )


def test_a_table_has_a_calibrated_row_for_every_batch_size_and_number_of_steps():
    rows = list(plan_rows(60000, 1.0, 1e-5, [4096], [200, 1000]))
    assert [row.mechanism.steps for row in rows] == [200, 1000]
    assert [row.mechanism.noise_multiplier for row in rows] == pytest.approx([3.778, 8.134], rel=1e-3)
    assert all(row.mechanism.epsilon(1e-5) <= 1.0 for row in rows)
    assert [row.passes for row in rows] == pytest.approx([200 * 4096 / 60000, 1000 * 4096 / 60000])
    assert rows[0].noise_per_step == rows[0].mechanism.noise_multiplier / 4096


@pytest.mark.parametrize("num_examples", [0, -1, 1.5, math.nan, True, "60000", 100])
def test_a_table_for_no_or_too_few_examples_is_refused(num_examples):
    with pytest.raises(UserError):
        list(plan_rows(num_examples, 1.0, 1e-5, [200], [10]))


def test_noise_per_step_is_the_norm_of_simulated_noise_over_the_batch():
    d, plan = 10_000, mechanism(max_grad_norm=0.5)
    noise = np.random.default_rng(0).normal(0, plan.noise_stddev, d) / plan.expected_batch_size
    assert np.linalg.norm(noise) / plan.max_grad_norm == pytest.approx(noise_per_step(plan, d), rel=0.05)


def test_signal_to_noise_is_that_of_a_simulated_run():
    d, plan, rng = 4_000, mechanism(steps=50), np.random.default_rng(0)
    direction = np.eye(1, d)[0]
    signal, noise = np.zeros(d), np.zeros(d)
    for _ in range(plan.steps):
        signal += plan.expected_batch_size * 0.2 * direction
        noise += rng.normal(0, plan.noise_stddev, d)
    assert signal_to_noise(plan, d) == pytest.approx(np.linalg.norm(signal) / np.linalg.norm(noise), rel=0.05)


@pytest.mark.parametrize(("batch", "steps"), [(400, 200), (N, 100)])
def test_at_epsilon_1_signal_to_noise_is_the_rule_of_thumb(batch, steps):
    plan = mechanism(None, steps, batch).calibrate(1.0, 1e-5)
    assert signal_to_noise(plan, 13_000, signal=0.3) == pytest.approx(0.3 * N * 0.268 / math.sqrt(13_000), rel=0.02)


def test_the_outlook_names_what_would_help_and_following_it_helps():
    poor = mechanism()
    words = outlook(poor, 500_000)
    assert "next to nothing" in words and "What would help" in words
    times = 5 / signal_to_noise(poor, 500_000)
    assert f"{times:.2g} times as many images" in words
    assert signal_to_noise(poor, math.floor(500_000 / times**2)) >= 5
    assert "coarse" in outlook(poor, 1_000)
    rich = dataclasses.replace(poor, noise_multiplier=1.0)
    assert "follow the private images" in outlook(rich, 1_000)
    assert "help" not in outlook(rich, 1_000)
