"""Against the hooks of Opacus 1.6.0: where they are right, and where they are not.

docs/explanation/why-not-opacus-hooks.md tells the story. What it says is checked here, so a version of Opacus that
behaves in another way fails these tests, and then the page is out of date.
"""

import opacus
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Gradients, loop_gradients, trainable
from tests.gradients.cases import Layers, relative_error
from tests.tiny_families import DenoisingLoss, made_up_batch, tiny_model

B = 3
PAGE = "docs/explanation/why-not-opacus-hooks.md"


def opacus_gradients(model: nn.Module, loss_fn, batch) -> Gradients:
    """{name: (b, *shape)} by the hooks of Opacus, on a model in training mode, which they need."""
    hooks = None
    try:
        hooks = GradSampleHooks(model.train(), loss_reduction="sum")
        loss_fn(model, batch).sum().backward()
        return {name: getattr(parameter, "grad_sample", None) for name, parameter in trainable(model).items()}
    finally:
        if hooks:
            hooks.cleanup()
        for parameter in model.eval().parameters():
            parameter.grad = None


def ours(model, loss_fn, batch) -> Gradients:
    return PerSampleClipper(model).gradients_of(loss_fn, batch)


def summed(gradients: Gradients) -> Gradients:
    return {name: gradient.sum(dim=0) for name, gradient in gradients.items()}


def of_the_sum(model, loss_fn, batch) -> Gradients:
    """What plain autograd says of all losses together."""
    parameters = trainable(model)
    gradients = torch.autograd.grad(loss_fn(model, batch).sum(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def convolution():
    torch.manual_seed(0)
    return Layers(nn.Conv2d(4, 5, 3, padding=1))


def squares(model, batch):
    return model(batch).square().flatten(1).sum(dim=1)


@pytest.mark.parametrize("stacked", [True, False], ids=["one draw", "two forwards"])
@pytest.mark.parametrize(
    "family, kind",
    [
        ("UNet2DModel", "lora"),
        ("UNet2DConditionModel", "lora"),
        ("UNet2DConditionModel", "lora_conv"),
        ("UNet2DConditionModel", "bitfit"),
        ("UNet2DConditionModel", "norm"),
        ("PixArt", "lora"),
        ("SD3", "lora"),
        ("Flux", "lora"),  # not DiT: training mode turns its label dropout on
    ],
)
def test_opacus_and_we_agree_where_activations_are_contiguous(family, kind, stacked):
    model, loss_fn = tiny_model(family, kind), DenoisingLoss(family, stacked=stacked)
    batch = made_up_batch(B, 1 if stacked else 2)
    assert relative_error(ours(model, loss_fn, batch), opacus_gradients(model, loss_fn, batch)) < 1e-5


def check_that_opacus_is_wrong_and_we_are_right(model, loss_fn, batch):
    truth = of_the_sum(model, loss_fn, batch)
    theirs = relative_error(summed(opacus_gradients(model, loss_fn, batch)), truth)
    mended = f"Opacus {opacus.__version__} gets this right (1.6.0 did not): bring {PAGE} up to date."
    assert theirs > 1e-2, mended
    assert relative_error(summed(ours(model, loss_fn, batch)), truth) < 1e-5
    assert relative_error(ours(model, loss_fn, batch), loop_gradients(model, loss_fn, batch)) < 1e-5


def test_opacus_is_wrong_on_a_convolution_of_channels_last_activations():
    x = torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = convolution()
    assert relative_error(opacus_gradients(model, squares, x), loop_gradients(model, squares, x)) < 1e-5
    check_that_opacus_is_wrong_and_we_are_right(model, squares, x.to(memory_format=torch.channels_last))


def test_opacus_is_wrong_on_lora_of_the_convolutions_of_unet2dmodel_as_it_comes():
    model, batch = tiny_model("UNet2DModel", "lora_conv"), made_up_batch(B, 1)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0].is_contiguous()}))
    DenoisingLoss("UNet2DModel")(model, batch)
    strided = {name.split(".resnets")[0] for name, contiguous in seen.items() if not contiguous}
    assert strided == {"mid_block", "up_blocks.0", "up_blocks.0.upsamplers.0.conv"}  # what follows attention
    for module in model.modules():
        module._forward_pre_hooks.clear()
    check_that_opacus_is_wrong_and_we_are_right(model, DenoisingLoss("UNet2DModel"), batch)


def test_opacus_is_wrong_on_lora_of_convolutions_of_a_channels_last_unet2dconditionmodel():
    model = tiny_model("UNet2DConditionModel", "lora_conv").to(memory_format=torch.channels_last)
    loss_fn = DenoisingLoss("UNet2DConditionModel", memory_format=torch.channels_last)
    check_that_opacus_is_wrong_and_we_are_right(model, loss_fn, made_up_batch(B, 1))


def test_opacus_takes_stacked_draws_for_examples_of_their_own():
    model, loss_fn, batch = tiny_model("DiT", "lora"), DenoisingLoss("DiT"), made_up_batch(B, 4)
    assert {len(gradient) for gradient in opacus_gradients(model, loss_fn, batch).values()} == {4 * B}
    assert {len(gradient) for gradient in ours(model, loss_fn, batch).values()} == {B}


def test_opacus_gets_no_gradients_under_gradient_checkpointing_of_unet2dconditionmodel():
    model, loss_fn = tiny_model("UNet2DConditionModel", "lora"), DenoisingLoss("UNet2DConditionModel")
    batch = made_up_batch(B, 1)
    expected = loop_gradients(model, loss_fn, batch)
    model.enable_gradient_checkpointing()
    assert set(opacus_gradients(model, loss_fn, batch).values()) == {None}
    assert relative_error(ours(model, loss_fn, batch), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dora", "ia3", "lokr", "oft", "vera"])
def test_opacus_has_no_gradients_of_raw_parameters(kind):
    model, loss_fn, batch = tiny_model("DiT", kind), DenoisingLoss("DiT"), made_up_batch(B, 1)
    try:
        found = opacus_gradients(model, loss_fn, batch)
    except (TypeError, NotImplementedError):  # for dora and oft
        found = {}
    assert set(found.values()) <= {None}
    assert relative_error(ours(model, loss_fn, batch), loop_gradients(model, loss_fn, batch)) < 1e-5


def test_opacus_needs_training_mode():
    model, x = convolution(), torch.randn(B, 4, 8, 8)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    with pytest.raises(ValueError, match="No activations"):
        squares(model.eval(), x).sum().backward()
    hooks.cleanup()
