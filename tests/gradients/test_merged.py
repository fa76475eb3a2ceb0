"""LoRA layers run as one product: the same function and the same per-example gradients as their three branches."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dp_peft_diffusion.gradients.functional import loop_clipped_sum, trainable
from dp_peft_diffusion.gradients.merged import MergedLora, merged_layers
from tests.gradients.cases import CLIPS, FLAT, Layers, clipper_for, relative_error, repeated_loss
from tests.gradients.test_clipper import ATTENTION, CONVOLUTION, denoising_loss, images, tiny_unet

LAYERS = {
    "linear of tokens": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear of a grid without bias": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "conv 3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 7, 6)),
    "conv stride 2 with a remainder": (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 7, 6)),
    "conv 3x1": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), stride=(1, 2), bias=False), (4, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (4, 3, 4, 5)),
}
NOT_MERGED = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "reflecting": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "a bfloat16 base": lambda: nn.Linear(4, 6).bfloat16(),
}


def adapted(layer, frozen=(), **options):
    """A first layer that trains too, so that the adapted one owes it an input gradient, and LoRA off zero."""
    first = nn.Linear(4, 4) if isinstance(layer, nn.Linear) else type(layer)(4, 4, 1)
    model = Layers(first, nn.Tanh(), layer).requires_grad_(False)
    options = dict(r=2, lora_alpha=3, target_modules=["layers.0", "layers.2"]) | options
    model = inject_adapter_in_model(LoraConfig(init_lora_weights=False, **options), model).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_a_merged_layer_has_the_gradients_of_the_loop_in_every_geometry(make, shape, k, clip):
    model, loss_fn = adapted(make()), repeated_loss(k)
    assert list(merged_layers(model)) == ["layers.0", "layers.2"]
    batch = (torch.randn(4, *shape),)
    found = clipper_for(model, clip).clipped_sum_of(loss_fn, batch)
    assert relative_error(found, loop_clipped_sum(model, loss_fn, batch, clip)) < 1e-5


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_either_matrix_may_be_frozen(make, shape, frozen):
    model, loss_fn, batch = adapted(make(), [frozen]), repeated_loss(2), (torch.randn(4, *shape),)
    expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(model, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_the_merged_weight_is_the_one_that_peft_merges(make, shape, options):
    model = adapted(make(), **options)
    merged = merged_layers(model)["layers.2"]
    layer = copy.deepcopy(model.get_submodule("layers.2"))
    layer.merge()
    assert torch.allclose(merged.weight, layer.base_layer.weight, atol=1e-6)
    x = torch.randn(3, *shape)
    assert torch.allclose(merged.forward(x), model.get_submodule("layers.2")(x), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_lora_layer_of_a_unet_runs_merged_and_its_leaves_do_not(memory_format, monkeypatch):
    unet = tiny_unet().to(memory_format=memory_format)
    ran = []
    forward = MergedLora.forward
    monkeypatch.setattr(MergedLora, "forward", lambda self, x: ran.append(self.path) or forward(self, x))
    clipper_for(unet, FLAT).clipped_sum_of(denoising_loss(1, memory_format), images(2, 1))
    adapted_paths = {name.rsplit(".lora_A", 1)[0] for name in trainable(unet) if ".lora_A." in name}
    assert set(ran) == adapted_paths and len(ran) == len(adapted_paths)
    assert {path.rsplit(".", 1)[-1] for path in ran} >= set(CONVOLUTION) | {"to_q", "0"}


def test_under_autocast_the_thin_branch_stays_separate(monkeypatch):
    unet, batch = tiny_unet(ATTENTION), images(2, 1)
    monkeypatch.setattr(MergedLora, "forward", lambda self, x: pytest.fail("ran merged"))
    with torch.autocast("cpu", torch.bfloat16):
        assert clipper_for(unet, FLAT).clipped_sum_of(denoising_loss(1), batch)


@pytest.mark.parametrize("make", NOT_MERGED.values(), ids=NOT_MERGED)
def test_what_merging_would_change_is_left_unmerged_and_stays_exact(make):
    layer = make()
    model, loss_fn = adapted(layer, target_modules=["layers.2"]), repeated_loss(2)
    assert merged_layers(model) == {}
    x = torch.randn(3, 5, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 7, 6)
    if layer.weight.dtype == torch.bfloat16:
        model.layers[0].bfloat16()
        model.layers[2].lora_A.float(), model.layers[2].lora_B.float()
        x = x.bfloat16()
    expected = loop_clipped_sum(model, loss_fn, (x,), FLAT)
    found = clipper_for(model, FLAT).clipped_sum_of(loss_fn, (x,))
    assert relative_error(found, expected) < (1e-5 if layer.weight.dtype == torch.float32 else 2e-2)


def test_a_disabled_a_merged_or_a_second_adapter_is_left_to_peft():
    model = adapted(nn.Linear(4, 6))
    layer = model.get_submodule("layers.2")
    layer.enable_adapters(False)
    assert list(merged_layers(model)) == ["layers.0"]
    layer.enable_adapters(True)
    layer.merge()
    assert list(merged_layers(model)) == ["layers.0"]
    layer.unmerge()
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["layers.2"]), model, adapter_name="other")
    layer.set_adapter(["default", "other"])
    assert "layers.2" not in merged_layers(model)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_part_with_a_forward_hook_is_left_to_peft_and_stays_exact(part, register):
    model, loss_fn, batch = adapted(nn.Linear(4, 6)), repeated_loss(2), (torch.randn(4, 4),)
    layer = model.get_submodule(f"layers.2.{part}")
    doubled = (lambda m, x: (2 * x[0],)) if register == "register_forward_pre_hook" else (lambda m, x, y: 2 * y)
    getattr(layer, register)(doubled)
    assert list(merged_layers(model)) == ["layers.0"]
    expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(model, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


def halved(model, x):
    model.get_submodule("layers.2").scale_layer(0.5)
    outputs = model(x)
    model.get_submodule("layers.2").unscale_layer(0.5)
    return outputs


def against_its_base(model, x):
    """Half of the loss from a prediction without the adapter."""
    model.get_submodule("layers.2").enable_adapters(False)
    reference = model(x)
    model.get_submodule("layers.2").enable_adapters(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)  # peft switches gradients off with the adapter
    return model(x) - reference


@pytest.mark.parametrize("call", [halved, against_its_base])
def test_an_adapter_that_is_scaled_or_switched_off_inside_the_loss_stays_exact(call):
    model, batch = adapted(nn.Linear(4, 6)), (torch.randn(4, 4),)

    def loss_fn(model, batch):
        return call(model, batch[0]).sin().sum(dim=1)

    expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(model, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


def test_weights_that_change_before_the_sum_are_refused():
    model, batch = adapted(nn.Linear(4, 6)), (torch.randn(4, 4),)
    clipper = clipper_for(model, FLAT)
    with clipper:
        losses = repeated_loss(1)(model, batch)
    with torch.no_grad():
        trainable(model)["layers.2.lora_B.default.weight"].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        clipper.clipped_sum(losses)


def test_a_callers_autocast_around_the_sum_changes_nothing():
    model, batch = adapted(nn.Linear(4, 6)), (torch.randn(4, 4),)
    clipper, expected = clipper_for(model, FLAT), loop_clipped_sum(model, repeated_loss(1), batch, FLAT)
    with clipper:
        losses = repeated_loss(1)(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        total = clipper.clipped_sum(losses)
    assert relative_error(total, expected) < 1e-5


def test_nothing_stays_patched_when_merging_runs_out_of_memory(monkeypatch):
    model, batch = adapted(nn.Linear(4, 6)), (torch.randn(4, 4),)
    clipper = clipper_for(model, FLAT)
    with monkeypatch.context() as broken:
        broken.setattr("dp_peft_diffusion.gradients.taps.merged_layers", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            clipper.clipped_sum_of(repeated_loss(1), batch)
    assert clipper.clipped_sum_of(repeated_loss(1), batch)


def test_weights_that_change_between_steps_are_merged_again():
    model, loss_fn, batch = adapted(nn.Linear(4, 6)), repeated_loss(1), (torch.randn(4, 4),)
    clipper = clipper_for(model, FLAT)
    for change in (lambda p: p.data.mul_(2), lambda p: p.data.add_(0.1), lambda p: setattr(p, "data", -p.data)):
        expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
        assert relative_error(clipper.clipped_sum_of(loss_fn, batch), expected) < 1e-5
        for parameter in trainable(model).values():
            change(parameter)
