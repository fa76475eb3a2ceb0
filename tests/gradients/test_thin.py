"""Thin convolutions by moved copies of their output equal the stock ones in every geometry they accept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dp_peft_diffusion.gradients.thin import is_thin, thin_convolution, thin_weight_gradient

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def cases(draw):
    """A stride-1 convolution and an input that is large enough for it, padding beyond the kernel included."""
    dims = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    padding = [draw(st.integers(0, 4)) for _ in range(dims)]
    space = [max(1, k - 2 * p) + draw(st.integers(0, 4)) for k, p in zip(kernel, padding, strict=True)]
    layer = CONVOLUTIONS[dims](draw(st.integers(1, 4)), draw(st.integers(1, 3)), kernel, padding=padding, bias=False)
    b, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return layer, torch.randn(b * k, layer.in_channels, *space), b


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_thin_convolution_and_its_gradient_are_the_stock_ones(case):
    layer, x, b = case
    expected = layer(x)
    assert torch.allclose(thin_convolution(layer, x), expected, atol=1e-5)
    dy = torch.randn_like(expected)
    found = thin_weight_gradient(layer, x, dy, b)
    for i, (xs, dys) in enumerate(zip(x.chunk(b), dy.chunk(b), strict=True)):
        (gradient,) = torch.autograd.grad(layer(xs), layer.weight, dys)
        assert torch.allclose(found[i], gradient, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [dict(stride=2), dict(dilation=2), dict(groups=2), dict(padding="same"), dict(padding=1, padding_mode="reflect")],
    ids=str,
)
def test_other_geometries_are_not_thin(options):
    assert is_thin(nn.Conv2d(64, 2, 3)) and not is_thin(nn.Conv2d(64, 2, 3, **options))


def test_many_output_channels_are_not_thin():
    assert not is_thin(nn.Conv2d(64, 64, 3))
