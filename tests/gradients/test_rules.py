"""Every rule against plain autograd, one example at a time."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn

from dp_peft_diffusion.gradients.functional import loop_clipped_sum, vmap_clipped_sum
from tests.gradients.cases import CLIPS, Layers, clipper_for, relative_error, repeated_loss

CONVOLUTIONS = {
    "3x3": dict(kernel_size=3, padding=1),
    "3x3 without bias": dict(kernel_size=3, padding=1, bias=False),
    "1x1": dict(kernel_size=1),
    "1x1 padded": dict(kernel_size=1, padding=1),
    "1x1 same": dict(kernel_size=1, padding="same"),
    "1x1 stride 2": dict(kernel_size=1, stride=2),
    "1x1 grouped": dict(kernel_size=1, groups=2),
    "stride 2 with a remainder": dict(kernel_size=3, stride=2),
    "3x1": dict(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)),
    "dilated": dict(kernel_size=3, dilation=(1, 2), padding=2),
    "grouped": dict(kernel_size=3, groups=2, padding=1),
    "depthwise": dict(kernel_size=3, groups=4, padding=1),
    "same": dict(kernel_size=(2, 4), padding="same"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=(1, 2), padding_mode="reflect"),
    "circular same": dict(kernel_size=3, padding="same", padding_mode="circular"),
}


def check(model, x, k, clip):
    batch, loss_fn = (x,), repeated_loss(k)
    expected = loop_clipped_sum(model, loss_fn, batch, clip)
    found = clipper_for(model, clip).clipped_sum_of(loss_fn, batch)
    assert relative_error(found, expected) < 1e-5
    assert all(tensor.dtype == torch.float64 for tensor in found.values())


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)], ids=str)
def test_linear_equals_the_loop_with_any_middle_axes(middle, k, clip):
    check(Layers(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)), torch.randn(5, *middle, 4), k, clip)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv2d_equals_the_loop_in_every_geometry(options, k, memory_format, clip):
    model = Layers(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, **options))
    x = torch.randn(4, 4, 7, 6).contiguous(memory_format=memory_format)
    check(model.to(memory_format=memory_format), x, k, clip)


SPACES = {nn.Conv1d: (9,), nn.Conv3d: (4, 5, 6)}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=1),
        dict(kernel_size=2, padding="same"),
        dict(kernel_size=3, stride=2, dilation=1, groups=2),
        dict(kernel_size=2, dilation=2),
        dict(kernel_size=3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_conv1d_and_conv3d_equal_the_loop(kind, options, k, clip):
    check(Layers(kind(4, 6, 3, padding=1), nn.Tanh(), kind(6, 4, **options)), torch.randn(4, 4, *SPACES[kind]), k, clip)


NORMS = {
    "group norm of images": (lambda: nn.GroupNorm(2, 4), (4, 5, 3)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance-like group norm": (lambda: nn.GroupNorm(4, 4), (4, 6)),
    "layer norm of tokens": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer norm of vectors": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (5, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 4)),
    "rms norm of two axes": (lambda: nn.RMSNorm((3, 4), eps=1e-3), (3, 4)),
    "rms norm of diffusers": (lambda: DiffusersRMSNorm(4, eps=1e-5, bias=True), (5, 4)),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("make, shape", NORMS.values(), ids=NORMS)
def test_norms_equal_the_loop(make, shape, k, clip):
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, *shape)
    check(Layers(norm), x if x.dim() != 4 else x.contiguous(memory_format=torch.channels_last), k, clip)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4)], ids=["group", "layer"])
def test_a_norm_may_train_its_weight_or_its_bias_alone(norm, frozen):
    model = Layers(norm)
    norm.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
    check(model, torch.randn(5, 4), 3, CLIPS["flat"])


@pytest.mark.parametrize("b", [1, 2, 8])
def test_conv2d_equals_the_loop_at_every_batch_size_on_transposed_activations(b):
    class Transposed(nn.Module):
        def forward(self, x):  # strides that belong to no memory format
            return x.transpose(-1, -2).flatten(2).transpose(1, 2).reshape(len(x), 4, 6, 6).transpose(1, 3)

    model = Layers(nn.Conv2d(4, 4, 3, padding=1), Transposed(), nn.Conv2d(6, 5, 3, stride=2))
    check(model, torch.randn(b, 4, 6, 6), 2, CLIPS["flat"])


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)], ids=str)
def test_embedding_equals_the_loop_with_repeated_and_padding_rows(shape, padding_idx, k, clip):
    model = Layers(nn.Embedding(4, 3, padding_idx=padding_idx), nn.Linear(3, 2))
    check(model, torch.randint(0, 4, shape), k, clip)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 3)], ids=["linear", "conv2d"])
def test_a_frozen_half_of_a_layer_is_left_out(layer, frozen):
    model = Layers(layer)
    layer.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
    x = torch.randn(5, 4) if isinstance(layer, nn.Linear) else torch.randn(5, 4, 5, 5)
    check(model, x, 3, CLIPS["flat"])


def test_vmap_agrees_with_the_loop_and_with_the_rules():
    model = Layers(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    batch, loss_fn = (torch.randn(5, 4, 4, 4),), repeated_loss(1)
    for clip in CLIPS.values():
        by_vmap = vmap_clipped_sum(model, loss_fn, batch, clip)
        assert relative_error(by_vmap, loop_clipped_sum(model, loss_fn, batch, clip)) < 1e-5
        assert relative_error(by_vmap, clipper_for(model, clip).clipped_sum_of(loss_fn, batch)) < 1e-5
