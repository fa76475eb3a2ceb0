"""One forward and backward with taps on the trainable layers, which turn what flows past into per-example gradients.

Every trainable layer runs its own forward on detached weights, so that autograd computes only the gradient of its
input. A tap on its output sees that gradient go by and turns it, with the layer's input, into per-example gradients.
Plain LoRA layers run merged, as one product, with the same taps. Activations travel only through
`ctx.save_for_backward`, so gradient checkpointing frees and recomputes them as usual. Nothing is stored on parameters.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.functional import Gradients
from dp_peft_diffusion.gradients.merged import MergedLora, merged_layers
from dp_peft_diffusion.gradients.refusals import check_layers, refuse_float16
from dp_peft_diffusion.gradients.rules import RULES


class Site(Protocol):
    """What a tap needs to know of the layer that it sits on."""

    path: str
    kind: str
    batched_dims: int

    def gradients(self, activations: Tensor, backprops: Tensor, b: int) -> Gradients:
        """{name within the layer: (b, *shape) float32}."""


class Leaf:
    """A layer with a rule, run on detached weights that alias its own."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path, self.kind, self.layer, self.rule = path, type(layer).__name__, layer, RULES[type(layer)]
        self.batched_dims = self.rule.batched_dims(layer)
        self.detached = copy.copy(layer)
        weights: dict[str, Any] = {name: None if p is None else p.detach() for name, p in layer._parameters.items()}
        self.detached._parameters = weights  # aliases: they follow the layer's values

    def gradients(self, activations: Tensor, backprops: Tensor, b: int) -> Gradients:
        """By the layer's rule."""
        return self.rule.gradients(self.layer, activations, backprops, b)


class Pass:
    """One forward and backward: the patched layers, and the per-example gradients as they arrive."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        check_layers(layers)
        self.b: int | None = None
        self.gradients: Gradients = {}
        self.anchor = torch.empty(0, requires_grad=True)  # makes taps run where no input requires a gradient
        self.patched: list[nn.Module] = []
        forwards = [(layer, self._tapped_forward(Leaf(path, layer))) for path, layer in layers.items()]
        forwards += [(merged.layer, self._merged_forward(merged)) for merged in merged_layers(model).values()]
        for layer, forward in forwards:  # last: nothing is patched if memory runs out before
            layer.forward = forward
            self.patched.append(layer)

    def close(self) -> None:
        """Take the taps off; let go of what the losses' graph would keep alive."""
        for layer in self.patched:
            del layer.forward
        self.patched, self.gradients = [], {}

    def backward(self, losses: Tensor, parameters: list[nn.Parameter]) -> None:
        """Each loss depends on its own example only, so the backward of all at once keeps gradients apart.

        It runs as far as the taps and `parameters`: no other leaf is left holding a private gradient.
        """
        self.b = len(losses)
        with torch.autocast(losses.device.type, enabled=False):  # the caller's may still be on
            torch.autograd.backward(losses, torch.ones_like(losses), inputs=[self.anchor, *parameters])

    def _tapped_forward(self, leaf: Leaf) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            return _Tap.apply(leaf.detached.forward(input), input, self.anchor, self, leaf)

        return forward

    def _merged_forward(self, merged: MergedLora) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
            exact = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type) and merged.stands()
            if args or options or not exact:
                return type(merged.layer).forward(merged.layer, x, *args, **options)  # unmerged, its leaves are tapped
            return _MergedTap.apply(x, merged, merged.weight, merged.a.weight, merged.b.weight, self.anchor, self)

        return forward

    def collect(self, site: Site, activations: Tensor, backprops: Tensor) -> None:
        """Add one call's per-example gradients; a layer that is called twice has two."""
        b = self._examples(site, activations, backprops)
        found = site.gradients(activations, backprops, b)
        for local, gradient in found.items():
            name = f"{site.path}.{local}" if site.path else local
            self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

    def _examples(self, site: Site, activations: Tensor, backprops: Tensor) -> int:
        """The number of examples b, if this call's rows can be told apart by it.

        Raises:
            UserError: a backward outside clipped_sum, rows that are not b * k, or float16.
        """
        if self.b is None:
            raise UserError("these losses belong to the clipper: call clipper.clipped_sum(losses), not backward().")
        refuse_float16(f"{site.path} ({site.kind})", activations, backprops)
        shape = tuple(activations.shape)
        if len(shape) < site.batched_dims or shape[0] == 0 or shape[0] % self.b:
            raise UserError(
                f"layer {site.path} ({site.kind}) was called with shape {shape} for {self.b} losses; its first size "
                f"must be a multiple of {self.b}, example by example. Expand shared inputs to one row each."
            )
        return self.b


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward hands input and output gradient to the pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, activations: Tensor, anchor: Tensor, opened: Pass, leaf: Leaf) -> Tensor:
        ctx.save_for_backward(activations)
        ctx.mark_dirty(output)  # the same tensor, not a view of it, which an in-place operation might follow
        ctx.opened, ctx.leaf = opened, leaf
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        (activations,) = ctx.saved_tensors
        ctx.opened.collect(ctx.leaf, activations, backprops)
        return backprops, None, None, None, None


class _MergedTap(torch.autograd.Function):
    """A merged LoRA layer whose backward hands input and output gradient to the pass.

    It saves A and B too, so that autograd refuses a backward after they have changed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: MergedLora, weight: Tensor, a: Tensor, b: Tensor, anchor: Tensor, opened: Pass
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.opened, ctx.merged = opened, merged
        return merged.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, _ = ctx.saved_tensors
        ctx.opened.collect(ctx.merged, x, backprops)
        input_gradient = ctx.merged.input_gradient(x.shape, weight, backprops) if ctx.needs_input_grad[0] else None
        return input_gradient, None, None, None, None, None, None
