"""The start-up self-check: per-example gradients of the real model against the one-by-one loop, on made-up inputs."""

import torch
from torch import Tensor, nn

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Batch, Gradients, LossFn, batch_size, loop_gradients

SEED = 0  # public
PERTURBATION = 0.02  # standard deviation of what is added to every trainable number
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
FLOOR = 1e-2  # share of an example's whole norm that a tensor's error is compared with at least


def check_gradients(
    clipper: PerSampleClipper, loss_fn: LossFn, batch: Batch, precision: torch.dtype = torch.float32
) -> None:
    """Refuse a model and loss whose per-example gradients are not those of the examples alone.

    The trainable tensors are moved off their starting point for the check (at B = 0 every gradient of a LoRA A is
    zero, and half the adapter would go unchecked) and put back, bit for bit, whatever happens.

    Args:
        clipper: of the model that will train.
        loss_fn: (model, batch) -> losses (b,), as in training.
        batch: made-up or public, of the shapes that training will use; b >= 2, and K >= 2 draws in each example.
        precision: of the forward: torch.float32, or torch.bfloat16 if `loss_fn` runs under autocast.

    Raises:
        UserError: a trainable tensor, by name, without exactly one gradient for each example, or with a wrong one.
    """
    if batch_size(batch) < 2:
        raise UserError(f"the self-check tells examples apart: give it 2 or more, not {batch_size(batch)}.")
    before = {name: parameter.detach().clone() for name, parameter in clipper.parameters.items()}
    try:
        _perturb(clipper.parameters)
        found = clipper.gradients_of(loss_fn, batch)
        expected = loop_gradients(clipper.model, loss_fn, batch)
    finally:
        with torch.no_grad():
            for name, parameter in clipper.parameters.items():
                parameter.copy_(before[name])
    _compare(found, expected, TOLERANCE[precision])


@torch.no_grad()
def _perturb(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for parameter in parameters.values():
        move = torch.randn(parameter.shape, generator=generator)
        parameter.add_(move.to(parameter.device), alpha=PERTURBATION)


def _compare(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Each tensor of each example, relative to its own norm, or to a share of the example's norm if that is more."""
    whole = _norms(torch.cat([gradient.flatten(1) for gradient in expected.values()], dim=1))  # (b,)
    for name, right in expected.items():
        if found[name].shape != right.shape:
            raise UserError(
                f"self-check: {name} got gradients of shape {tuple(found[name].shape)}, not one an example."
            )
        if not right.any():
            raise UserError(f"self-check: trainable parameter {name} has no effect on the loss. Freeze it, or use it.")
        error = (_norms(found[name] - right) / (_norms(right) + FLOOR * whole)).max().item()
        if not error <= tolerance:
            raise UserError(
                f"self-check: the per-example gradients of {name} differ from those of the examples one by one "
                f"(relative error {error:.2g}). Some layer or loss mixes the examples of a batch, or reads its rows "
                "in another order than example by example. Mend it, or take another adapter; this model is not private."
            )


def _norms(gradient: Tensor) -> Tensor:
    """(b, ...) -> (b,) float64."""
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
