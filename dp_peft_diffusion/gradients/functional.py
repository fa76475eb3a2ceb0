"""The definition of truth: what a clipped sum is, and two slow ways to compute it without hooks.

    sum_i g_i * f(||g_i||)      g_i: gradient of example i's own loss, all trainable tensors as one vector
    flat:      f(n) = min(1, C' / n)      (Abadi et al. 2016, arXiv 1607.00133, algorithm 1)
    automatic: f(n) = C' / (n + gamma)    (Bu et al. 2022, arXiv 2206.07136, AUTO-S)

with C' = max_grad_norm * (1 - 1e-6), which leaves room for rounding below the promised bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dp_peft_diffusion.errors import UserError

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
LossFn = Callable[[nn.Module, Any], Tensor]  # (model, one Batch) -> losses (b,)
Gradients = dict[str, Tensor]

CLIP_MARGIN = 1e-6


@dataclass(frozen=True)
class Clip:
    """One clip function.

    max_grad_norm: C, the most that one example can add to the sum (norm over all tensors).
    clipping: "flat" or "automatic".
    gamma: added to the norm by "automatic", same units as the norm; None for "flat".

    Raises:
        UserError: a value that bounds nothing.
    """

    max_grad_norm: float = 1.0
    clipping: str = "flat"
    gamma: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise UserError(f"max_grad_norm {self.max_grad_norm} must be a finite number above 0. Try 1.0.")
        if self.clipping not in ("flat", "automatic"):
            raise UserError(f'clipping {self.clipping!r} is unknown. Use "flat" or "automatic".')
        if self.clipping == "flat" and self.gamma is not None:
            raise UserError('gamma has no meaning with clipping="flat". Leave it out, or use clipping="automatic".')
        if self.clipping == "automatic" and not (self.gamma and math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f'clipping="automatic" needs a finite gamma above 0, not {self.gamma}. Try gamma=0.01.')

    def factors(self, norms: Tensor) -> Tensor:
        """Norms (b,) float64, not NaN -> what each gradient is multiplied by, (b,) float64."""
        target = self.max_grad_norm * (1 - CLIP_MARGIN)
        if self.gamma is not None:
            return target / (norms + self.gamma)
        return (target / norms).clamp(max=1.0)

    def sum(self, gradients: Gradients) -> Gradients:
        """Per-example gradients {name: (b, *shape) float32} -> clipped sum {name: shape float64}."""
        norms = flat_norms(gradients)
        usable = norms.isfinite()
        all_usable = bool(usable.all())
        factors = torch.where(usable, self.factors(norms), 0.0)
        total = {}
        for name, gradient in gradients.items():
            axes = _axes_in_memory(gradient)
            rows = gradient.permute(0, *axes).flatten(1)
            if not all_usable:  # masked before it is multiplied: 0 * inf is NaN (invariant 4)
                rows = rows.masked_fill(~usable.unsqueeze(1), 0.0)
            summed = (factors @ rows.double()).view([gradient.shape[axis] for axis in axes])
            total[name] = summed.permute([axes.index(axis) for axis in range(1, gradient.dim())]).contiguous()
        return total


def flat_norms(gradients: Gradients) -> Tensor:
    """{name: (b, *shape) float32} -> Euclidean norm over all tensors of each example, (b,) float64 (invariant 4)."""
    norms = [
        torch.linalg.vector_norm(gradient.permute(0, *_axes_in_memory(gradient)).flatten(1).double(), dim=1)
        for gradient in gradients.values()
    ]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _axes_in_memory(gradient: Tensor) -> list[int]:
    """The axes after the first in the order they lie in memory: flattened so, a permuted gradient is not copied."""
    return sorted(range(1, gradient.dim()), key=gradient.stride, reverse=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that require a gradient, in the order of `named_parameters`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def zeros(parameters: dict[str, nn.Parameter]) -> Gradients:
    """The clipped sum of no example, {name: shape float64}."""
    return {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}


def batch_size(batch: Batch) -> int:
    """The leading size b that all tensors of a batch share.

    Raises:
        UserError: they do not.
    """
    sizes = {len(tensor) for tensor in _tensors(batch)}
    if len(sizes) != 1:
        raise UserError(f"the tensors of a batch must share their first size; these have {sorted(sizes)}.")
    return sizes.pop()


def loop_clipped_sum(model: nn.Module, loss_fn: LossFn, batch: Batch, clip: Clip) -> Gradients:
    """The clipped sum by plain autograd, one example at a time. `loss_fn(model, batch)` -> losses (b,)."""
    if batch_size(batch) == 0:
        return zeros(trainable(model))
    return clip.sum(loop_gradients(model, loss_fn, batch))


def loop_gradients(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Gradients:
    """Per-example gradients {name: (b, *shape) float32} by plain autograd, one example at a time; b >= 1.

    A parameter that the loss does not reach has gradient zero.
    """
    parameters = trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(batch_size(batch)):
        losses = loss_fn(model, _slice(batch, i))
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            rows[name].append(gradient.float())
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def vmap_clipped_sum(model: nn.Module, loss_fn: LossFn, batch: Batch, clip: Clip) -> Gradients:
    """The clipped sum by vmap(grad) over the trainable tensors; any layer, any raw parameter that vmap can follow."""
    if batch_size(batch) == 0:
        return zeros(trainable(model))
    return clip.sum(vmap_gradients(model, loss_fn, batch))


def vmap_gradients(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Gradients:
    """Per-example gradients {name: (b, *shape) float32} by vmap(grad).

    Each example goes through the model alone, so whatever vmap can follow at all is kept apart.

    Raises:
        UserError: the loss of one example is not of shape (1,).
        RuntimeError: an operation that vmap cannot follow, or that draws random numbers.
    """
    problem = _Problem(model, loss_fn)
    names = {f"model.{name}": parameter.detach() for name, parameter in trainable(model).items()}

    def loss_of_one(weights: dict[str, Tensor], example: Batch) -> Tensor:
        one = _map(lambda tensor: tensor.unsqueeze(0), example)
        losses = torch.func.functional_call(problem, weights, (one,))
        if losses.shape != (1,):
            raise UserError(
                f"the loss function returned shape {tuple(losses.shape)} for one example. "
                "Return one loss for each example, shape (b,)."
            )
        return losses.sum()

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0))(names, batch)
    return {name.removeprefix("model."): gradient.float() for name, gradient in gradients.items()}


class _Problem(nn.Module):
    """Model and loss as one module, so that `functional_call` swaps weights under a loss that takes the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


def _map(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: function(tensor) for key, tensor in batch.items()}
    return tuple(function(tensor) for tensor in batch)


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, dict) else batch)


def _slice(batch: Batch, i: int) -> Batch:
    return _map(lambda tensor: tensor[i : i + 1], batch)
