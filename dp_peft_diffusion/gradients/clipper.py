"""Per-example gradients by hooks, clipped before they are summed.

While a pass is open, every trainable layer runs its own forward on detached weights, so that autograd computes only
the gradient of its input. A tap on its output sees that gradient go by and turns it, with the layer's input, into
per-example gradients. Activations travel only through `ctx.save_for_backward`, so gradient checkpointing frees and
recomputes them as usual. Nothing is stored on parameters.
"""

import copy
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.functional import (
    Batch,
    Clip,
    Gradients,
    LossFn,
    batch_size,
    flat_norms,
    trainable,
    zeros,
)
from dp_peft_diffusion.gradients.rules import RULES, layer_problem


class PerSampleClipper:
    """Sums per-example gradients, each clipped to `max_grad_norm` over all trainable tensors together.

    What always holds of a sum: any one example, whatever its values and however many rows it has, moves it by at
    most max_grad_norm; it is finite, and float64.

        clipper = PerSampleClipper(unet, max_grad_norm=1.0)
        total = clipper.clipped_sum_of(loss_fn, batch)      # loss_fn(model, batch) -> losses (b,)

        with clipper:                                       # the same in two steps
            losses = loss_fn(unet, batch)
        total = clipper.clipped_sum(losses)

    Every trainable layer must see b * k rows for the b losses, example-major (row i * k + j is row j of example i).

    Args:
        model: in eval mode; the parameters that require a gradient are the ones that are clipped.
        max_grad_norm: C > 0.
        clipping: "flat" (min(1, C / norm)) or "automatic" (C / (norm + gamma)).
        gamma: > 0, for "automatic" only.

    Raises:
        UserError: a trainable parameter or a layer for which the bound above cannot be kept, by name.
    """

    def __init__(
        self, model: nn.Module, max_grad_norm: float = 1.0, clipping: str = "flat", gamma: float | None = None
    ) -> None:
        self.clip = Clip(max_grad_norm, clipping, gamma)
        self.model = model
        self.parameters = trainable(model)
        _check(model)
        self._pass: _Pass | None = None

    def describe(self) -> str:
        """One line: how many parameters are clipped, out of how many that train now (invariant 10)."""
        clipped = sum(parameter.numel() for parameter in self.parameters.values())
        training = sum(parameter.numel() for parameter in trainable(self.model).values())
        return f"clipping {clipped:,} of {training:,} trainable parameters in {len(self.parameters)} tensors"

    def zeros(self) -> Gradients:
        """The clipped sum of an empty batch (invariant 6), {name: shape float64}."""
        return zeros(self.parameters)

    def clipped_sum_of(self, loss_fn: LossFn, batch: Batch) -> Gradients:
        """`loss_fn(model, batch)` -> losses (b,); returns the clipped sum. An empty batch runs no forward."""
        if batch_size(batch) == 0:
            return self.zeros()
        return self.clip.sum(self._gradients_of(loss_fn, batch))

    def norms_of(self, loss_fn: LossFn, batch: Batch) -> Tensor:
        """Per-example gradient norms before clipping, (b,) float64. Not private: for public images only."""
        if batch_size(batch) == 0:
            return torch.zeros(0, dtype=torch.float64)
        return flat_norms(self._gradients_of(loss_fn, batch))

    def __enter__(self) -> "PerSampleClipper":
        """Put taps on the trainable layers; they stay until `clipped_sum` returns or an exception leaves the block."""
        self._close()
        _check(self.model)
        if {id(p) for p in trainable(self.model).values()} != {id(p) for p in self.parameters.values()}:
            raise UserError(
                "other parameters require a gradient now than when the clipper was made. Make a new PerSampleClipper."
            )
        self._pass = _Pass(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._close()

    def clipped_sum(self, losses: Tensor) -> Gradients:
        """Run the backward of `losses` (b,) and return {name: shape float64}: sum_i g_i * factor(||g_i||).

        Raises:
            UserError: no `with clipper:` before it, losses that are not (b,), a layer whose rows are not b * k, or a
                trainable tensor without exactly one gradient for each example.
        """
        if losses.shape == (0,):
            self._close()
            return self.zeros()
        return self.clip.sum(self._gradients(losses))

    def _gradients_of(self, loss_fn: LossFn, batch: Batch) -> Gradients:
        with self:
            losses = loss_fn(self.model, batch)
            if losses.shape != (batch_size(batch),):
                raise UserError(
                    f"the loss function returned shape {tuple(losses.shape)} for a batch of {batch_size(batch)}. "
                    "Return one loss for each example, shape (b,)."
                )
        return self._gradients(losses)

    def _gradients(self, losses: Tensor) -> Gradients:
        """{name: (b, *shape) float32} in the order of `parameters`; closes the pass."""
        try:
            if self._pass is None:
                raise UserError("clipped_sum needs losses computed inside `with clipper:`, once for each call.")
            if losses.dim() != 1 or not losses.requires_grad:
                raise UserError(
                    f"clipped_sum needs one loss for each example, shape (b,), that depends on the trainable "
                    f"parameters; it got shape {tuple(losses.shape)}, requires_grad {losses.requires_grad}."
                )
            for parameter in self.parameters.values():
                parameter.grad = None
            self._pass.backward(losses)
            self._refuse_other_paths()
            return {name: self._gradient_of(name) for name in self.parameters}
        finally:
            self._close()

    def _refuse_other_paths(self) -> None:
        """Weights are detached inside their layers, so a .grad shows a use that no tap has seen."""
        stray = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        for parameter in self.parameters.values():
            parameter.grad = None
        if stray:
            raise UserError(
                f"trainable parameter {stray[0]} reaches the loss by another way than its layer's own call, so its "
                "per-example gradient is not known. Use an adapter whose weights are only called as layers."
            )

    def _gradient_of(self, name: str) -> Tensor:
        gradients = self._pass.gradients if self._pass else {}
        if name not in gradients:
            raise UserError(
                f"trainable parameter {name} got no gradient: its layer was not called, or its output does not reach "
                "the losses (or reentrant checkpointing cut it off: use_reentrant=False). Freeze it, or call it."
            )
        return gradients[name]

    def _close(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None


class _Pass:
    """One forward and backward: the patched layers, and the per-example gradients as they arrive."""

    def __init__(self, model: nn.Module) -> None:
        self.b: int | None = None
        self.gradients: Gradients = {}
        self.anchor = torch.empty(0, requires_grad=True)  # makes taps run where no input requires a gradient
        self.layers = _trainable_layers(model)
        for path, layer in self.layers.items():
            layer.forward = self._tapped_forward(path, layer)

    def close(self) -> None:
        """Take the taps off; let go of what the losses' graph would keep alive."""
        for layer in self.layers.values():
            del layer.forward
        self.layers, self.gradients = {}, {}

    def backward(self, losses: Tensor) -> None:
        """Each loss depends on its own example only, so the backward of all at once keeps gradients apart."""
        self.b = len(losses)
        torch.autograd.backward(losses, torch.ones_like(losses))

    def _tapped_forward(self, path: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        detached = copy.copy(layer)
        weights: dict[str, Any] = {name: None if p is None else p.detach() for name, p in layer._parameters.items()}
        detached._parameters = weights  # aliases: they follow the layer's values

        def forward(input: Tensor) -> Tensor:
            return _Tap.apply(detached.forward(input), input, self.anchor, self, path, layer)

        return forward

    def collect(self, path: str, layer: nn.Module, activations: Tensor, backprops: Tensor) -> None:
        """Add one call's per-example gradients; a layer that is called twice has two."""
        b = self._examples(path, layer, activations)
        with torch.autocast(activations.device.type, enabled=False):
            found = RULES[type(layer)].gradients(layer, activations, backprops, b)
        for local, gradient in found.items():
            name = f"{path}.{local}" if path else local
            self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

    def _examples(self, path: str, layer: nn.Module, activations: Tensor) -> int:
        """The number of examples b, if this call's rows can be told apart by it.

        Raises:
            UserError: a backward outside clipped_sum, or rows that are not b * k.
        """
        if self.b is None:
            raise UserError("these losses belong to the clipper: call clipper.clipped_sum(losses), not backward().")
        shape = tuple(activations.shape)
        if len(shape) < RULES[type(layer)].batched_dims or shape[0] == 0 or shape[0] % self.b:
            raise UserError(
                f"layer {path} ({type(layer).__name__}) was called with shape {shape} for {self.b} losses; its first "
                f"size must be a multiple of {self.b}, example by example. Expand shared inputs to one row each."
            )
        return self.b


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward hands input and output gradient to the pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, activations: Tensor, anchor: Tensor, opened: _Pass, path: str, layer: nn.Module
    ) -> Tensor:
        ctx.save_for_backward(activations)
        ctx.opened, ctx.path, ctx.layer = opened, path, layer
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        (activations,) = ctx.saved_tensors
        ctx.opened.collect(ctx.path, ctx.layer, activations, backprops)
        return backprops, None, None, None, None, None


def _trainable_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


def _check(model: nn.Module) -> None:
    """Refuse by name what cannot be proved to keep the bound (invariants 9 and 10).

    Raises:
        UserError: the first thing refused.
    """
    if not trainable(model):
        raise UserError("no parameter of the model requires a gradient. Inject an adapter, or set requires_grad.")
    for path, module in model.named_modules():
        problem = _module_problem(module)
        if problem:
            raise UserError(f"module {path or '(the model)'} ({type(module).__name__}) {problem}")
    for path, layer in _trainable_layers(model).items():
        problem = layer_problem(layer)
        if problem:
            raise UserError(f"trainable module {path or '(the model)'} ({type(layer).__name__}) {problem}")
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if parameter.requires_grad and first != name:
            raise UserError(f"trainable parameter {name} is tied to {first}. Untie them, or freeze both.")


def _module_problem(module: nn.Module) -> str | None:
    if module.training:
        return "is in training mode. Call model.eval() after the adapter is injected."
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "mixes the examples of a batch. Use a model with GroupNorm."
    if isinstance(module, BaseTunerLayer):
        adapter_only = {id(m) for m in module.modules()} - {id(m) for m in module.get_base_layer().modules()}
        for part in module.modules():
            if id(part) in adapter_only and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
                return (
                    f"has an adapter dropout of {part.p}. Make the adapter with dropout 0: noise regularises already."
                )
    return None
