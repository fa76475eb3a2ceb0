"""Optimizers on a noisy mean, their step size over a run, and the average of the weights they pass through.

All of it is post-processing of noisy sums, and costs no privacy.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.recipe import Train

Parameters = dict[str, nn.Parameter]


def make_optimizer(train: Train, parameters: Parameters, noise_stddev_of_mean: float) -> torch.optim.Optimizer:
    """SGD with momentum, Adam, or Adam that knows of the noise; none has weight decay.

    Args:
        train: names the optimizer and its settings.
        parameters: name -> trainable tensor.
        noise_stddev_of_mean: standard deviation of the noise in each coordinate of the gradient that the optimizer
            sees, noise_stddev / expected_batch_size; 0 without privacy.

    Raises:
        UserError: another name.
    """
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters.values(), lr=train.learning_rate, momentum=train.momentum)
    if train.optimizer == "adam":
        return torch.optim.Adam(parameters.values(), lr=train.learning_rate)
    if train.optimizer == "adam_bc":
        noise_variance = noise_stddev_of_mean**2
        return AdamBC(parameters.values(), train.learning_rate, noise_variance, train.bias_correction_floor)
    raise UserError(f'--optimizer {train.optimizer!r} is unknown. Use "sgd", "adam" or "adam_bc".')


class AdamBC(torch.optim.Optimizer):
    """Adam without the part of the second moment that is known to be noise.

    Noise of variance phi raises the mean of each squared gradient by phi, so the step is
    m_hat / (sqrt(max(v_hat - phi, floor * phi)) + 1e-8): DP-AdamBC (Tang, Shpilevskiy and Lecuyer 2024, arXiv
    2312.14334), with its least second moment given as a share of phi. With phi = 0 it is Adam.

    Args:
        parameters: trainable tensors.
        lr: step size.
        noise_variance: phi, of each coordinate of the gradient that the optimizer sees.
        floor: least second moment, as a share of phi.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, noise_variance: float, floor: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
        self.noise_variance = noise_variance
        self.floor = floor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every tensor. Its state has the names of torch's Adam: step, exp_avg, exp_avg_sq."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                first, second = group["betas"]
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                m_hat = state["exp_avg"] / (1 - first ** state["step"].item())
                v_hat = state["exp_avg_sq"] / (1 - second ** state["step"].item())
                clean_v = (v_hat - self.noise_variance).clamp(min=self.floor * self.noise_variance)
                parameter.sub_(group["lr"] * m_hat / (clean_v.sqrt() + group["eps"]))


def learning_rate_at(train: Train, step: int) -> float:
    """Step size of one update, `step` from 0: a linear rise, then constant, a line to 0, or half a cosine to 0.

    The rise reaches train.learning_rate with update train.lr_warmup_steps; 0 is where update train.max_train_steps + 1
    would be, so no update has step size 0.
    """
    warmup = train.lr_warmup_steps
    if step < warmup:
        return train.learning_rate * ((step + 1) / warmup)
    done = (step - warmup) / (train.max_train_steps - warmup)  # in [0, 1)
    if train.lr_scheduler == "linear":
        return train.learning_rate * (1 - done)
    if train.lr_scheduler == "cosine":
        return train.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return train.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Step size of the updates to come."""
    for group in optimizer.param_groups:
        group["lr"] = value


def apply_update(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    noisy_sum: dict[str, Tensor],
    expected_batch_size: float,
) -> None:
    """One optimizer step on noisy_sum / expected_batch_size, which is all it ever sees (invariants 3 and 7).

    Args:
        optimizer: over `parameters`, from `make_optimizer`.
        parameters: name -> trainable tensor.
        noisy_sum: name -> float32 tensor of the same shape, from `add_noise`.
        expected_batch_size: the public divisor; never the number of examples that came.

    Raises:
        PrivacyError: a parameter without a noisy sum, or the other way round.
    """
    if noisy_sum.keys() != parameters.keys():
        differing = sorted(noisy_sum.keys() ^ parameters.keys())
        raise PrivacyError(f"noise and trainable parameters cover different tensors: {', '.join(differing)}.")
    for name, parameter in parameters.items():
        parameter.grad = noisy_sum[name] / expected_batch_size
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Ema:
    """Exponential moving average of weights that were updated with noise: post-processing, free in privacy.

    Warm start: the decay after n updates is min(decay, (1 + n) / (10 + n)), as in diffusers' EMAModel, which begins one
    update later with decay 0. So short runs do not average in the untrained weights.

    Args:
        parameters: name -> tensor; the average starts at their values.
        decay: in [0, 1); 0 keeps the last weights only.

    Raises:
        UserError: `decay` is outside [0, 1).
    """

    def __init__(self, parameters: Parameters, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"--ema_decay {decay} must be in [0, 1). Try 0.9.")
        self.decay = decay
        self.updates = 0
        self._parameters = parameters
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self) -> None:
        """Take the present weights in; once after each `apply_update`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Parameters) -> None:
        """Overwrite tensors of the same names by the average."""
        for name, parameter in parameters.items():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights inside the block, the present ones after it, whatever happens in it."""
        present = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to(self._parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(present[name])
