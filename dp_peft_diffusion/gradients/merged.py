"""A LoRA layer as one product: merged for the forward, taken apart again for its two per-example gradients.

    forward    y = x (W + s B A)^T + bias
    backward   u = s B^T dy,  v = A x      (both thin: rank channels)
               dA_i = sum over the rows of example i of u x^T,   dB_i = s * the same of dy v^T
               dx   = dy (W + s B A)

No thin product runs in the forward, only x is kept for the backward, and the input's gradient is one product too:
less work than the three branches of an unmerged LoRA layer, so a private step can cost less than an ordinary one.
Exact in float32 only: rounding W + s B A to bfloat16 would lose most of a small s B A.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from dp_peft_diffusion.gradients.rules import RULES, is_pointwise
from dp_peft_diffusion.gradients.thin import is_thin, thin_convolution

CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, conv1d_input),
    nn.Conv2d: (F.conv2d, conv2d_input),
    nn.Conv3d: (F.conv3d, conv3d_input),
}
LORA_LAYERS = (lora.Linear, lora.Conv1d, lora.Conv2d, lora.Conv3d)
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class MergedLora:
    """One plain LoRA layer of peft, from `merged_layers`; W + s B A is computed once, when it is made."""

    def __init__(self, path: str, layer: Any) -> None:
        self.path, self.kind, self.layer = path, type(layer).__name__, layer
        self.adapters = list(layer.active_adapters)
        (adapter,) = self.adapters
        self.a, self.b, self.scale = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
        self.prefixes = {"A": f"lora_A.{adapter}", "B": f"lora_B.{adapter}"}
        self.base = layer.base_layer
        self.bias = self.base.bias
        with torch.no_grad():
            delta = self.b.weight.flatten(1) @ self.a.weight.flatten(1)
            self.weight = torch.add(self.base.weight, delta.view_as(self.base.weight), alpha=self.scale)
        self.batched_dims = RULES[type(self.base)].batched_dims(self.base)

    def stands(self) -> bool:
        """Whether the layer is still set as it was merged: inside a forward, adapters may be switched off or scaled."""
        layer = self.layer
        on = not layer.disable_adapters and not layer.merged and list(layer.active_adapters) == self.adapters
        return on and layer.scaling[self.adapters[0]] == self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Rows (b * k, ...) float32 -> the layer's output."""
        if isinstance(self.base, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        convolve, _ = CONVOLUTIONS[type(self.base)]
        return convolve(x, self.weight, self.bias, self.base.stride, self.base.padding, self.base.dilation)

    def input_gradient(self, x_shape: torch.Size, weight: Tensor, dy: Tensor) -> Tensor:
        """Gradient of the input, shape `x_shape`."""
        if isinstance(self.base, nn.Linear):
            return dy @ weight
        _, input_gradient = CONVOLUTIONS[type(self.base)]
        return input_gradient(x_shape, weight, dy, self.base.stride, self.base.padding, self.base.dilation)

    def gradients(self, x: Tensor, dy: Tensor, b: int) -> dict[str, Tensor]:
        """{"lora_A.NAME.weight" and/or "lora_B.NAME.weight": (b, *shape) float32}, by the rules of the two layers."""
        found = {}
        if self.a.weight.requires_grad:
            u = self._through_b(dy)
            found[f"{self.prefixes['A']}.weight"] = RULES[type(self.a)].gradients(self.a, x, u, b)["weight"]
        if self.b.weight.requires_grad:
            v = self._through_a(x)
            gradient = RULES[type(self.b)].gradients(self.b, v, dy, b)["weight"]
            found[f"{self.prefixes['B']}.weight"] = gradient.mul_(self.scale)
        return found

    def _through_a(self, x: Tensor) -> Tensor:
        """Returns A x, (b * k, ..., rank) or (b * k, rank, *space)."""
        if isinstance(self.a, nn.Linear):
            return x @ self.a.weight.detach().mT
        if is_pointwise(self.a):
            return torch.matmul(self.a.weight.detach().flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])
        if is_thin(self.a):
            return thin_convolution(self.a, x)
        return type(self.a).forward(self.a, x)

    def _through_b(self, dy: Tensor) -> Tensor:
        """Returns s B^T dy, of the same shape."""
        weight = self.b.weight.detach() * self.scale  # detached: else torch.matmul copies dy to fold its rows
        if isinstance(self.b, nn.Linear):
            return dy @ weight
        return torch.matmul(weight.flatten(1).mT, dy.flatten(2)).unflatten(2, dy.shape[2:])


def merged_layers(model: nn.Module) -> dict[str, MergedLora]:
    """Path -> merged layer, of the LoRA layers for which merging is the same function in float32."""
    return {
        path: MergedLora(path, layer)
        for path, layer in model.named_modules()
        if type(layer) in LORA_LAYERS and _is_plain(layer)
    }


def _is_plain(layer: Any) -> bool:
    """It is y = base(x) + s B(A(x)) and no more: one adapter, no variant such as DoRA, no bias, equal convolutions."""
    if len(layer.active_adapters) != 1 or layer.disable_adapters or layer.merged or "forward" in vars(layer):
        return False
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A or adapter in layer.lora_variant or layer.lora_bias[adapter]:
        return False
    a, b, base = layer.lora_A[adapter], layer.lora_B[adapter], layer.base_layer
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(part)[name] for part in (a, b, base) for name in hooks):
        return False
    stock = type(base) in (nn.Linear, *CONVOLUTIONS) and type(a) is type(b) is type(base)
    float32 = all(weight.dtype == torch.float32 for part in (a, b, base) for weight in part.parameters())
    frozen_base = not any(weight.requires_grad for weight in base.parameters())
    trains = a.weight.requires_grad or b.weight.requires_grad
    if not (stock and float32 and frozen_base and trains) or "forward" in vars(base):
        return False
    if isinstance(base, nn.Linear):
        return not layer.fan_in_fan_out
    alike = all(getattr(a, name) == getattr(base, name) for name in GEOMETRY)
    return alike and base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)
