"""Per-example gradients of one layer, from its input and the gradient of its output.

A rule gets `activations` (b * k, ...) as the layer saw them and `backprops`, the gradient of the losses with respect
to what the layer returned. Rows are example-major: row i * k + j is row j of example i. It returns (b, *shape) in
float32 for those of `weight` and `bias` that train, summed over an example's own k rows. Rows of different examples
never meet in one sum, so what is not finite in one example stays there (invariant 4).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class Rule(NamedTuple):
    """How a layer's per-example gradients are computed.

    gradients: (layer, activations, backprops, b) -> {"weight" and/or "bias": (b, *shape) float32}.
    batched_dims: the fewest dimensions of an input that has a leading row axis.
    """

    gradients: Callable[[Any, Tensor, Tensor, int], dict[str, Tensor]]
    batched_dims: int


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


def conv2d(layer: nn.Conv2d, activations: Tensor, backprops: Tensor, b: int) -> dict[str, Tensor]:
    """nn.Conv2d; activations (b * k, c, h, w), backprops (b * k, o, h', w'). Any memory format."""
    dy = backprops.float()
    gradients = {}
    if _trains(layer.weight):
        weight_gradient = _pointwise_weight if _is_pointwise(layer) else _grouped_weight
        gradients["weight"] = weight_gradient(layer, activations.float(), dy, b)
    if _trains(layer.bias):
        gradients["bias"] = dy.reshape(b, -1, *dy.shape[1:]).sum(dim=(1, 3, 4))
    return gradients


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
    nn.Linear: Rule(linear, batched_dims=2),
    nn.Conv2d: Rule(conv2d, batched_dims=4),
    nn.Embedding: Rule(embedding, batched_dims=1),
}


def layer_problem(layer: nn.Module) -> str | None:
    """Why a layer with trainable parameters cannot be clipped, and what to do; None if it can."""
    if type(layer) not in RULES:  # a subclass may compute something else
        known = ", ".join(f"nn.{kind.__name__}" for kind in RULES)
        return f"has no rule for per-example gradients. Freeze it, or train layers of exactly these classes: {known}."
    if "forward" in vars(layer):
        return "has had its forward replaced. Remove the wrapper, or close the other clipper on this model."
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad and name not in ("weight", "bias"):
            return f"trains {name!r}, which no rule knows. Freeze it, or undo the parametrization."
        if parameter.requires_grad and parameter.dtype != torch.float32:
            return f"trains in {parameter.dtype}. Keep trainable parameters in float32; the base may stay smaller."
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        return "has max_norm, scale_grad_by_freq or sparse set, which look across the batch. Turn them off."
    return None


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1) and layer.padding in ((0, 0), "same")


def _pointwise_weight(layer: nn.Conv2d, x: Tensor, dy: Tensor, b: int) -> Tensor:
    """A 1x1 convolution is a Linear over pixels."""
    x = x.reshape(b, -1, *x.shape[1:])
    dy = dy.reshape(b, -1, *dy.shape[1:])
    return torch.einsum("bkohw,bkchw->boc", dy, x)[..., None, None]


def _grouped_weight(layer: nn.Conv2d, x: Tensor, dy: Tensor, b: int) -> Tensor:
    """The weight half of one grouped convolution backward: each example is a group, its k rows are the batch.

    Needs no unfolded copy of the input, and sums over the rows of an example without a gradient for each.
    """
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    size = (b * layer.out_channels, *layer.weight.shape[1:])
    x, dy = _examples_to_channels(x, b), _examples_to_channels(dy, b)
    return conv2d_weight(x, size, dy, stride, padding, dilation, b * groups).view(b, *layer.weight.shape)


def _examples_to_channels(rows: Tensor, b: int) -> Tensor:
    """(b * k, c, h, w) -> (k, b * c, h, w)."""
    return rows.reshape(b, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2).contiguous()
