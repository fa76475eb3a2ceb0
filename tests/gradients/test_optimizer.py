"""The update: the optimizer sees the noisy mean and nothing else."""

import pytest
import torch
from torch import nn

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.gradients.optimizer import Ema, apply_update, make_optimizer


def two_parameters():
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}


def noisy_sums(count):
    return [{"a": torch.randn(3, 2), "b": torch.randn(4)} for _ in range(count)]


def test_sgd_moves_by_the_learning_rate_times_the_noisy_mean():
    parameters = two_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    (total,) = noisy_sums(1)
    apply_update(make_optimizer("sgd", parameters, 0.5), parameters, total, expected_batch_size=8)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * total[name] / 8)
        assert parameter.grad is None


def test_adam_equals_its_closed_form_over_steps():
    parameters, totals = two_parameters(), noisy_sums(5)
    optimizer = make_optimizer("adam", parameters, 0.01)
    expected = {name: p.detach().double() for name, p in parameters.items()}
    first = {name: 0.0 for name in expected}
    second = {name: 0.0 for name in expected}
    for step, total in enumerate(totals, start=1):
        apply_update(optimizer, parameters, total, expected_batch_size=8)
        for name in expected:
            mean = total[name].double() / 8
            first[name] = 0.9 * first[name] + 0.1 * mean
            second[name] = 0.999 * second[name] + 0.001 * mean**2
            scaled = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            expected[name] = expected[name] - 0.01 * first[name] / (1 - 0.9**step) / scaled
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_left_by_somebody_else_is_not_seen():
    parameters, (total,) = two_parameters(), noisy_sums(1)
    clean = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 100.0)
    apply_update(make_optimizer("sgd", parameters, 0.5), parameters, total, 8)
    apply_update(make_optimizer("sgd", clean, 0.5), clean, total, 8)
    assert all(torch.equal(parameters[name], clean[name]) for name in clean)


def test_a_tensor_without_noise_is_refused():
    parameters, (total,) = two_parameters(), noisy_sums(1)
    del total["b"]
    with pytest.raises(PrivacyError, match="b"):
        apply_update(make_optimizer("sgd", parameters, 0.5), parameters, total, 8)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="sgd"):
        make_optimizer("adamw", two_parameters(), 0.1)


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
