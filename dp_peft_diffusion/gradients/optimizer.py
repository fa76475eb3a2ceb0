"""Stock optimizers on a noisy mean, and the average of the weights they pass through."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dp_peft_diffusion.errors import PrivacyError, UserError

Parameters = dict[str, nn.Parameter]


def make_optimizer(name: str, parameters: Parameters, learning_rate: float) -> torch.optim.Optimizer:
    """torch.optim's SGD (no momentum) or Adam, without weight decay.

    Raises:
        UserError: another name.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters.values(), lr=learning_rate)
    if name == "adam":
        return torch.optim.Adam(parameters.values(), lr=learning_rate)
    raise UserError(f'--optimizer {name!r} is unknown. Use "sgd" or "adam".')


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

    Warm start as in diffusers' EMAModel: the decay after n updates is min(decay, (1 + n) / (10 + n)), so that short
    runs do not average in the untrained weights.

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
