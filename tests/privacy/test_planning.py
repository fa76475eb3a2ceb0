import dataclasses
import math

import numpy as np
import pytest

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.planning import (
    KNEE,
    answers,
    answers_with_knee,
    noise_per_step,
    outlook,
    signal_to_noise,
)
from dp_peft_diffusion.privacy.promise import composed_event
from dp_peft_diffusion.privacy.question import Question
from tests.privacy.folders import make_folder

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


MNIST = {"num_examples": 60000, "train_batch_size": (4096,)}


def test_noise_is_sought_for_every_batch_size_and_number_of_steps():
    found = list(answers(Question(**MNIST, epsilon=1.0, max_train_steps=(200, 1000))))
    assert [promise.mechanism.steps for promise in found] == [200, 1000]
    assert [promise.mechanism.noise_multiplier for promise in found] == pytest.approx([3.778, 8.134], rel=1e-3)
    assert all(promise.priced <= 1.0 == promise.epsilon for promise in found)


def test_epsilon_is_sought_for_a_noise():
    (found,) = answers(Question(**MNIST, noise_multiplier=8.134, max_train_steps=(1000,)))
    assert found.epsilon == pytest.approx(1.0, abs=1e-3) and found.priced <= found.epsilon


@pytest.mark.parametrize("extra", [{}, {"tuning_runs": 3}, {"neighboring_relation": "replace_one"}])
def test_steps_are_sought_for_both_and_are_the_most(extra):
    (found,) = answers(Question(**MNIST, epsilon=1.0, noise_multiplier=9.0, **extra))
    assert found.priced <= 1.0
    one_more = dataclasses.replace(found.mechanism, steps=found.mechanism.steps + 1)
    price = accounting.epsilon(composed_event(one_more, found.tuning_runs), 1e-5, found.mechanism.neighboring_relation)
    assert price > 1.0


def test_the_most_steps_stop_at_what_can_be_priced():
    (found,) = answers(
        Question(num_examples=10**9, train_batch_size=(64,), epsilon=1.0, noise_multiplier=9.0, delta=1e-10)
    )
    assert found.mechanism.steps == 100_000
    (shared,) = answers(
        Question(
            num_examples=10**9, train_batch_size=(64,), epsilon=1.0, noise_multiplier=9.0, delta=1e-10, tuning_runs=3
        )
    )
    assert shared.mechanism.steps == 33_333


def test_earlier_releases_leave_less(tmp_path):
    make_folder(tmp_path / "run")
    asked = {"num_examples": 1797, "train_batch_size": (500,), "epsilon": 2.0}
    for open_thing in ({"max_train_steps": (200,)}, {"noise_multiplier": 4.0}):
        (alone,) = answers(Question(**asked, **open_thing))
        (after,) = answers(Question(**asked, **open_thing, prior_event=(str(tmp_path / "run"),)))
        assert after.prior and after.priced <= 2.0
        assert (
            after.mechanism.steps / after.mechanism.noise_multiplier
            < alone.mechanism.steps / alone.mechanism.noise_multiplier
        )


def test_where_a_full_batch_has_no_price_no_batch_is_the_knee():
    asked = {"num_examples": 10**6, "epsilon": 1e-3, "delta": 1e-7, "max_train_steps": (20_000,)}
    with pytest.raises(UserError, match="noise multiplier above"):
        list(answers(Question(**asked, train_batch_size=(10**6,))))
    ((_, knee),) = answers_with_knee(Question(**asked, train_batch_size=(64,)))
    assert not knee


def test_the_knee_is_the_smallest_batch_near_the_noise_of_a_full_one():
    batches = (256, 1024, 4096, 60000)
    found = list(
        answers_with_knee(Question(num_examples=60000, train_batch_size=batches, epsilon=1.0, max_train_steps=(1000,)))
    )
    noise = [noise_per_step(promise.mechanism) for promise, _ in found]
    near = [level <= KNEE * noise[-1] for level in noise]
    assert [knee for _, knee in found] == [False, True, False, False] and near == [False, True, True, True]
    given = answers_with_knee(
        Question(num_examples=60000, train_batch_size=batches, noise_multiplier=9.0, max_train_steps=(2,))
    )
    assert not any(knee for _, knee in given)


@pytest.mark.parametrize("num_examples", [None, 0, -1, 1.5, math.nan, True, "60000", 100])
def test_a_plan_for_no_or_too_few_examples_is_refused(num_examples):
    with pytest.raises(UserError):
        list(answers(Question(num_examples=num_examples, epsilon=1.0, train_batch_size=(200,))))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "give --epsilon, --noise_multiplier or both"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0, "max_train_steps": (5,)}, "Leave --max_train_steps out"),
        ({"epsilon": 0.01, "noise_multiplier": 0.5}, "one update of batch"),
        ({"epsilon": 1.0, "sampling_prob": 0.1}, "belongs to --neighboring_relation add_or_remove_one"),
        ({"epsilon": 1.0, "neighboring_relation": "add_or_remove_one"}, "hides the number of images"),
        ({"epsilon": 1.0, "prior_event": ("nowhere",)}, "--prior_event nowhere"),
    ],
)
def test_a_question_that_leaves_too_much_or_nothing_open_is_refused(asked, reason):
    with pytest.raises(UserError, match=reason):
        list(answers(Question(num_examples=1000, **asked)))


def test_under_add_or_remove_one_the_probability_is_given_and_n_is_not():
    asked = {"neighboring_relation": "add_or_remove_one", "sampling_prob": 4096 / 60000, "train_batch_size": (4096,)}
    ((found, knee),) = answers_with_knee(Question(**asked, epsilon=1.0, max_train_steps=(1000,)))
    assert found.mechanism.num_examples is None and not knee
    assert found.mechanism.noise_multiplier == pytest.approx(8.134, rel=1e-3)


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
