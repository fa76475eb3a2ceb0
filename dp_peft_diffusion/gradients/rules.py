"""Per-example gradients of one layer, from its input and the gradient of its output.

A rule gets `activations` (b * k, ...) as the layer saw them and `backprops`, the gradient of the losses with respect
to what the layer returned. Rows are example-major: row i * k + j is row j of example i. It returns (b, *shape) in
float32 for those of `weight` and `bias` that train, summed over an example's own k rows. Rows of different examples
never meet in one sum, so what is not finite in one example stays there (invariant 4).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from dp_peft_diffusion.gradients.thin import is_thin, sum_of_outer_products, thin_weight_gradient

ConvLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONV_WEIGHT = {nn.Conv1d: conv1d_weight, nn.Conv2d: conv2d_weight, nn.Conv3d: conv3d_weight}


class Rule(NamedTuple):
    """How a layer's per-example gradients are computed.

    gradients: (layer, activations, backprops, b) -> {"weight" and/or "bias": (b, *shape) float32}.
    batched_dims: layer -> the fewest dimensions of an input that has a leading row axis.
    """

    gradients: Callable[[Any, Tensor, Tensor, int], dict[str, Tensor]]
    batched_dims: Callable[[Any], int]


def linear(layer: nn.Linear, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.Linear; activations (b * k, ..., in), backprops (b * k, ..., out). All rows of an example in one product."""
    x = activations.float().reshape(b, -1, layer.in_features)
    dy = backprops.float().reshape(b, -1, layer.out_features)
    gradients = {}
    if _trains(layer.weight):
        gradients["weight"] = torch.bmm(dy.mT, x)
    if _trains(layer.bias):
        gradients["bias"] = dy.sum(dim=1)
    return gradients


def convolution(layer: ConvLayer, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.Conv1d, 2d, 3d; activations (b * k, c, *space), backprops (b * k, o, *space'). Any memory format."""
    dy = backprops.float()
    gradients = {}
    if _trains(layer.weight):
        gradients["weight"] = _convolution_weight(layer)(layer, activations.float(), dy, b)
    if _trains(layer.bias):
        gradients["bias"] = dy.flatten(2).sum(dim=2).view(b, -1, layer.out_channels).sum(dim=1)
    return gradients


def group_norm(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.GroupNorm; activations and backprops (b * k, c, ...). Weight and bias are one number for each channel."""
    rows = (len(activations), layer.num_channels, -1)
    normed = F.group_norm(activations.float(), layer.num_groups, eps=layer.eps).reshape(rows).mT
    return _affine(layer, normed, backprops.float().reshape(rows).mT, b)


def layer_norm(layer: nn.LayerNorm, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.LayerNorm; activations and backprops (b * k, ..., *normalized_shape)."""
    normed = F.layer_norm(activations.float(), layer.normalized_shape, eps=layer.eps)
    return _affine_of_last_axes(layer, normed, backprops, b)


def rms_norm(layer: nn.RMSNorm, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.RMSNorm; activations and backprops (b * k, ..., *normalized_shape). It has no bias."""
    eps = torch.finfo(activations.dtype).eps if layer.eps is None else layer.eps
    return _affine_of_last_axes(layer, F.rms_norm(activations.float(), layer.normalized_shape, eps=eps), backprops, b)


def diffusers_rms_norm(layer: DiffusersRMSNorm, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """The RMSNorm of diffusers, which norms the last axis only; activations and backprops (b * k, ..., *dim)."""
    normed = F.rms_norm(activations.float(), activations.shape[-1:], eps=layer.eps)
    return _affine_of_last_axes(layer, normed, backprops, b)


def embedding(layer: nn.Embedding, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.Embedding; activations (b * k, ...) row numbers, backprops (b * k, ..., embedding_dim)."""
    rows = activations.reshape(b, -1)
    own_table = torch.arange(b, device=rows.device).unsqueeze(1) * layer.num_embeddings  # first row of each example's
    dy = backprops.float().reshape(-1, layer.embedding_dim)
    tables = dy.new_zeros(b * layer.num_embeddings, layer.embedding_dim)
    tables.index_add_(0, (rows + own_table).flatten(), dy)
    gradient = tables.view(b, layer.num_embeddings, layer.embedding_dim)
    if layer.padding_idx is not None:
        gradient[:, layer.padding_idx] = 0.0
    return {"weight": gradient}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(linear, lambda layer: 2),
    nn.Conv1d: Rule(convolution, lambda layer: 3),
    nn.Conv2d: Rule(convolution, lambda layer: 4),
    nn.Conv3d: Rule(convolution, lambda layer: 5),
    nn.GroupNorm: Rule(group_norm, lambda layer: 2),
    nn.LayerNorm: Rule(layer_norm, lambda layer: 1 + len(layer.normalized_shape)),
    nn.RMSNorm: Rule(rms_norm, lambda layer: 1 + len(layer.normalized_shape)),
    DiffusersRMSNorm: Rule(diffusers_rms_norm, lambda layer: 1 + len(layer.dim)),
    nn.Embedding: Rule(embedding, lambda layer: 1),
}


def has_rule(layer: nn.Module) -> bool:
    """Every parameter of the layer itself that trains has a rule. A subclass may compute something else: no rule."""
    names = {name for name, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad}
    return type(layer) in RULES and names <= {"weight", "bias"}


def layer_problem(layer: nn.Module) -> str | None:
    """Why a layer with trainable parameters cannot be clipped by any path, and what to do; None if it can."""
    if "forward" in vars(layer):
        return "has had its forward replaced. Remove the wrapper, or close the other clipper on this model."
    if nn.utils.parametrize.is_parametrized(layer):
        return "has a parametrization, whose own weights would train. Remove it with remove_parametrizations."
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.dtype != torch.float32:
            return (
                f"trains {name} in {parameter.dtype}. Keep trainable parameters in float32; the base may stay smaller."
            )
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        return "has max_norm, scale_grad_by_freq or sparse set, which look across the batch. Turn them off."
    return None


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _affine(layer: nn.Module, normed: Tensor, dy: Tensor, b: int) -> dict[str, Tensor]:
    """Of y = normed * weight + bias; normed and dy (b * k, n, d), with d weights and d biases."""
    gradients = {}
    if _trains(layer._parameters.get("weight")):
        gradients["weight"] = (dy * normed).sum(dim=1).view(b, -1, dy.shape[2]).sum(dim=1)
    if _trains(layer._parameters.get("bias")):
        gradients["bias"] = dy.sum(dim=1).view(b, -1, dy.shape[2]).sum(dim=1)
    return gradients


def _affine_of_last_axes(layer: nn.Module, normed: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """The same where weight and bias have the shape of the input's last axes, whichever there are."""
    shape = tuple(next(parameter for parameter in layer.parameters(recurse=False)).shape)
    rows = (len(normed), -1, math.prod(shape))
    found = _affine(layer, normed.reshape(rows), backprops.float().reshape(rows), b)
    return {name: gradient.view(b, *shape) for name, gradient in found.items()}


def _convolution_weight(layer: ConvLayer) -> Callable[[Any, Tensor, Tensor, int], Tensor]:
    """The cheapest of three ways to the same gradient."""
    if is_pointwise(layer):
        return _pointwise_weight
    return thin_weight_gradient if is_thin(layer) else _grouped_weight


def is_pointwise(layer: ConvLayer) -> bool:
    """A 1x1 convolution of every pixel: a Linear over pixels."""
    ones = (1,) * len(layer.kernel_size)
    plain = (layer.kernel_size, layer.stride, layer.groups) == (ones, ones, 1)
    return plain and layer.padding in ((0,) * len(ones), "same", "valid")


def _pointwise_weight(layer: ConvLayer, x: Tensor, dy: Tensor, b: int) -> Tensor:
    return sum_of_outer_products(dy, x, b).view(b, *layer.weight.shape)


def _grouped_weight(layer: ConvLayer, x: Tensor, dy: Tensor, b: int) -> Tensor:
    """The weight half of one grouped convolution backward: each example is a group, its k rows are the batch.

    Needs no unfolded copy of the input, and sums over the rows of an example without a gradient for each.
    """
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(stride)
    size = (b * layer.out_channels, *layer.weight.shape[1:])
    x, dy = _examples_to_channels(x, b), _examples_to_channels(dy, b)
    weight_gradient = CONV_WEIGHT[type(layer)](x, size, dy, stride, padding, dilation, b * groups)
    return weight_gradient.view(b, *layer.weight.shape)


def _examples_to_channels(rows: Tensor, b: int) -> Tensor:
    """(b * k, c, *space) -> (k, b * c, *space)."""
    return rows.reshape(b, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2).contiguous()
