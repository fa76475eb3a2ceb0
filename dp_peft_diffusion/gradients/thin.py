"""Convolutions with few output channels, such as LoRA's A, without unfolding their wide input.

    v[y]          = sum over offsets s of (A_s x)[y + s]       A_s: (r, c) slice of the kernel at offset s
    dA_i[:, :, s] = sum over y of u[y] x[y + s]^T              u: gradient of v

Both sums move the thin side (r channels) by s and leave the wide side (c channels) where it lies: one matrix product
with x and some copies of r channels, where unfolding x would copy c channels once for each offset.
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Slices = tuple[Any, ...]  # one slice for each axis of space


def is_thin(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """The moved copies of the output are not much larger than the input, and a move is all that an offset does."""
    ones = (1,) * len(layer.kernel_size)
    plain = layer.stride == ones and layer.dilation == ones and layer.groups == 1 and layer.padding_mode == "zeros"
    copies = layer.out_channels * prod(layer.kernel_size)
    return plain and not isinstance(layer.padding, str) and copies <= 2 * layer.in_channels


def thin_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What the layer returns without its bias; x (n, c, *space) -> (n, r, *space')."""
    kernel, space = layer.kernel_size, x.shape[2:]
    # (offsets * r, c); detached: else torch.matmul copies x to fold its rows
    weight = layer.weight.detach().movedim((0, 1), (-2, -1)).reshape(-1, x.shape[1])
    products = torch.matmul(weight, x.flatten(2)).view(len(x), prod(kernel), -1, *space)
    total = products.new_zeros(len(x), layer.out_channels, *_output_space(layer, space))
    for offset, here, there in _moves(layer, space):
        total[..., *here] += products[:, offset, :, *there]
    return total


def thin_weight_gradient(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, dy: Tensor, b: int) -> Tensor:
    """Per-example gradient of the weight; x (b * k, c, *space), dy (b * k, r, *space') -> (b, r, c, *kernel)."""
    kernel, space = layer.kernel_size, x.shape[2:]
    moved = dy.new_zeros(len(x), prod(kernel), dy.shape[1], *space)
    for offset, here, there in _moves(layer, space):
        moved[:, offset, :, *there] = dy[..., *here]
    gradient = sum_of_outer_products(moved.flatten(1, 2), x, b)  # (b, offsets * r, c)
    return gradient.view(b, *kernel, dy.shape[1], -1).movedim((-2, -1), (1, 2))


def sum_of_outer_products(dy: Tensor, x: Tensor, b: int) -> Tensor:
    """Sum over an example's rows and pixels of dy x^T, (b, o, c); dy (b * k, o, *space), x (b * k, c, *space).

    One product for each of the k rows, added in place: neither a copy of the inputs nor k gradients at once.
    """
    dy, x = (rows.flatten(2).unflatten(0, (b, -1)) for rows in (dy, x))  # (b, k, channels, pixels)
    total = torch.bmm(dy[:, 0], x[:, 0].mT)
    for row in range(1, dy.shape[1]):
        total.baddbmm_(dy[:, row], x[:, row].mT)
    return total


def _output_space(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, space: torch.Size) -> list[int]:
    padding = [int(p) for p in layer.padding]
    return [n + 2 * p - k + 1 for n, p, k in zip(space, padding, layer.kernel_size, strict=True)]


def _moves(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, space: torch.Size) -> Iterator[tuple[int, Slices, Slices]]:
    """(number of the offset, where it is inside the output, the same places of the input)."""
    padding, outputs = [int(p) for p in layer.padding], _output_space(layer, space)
    for number, position in enumerate(product(*(range(k) for k in layer.kernel_size))):
        here, there = [], []
        for place, p, n_in, n_out in zip(position, padding, space, outputs, strict=True):
            offset = place - p
            first = max(0, -offset)
            end = max(first, min(n_out, n_in - offset))
            here.append(slice(first, end))
            there.append(slice(first + offset, end + offset))
        yield number, tuple(here), tuple(there)
