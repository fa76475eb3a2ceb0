"""The update: the optimizer sees the noisy mean and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.gradients.optimizer import Ema, apply_update, learning_rate_at, make_optimizer, set_learning_rate
from dp_peft_diffusion.recipe import Train
from dp_peft_diffusion.runs.state import restore, training_tensors

SGD = Train(optimizer="sgd", learning_rate=0.5)
ADAM = Train(optimizer="adam", learning_rate=0.01)
ADAM_BC = Train(optimizer="adam_bc", learning_rate=0.01, bias_correction_floor=0.1)


def two_parameters():
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}


def noisy_sums(count):
    return [{"a": torch.randn(3, 2), "b": torch.randn(4)} for _ in range(count)]


def after(train, totals, noise_stddev_of_mean=0.0):
    """Two parameters after one update for each total, of 8 expected examples."""
    parameters = two_parameters()
    optimizer = make_optimizer(train, parameters, noise_stddev_of_mean)
    for total in totals:
        apply_update(optimizer, parameters, total, expected_batch_size=8)
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_moves_by_the_learning_rate_times_the_noisy_means_it_remembers(momentum):
    expected = {name: p.detach().clone() for name, p in two_parameters().items()}
    totals, velocity = noisy_sums(4), {"a": 0.0, "b": 0.0}
    for total in totals:
        for name in expected:
            velocity[name] = momentum * velocity[name] + total[name] / 8
            expected[name] -= 0.5 * velocity[name]
    found = after(Train(optimizer="sgd", learning_rate=0.5, momentum=momentum), totals)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("train, noise_stddev", [(ADAM, 0.3), (ADAM_BC, 0.0), (ADAM_BC, 0.05), (ADAM_BC, 0.3)])
def test_adam_and_its_bias_correction_equal_their_closed_form_over_steps(train, noise_stddev):
    torch.manual_seed(1)
    totals, expected = noisy_sums(20), {name: p.detach().double() for name, p in two_parameters().items()}
    phi = noise_stddev**2 if train.optimizer == "adam_bc" else 0.0
    first, second, floored = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, 0
    for step, total in enumerate(totals, start=1):
        for name in expected:
            mean = total[name].double() / 8
            first[name] = 0.9 * first[name] + 0.1 * mean
            second[name] = 0.999 * second[name] + 0.001 * mean**2
            corrected = second[name] / (1 - 0.999**step) - phi
            floored += int((corrected < 0.1 * phi).sum())
            scaled = torch.where(corrected > 0.1 * phi, corrected, 0.1 * phi).sqrt() + 1e-8
            expected[name] = expected[name] - 0.01 * first[name] / (1 - 0.9**step) / scaled
    found = {name: tensor.double() for name, tensor in after(train, totals, noise_stddev).items()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (floored > 0) == (phi > 0)


def test_bias_correction_without_noise_is_torch_adam():
    torch.manual_seed(2)
    totals = noisy_sums(200)
    torch.testing.assert_close(after(ADAM_BC, totals), after(ADAM, totals), rtol=1e-6, atol=1e-6)


def test_what_is_subtracted_is_what_noise_adds():
    numbers, steps, stddev, expected_batch_size = 20_000, 50, 3.0, 16.0
    parameters = {"a": nn.Parameter(torch.zeros(numbers))}
    optimizer = make_optimizer(ADAM_BC, parameters, stddev / expected_batch_size)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = {"a": stddev * torch.randn(numbers, generator=generator)}
        apply_update(optimizer, parameters, noise, expected_batch_size)
    v_hat = optimizer.state[parameters["a"]]["exp_avg_sq"].double() / (1 - 0.999**steps)
    excess = v_hat / optimizer.noise_variance - 1
    assert abs(excess.mean()) < 5 * excess.std() / numbers**0.5  # p below 1e-6
    assert excess.std() == pytest.approx((2 / steps) ** 0.5, rel=0.05)


@pytest.mark.parametrize("train", [SGD, Train(optimizer="sgd", momentum=0.9), ADAM, ADAM_BC], ids=str)
def test_an_optimizer_restored_from_a_saved_state_goes_on_bit_for_bit(train):
    torch.manual_seed(3)
    totals = noisy_sums(6)
    parameters = two_parameters()
    optimizer, ema = make_optimizer(train, parameters, 0.1), Ema(parameters, 0.5)
    for total in totals[:3]:
        apply_update(optimizer, parameters, total, 8)
    saved = training_tensors(parameters, optimizer, ema)
    others = {name: nn.Parameter(torch.zeros_like(p)) for name, p in parameters.items()}
    other = make_optimizer(train, others, 0.1)
    restore(saved, others, other, Ema(others, 0.5))
    for total in totals[3:]:
        apply_update(optimizer, parameters, total, 8)
        apply_update(other, others, total, 8)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    if train.optimizer == "adam_bc":
        assert optimizer.state_dict()["state"].keys() == {0, 1}
        assert optimizer.state[parameters["a"]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_gradient_left_by_somebody_else_is_not_seen():
    parameters, (total,) = two_parameters(), noisy_sums(1)
    clean = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 100.0)
    apply_update(make_optimizer(SGD, parameters, 0.0), parameters, total, 8)
    apply_update(make_optimizer(SGD, clean, 0.0), clean, total, 8)
    assert all(torch.equal(parameters[name], clean[name]) for name in clean)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_tensor_without_noise_is_refused():
    parameters, (total,) = two_parameters(), noisy_sums(1)
    del total["b"]
    with pytest.raises(PrivacyError, match="b"):
        apply_update(make_optimizer(SGD, parameters, 0.0), parameters, total, 8)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="adam_bc"):
        make_optimizer(Train(optimizer="adamw"), two_parameters(), 0.1)


@given(
    st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 3000), st.integers(0, 3000), st.floats(1e-6, 10)
)
def test_the_step_size_rises_then_falls_and_no_update_has_none(name, steps, warmup, peak):
    train = Train(lr_scheduler=name, max_train_steps=steps, lr_warmup_steps=min(warmup, steps - 1), learning_rate=peak)
    values = [learning_rate_at(train, step) for step in range(steps)]
    rise, fall = values[: train.lr_warmup_steps], values[train.lr_warmup_steps :]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert min(values) > 0 and max(values) == fall[0] == peak


def test_the_step_size_follows_its_line_and_its_cosine():
    line = Train(lr_scheduler="linear", max_train_steps=12, lr_warmup_steps=4, learning_rate=8.0)
    assert [learning_rate_at(line, step) for step in range(12)] == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    half = Train(lr_scheduler="cosine", max_train_steps=12, learning_rate=8.0)
    assert [learning_rate_at(half, step) for step in (0, 4, 6, 8)] == pytest.approx([8, 6, 4, 2])
    constant = Train(max_train_steps=3, learning_rate=8.0)
    assert [learning_rate_at(constant, step) for step in range(3)] == [8, 8, 8]


@pytest.mark.parametrize("train", [SGD, ADAM, ADAM_BC], ids=str)
def test_a_step_size_that_is_set_is_the_one_that_is_used(train):
    small, large = two_parameters(), two_parameters()
    (total,) = noisy_sums(1)
    for parameters, value in ((small, 1e-3), (large, 2e-3)):
        optimizer = make_optimizer(train, parameters, 0.0)
        set_learning_rate(optimizer, value)
        apply_update(optimizer, parameters, total, 8)
    start = two_parameters()
    for name in start:
        torch.testing.assert_close(large[name] - start[name], 2 * (small[name] - start[name]), rtol=1e-3, atol=1e-7)


def test_ema_equals_its_recursion_with_a_warm_start():
    parameters = two_parameters()
    ema, expected = Ema(parameters, decay=0.5), parameters["a"].detach().clone()
    for n in range(1, 20):
        with torch.no_grad():
            parameters["a"].add_(torch.randn(3, 2))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameters["a"].detach()
    torch.testing.assert_close(ema.average["a"], expected)


def test_ema_of_decay_zero_is_the_last_weights():
    parameters = two_parameters()
    ema = Ema(parameters, decay=0.0)
    with torch.no_grad():
        parameters["a"].fill_(3.0)
    ema.update()
    assert (ema.average["a"] == 3.0).all()


def test_ema_is_swapped_in_for_a_block_and_out_again_even_after_an_error():
    parameters = two_parameters()
    ema = Ema(parameters, decay=0.9)
    start = parameters["a"].detach().clone()
    with torch.no_grad():
        parameters["a"].fill_(3.0)
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert torch.equal(parameters["a"], start)
        _ = 1 / 0
    assert (parameters["a"] == 3.0).all()
    other = {"a": nn.Parameter(torch.zeros(3, 2))}
    ema.copy_to(other)
    assert torch.equal(other["a"], start)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_ema_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(UserError, match="ema_decay"):
        Ema(two_parameters(), decay)
