"""The hooks on a real UNet with peft adapters, and around it: life cycle and refusals."""

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import loop_clipped_sum, trainable, vmap_clipped_sum
from tests.gradients.cases import AUTOMATIC, CLIPS, FLAT, Layers, Twice, clipper_for, relative_error, repeated_loss

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_out"]


def tiny_unet(targets=(*ATTENTION, *CONVOLUTION), **lora):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    unet.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=False, **lora)
    return inject_adapter_in_model(config, unet).eval()


def denoising_loss(k, memory_format=torch.contiguous_format):
    def loss_fn(unet, batch):
        images, noise, timesteps = batch  # (b, 1, s, s), (b, k, 1, s, s), (b, k)
        rows = images.repeat_interleave(k, dim=0) + noise.flatten(0, 1)
        predicted = unet(rows.contiguous(memory_format=memory_format), timesteps.flatten()).sample
        return (predicted - noise.flatten(0, 1)).square().flatten(1).mean(dim=1).view(-1, k).mean(dim=1)

    return loss_fn


def images(b, k):
    torch.manual_seed(1)
    return torch.randn(b, 1, 8, 8), torch.randn(b, k, 1, 8, 8), torch.randint(0, 1000, (b, k))


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("k", [1, 3])
def test_lora_on_a_unet_equals_the_loop(k, checkpointing, memory_format, clip):
    unet = tiny_unet().to(memory_format=memory_format)
    batch, loss_fn = images(4, k), denoising_loss(k, memory_format)
    expected = loop_clipped_sum(unet, loss_fn, batch, clip)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    clipper = clipper_for(unet, clip)
    assert relative_error(clipper.clipped_sum_of(loss_fn, batch), expected) < 1e-5


def test_lora_on_a_unet_agrees_with_vmap():
    unet, batch, loss_fn = tiny_unet(), images(4, 1), denoising_loss(1)
    expected = vmap_clipped_sum(unet, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(unet, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


def test_reentrant_checkpointing_is_refused_with_the_way_out():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)

    model = Layers(nn.Linear(4, 4), Checkpointed(Layers(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))))
    with pytest.raises(UserError, match="use_reentrant=False"):
        clipper_for(model, FLAT).clipped_sum_of(repeated_loss(3), (torch.randn(5, 4),))
    assert not patched(model)


def test_both_ways_to_call_give_the_same_bits():
    unet, batch, loss_fn = tiny_unet(), images(4, 2), denoising_loss(2)
    clipper = clipper_for(unet, FLAT)
    with clipper:
        losses = loss_fn(unet, batch)
    total = clipper.clipped_sum(losses)
    again = clipper.clipped_sum_of(loss_fn, batch)
    assert all(torch.equal(total[name], again[name]) for name in again)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_micro_batches_add_up_to_the_whole_batch(clip):
    unet, batch, loss_fn = tiny_unet(), images(7, 2), denoising_loss(2)
    clipper = clipper_for(unet, clip)
    whole = clipper.clipped_sum_of(loss_fn, batch)
    for size in (1, 3):
        total = clipper.zeros()
        for start in range(0, 7, size):
            part = clipper.clipped_sum_of(loss_fn, tuple(tensor[start : start + size] for tensor in batch))
            total = {name: total[name] + part[name] for name in total}
        assert relative_error(total, whole) < 1e-6


def test_a_layer_called_twice_adds_its_two_gradients():
    batch, loss_fn = (torch.randn(5, 4),), repeated_loss(3)
    model = Layers(Twice())
    expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(model, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


def test_norms_are_those_of_single_examples_before_clipping():
    unet, batch, loss_fn = tiny_unet(), images(5, 2), denoising_loss(2)
    norms = clipper_for(unet, AUTOMATIC).norms_of(loss_fn, batch)
    for i in range(5):
        losses = loss_fn(unet, tuple(tensor[i : i + 1] for tensor in batch))
        gradients = torch.autograd.grad(losses.sum(), list(trainable(unet).values()))
        assert norms[i].item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    assert norms.dtype == torch.float64


def test_an_empty_batch_is_zero_without_a_forward():
    def crash(model, batch):
        raise AssertionError("ran the model")

    unet = tiny_unet()
    clipper = clipper_for(unet, FLAT)
    total = clipper.clipped_sum_of(crash, images(0, 1))
    assert {name: tensor.shape for name, tensor in total.items()} == {n: p.shape for n, p in trainable(unet).items()}
    assert all(tensor.dtype == torch.float64 and not tensor.any() for tensor in total.values())
    assert clipper.norms_of(crash, images(0, 1)).shape == (0,)
    with clipper:
        losses = torch.zeros(0)
    assert not any(tensor.any() for tensor in clipper.clipped_sum(losses).values())


def test_a_bfloat16_autocast_forward_is_clipped_in_float32():
    unet, batch, loss_fn = tiny_unet(), images(4, 1), denoising_loss(1)

    def autocast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch).float()

    clip = CLIPS["flat"]
    exact = loop_clipped_sum(unet, loss_fn, batch, clip)
    assert relative_error(clipper_for(unet, clip).clipped_sum_of(autocast_loss, batch), exact) < 0.1
    with torch.autocast("cpu", torch.bfloat16):  # also when the caller leaves it on around the backward
        found = clipper_for(unet, clip).clipped_sum_of(loss_fn, batch)
    expected = clipper_for(unet, clip).clipped_sum_of(autocast_loss, batch)
    assert relative_error(found, expected) < 1e-5


def test_nothing_is_left_on_parameters_and_frozen_ones_stay():
    unet = tiny_unet()
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    for parameter in trainable(unet).values():
        parameter.grad = torch.ones_like(parameter)  # of somebody else's backward
    attributes = {name: set(vars(parameter)) for name, parameter in unet.named_parameters()}
    clipper_for(unet, FLAT).clipped_sum_of(denoising_loss(2), images(3, 2))
    for name, parameter in unet.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert set(vars(parameter)) == attributes[name]


def patched(model):
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_no_leaf_outside_the_model_is_left_with_a_private_gradient():
    model, table = Layers(nn.Linear(4, 4)), torch.ones(4, requires_grad=True)
    clipper_for(model, FLAT).clipped_sum_of(lambda m, batch: (m(batch) * table).sum(dim=1), torch.randn(3, 4))
    assert table.grad is None


def test_an_in_place_activation_after_a_trainable_layer_equals_the_loop():
    model, batch, loss_fn = Layers(nn.Linear(4, 4), nn.ReLU(inplace=True)), (torch.randn(5, 4),), repeated_loss(2)
    expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
    assert relative_error(clipper_for(model, FLAT).clipped_sum_of(loss_fn, batch), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [LoKrConfig(rank_dropout=0.5), LoKrConfig(module_dropout=0.5), OFTConfig(oft_block_size=2, module_dropout=0.5)],
    ids=["lokr rank", "lokr module", "oft"],
)
def test_dropout_of_any_adapter_is_refused_whatever_it_is_called(config):
    config.target_modules = ["layers.0"]
    with pytest.raises(UserError, match=r"layers\.0 \(Linear\) has an adapter dropout of 0\.5"):
        PerSampleClipper(inject_adapter_in_model(config, Layers(nn.Linear(4, 4))).eval())


def test_forwards_are_restored_after_the_sum_and_after_an_exception():
    unet, batch, loss_fn = tiny_unet(), images(2, 1), denoising_loss(1)
    clipper = clipper_for(unet, FLAT)
    with pytest.raises(ZeroDivisionError), clipper:
        assert patched(unet)
        _ = 1 / 0
    assert not patched(unet)
    with clipper:
        losses = loss_fn(unet, batch)
    assert patched(unet)  # checkpointing recomputes in the backward
    clipper.clipped_sum(losses)
    assert not patched(unet)
    with clipper:
        losses = loss_fn(unet, batch).sum()
    with pytest.raises(UserError, match="shape"):
        clipper.clipped_sum(losses)
    assert not patched(unet)


def test_weights_changed_between_steps_are_seen():
    model, batch, loss_fn = Layers(nn.Linear(4, 3)), (torch.randn(5, 4),), repeated_loss(1)
    clipper = clipper_for(model, FLAT)
    for _ in range(2):
        expected = loop_clipped_sum(model, loss_fn, batch, FLAT)
        assert relative_error(clipper.clipped_sum_of(loss_fn, batch), expected) < 1e-5
        model.layers[0].weight.data = torch.randn(3, 4)


def test_clipped_parameters_are_the_trainable_ones_and_are_printed():
    unet = tiny_unet(ATTENTION)
    clipper = PerSampleClipper(unet)
    expected = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert list(clipper.parameters) == list(expected)
    assert all(clipper.parameters[name] is expected[name] for name in expected)
    count = sum(p.numel() for p in expected.values())
    line = f"clipping {count:,} of {count:,} trainable parameters in {len(expected)} tensors, by hooks"
    assert clipper.describe() == line
    unet.conv_in.weight.requires_grad_(True)
    assert clipper.describe() == line.replace(f"of {count:,}", f"of {count + unet.conv_in.weight.numel():,}")
    with pytest.raises(UserError, match="other parameters"):
        clipper.clipped_sum_of(denoising_loss(1), images(2, 1))


def raw_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
            self.eval()

        def forward(self, x):
            return self.layer(x) * self.scale

    return Scaled()


def subclass():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    return Layers(Odd(4, 4))


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("make", [raw_parameter, subclass])
def test_what_no_rule_knows_goes_through_torch_func_and_equals_the_loop(make, k, clip):
    model, batch, loss_fn = make(), (torch.randn(5, 4),), repeated_loss(k)
    clipper = clipper_for(model, clip)
    assert clipper.path == "vmap"
    expected = loop_clipped_sum(model, loss_fn, batch, clip)
    assert relative_error(clipper.clipped_sum_of(loss_fn, batch), expected) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dora_goes_through_torch_func_and_equals_the_loop():
    unet, batch, loss_fn = tiny_unet(ATTENTION, use_dora=True), images(3, 2), denoising_loss(2)
    clipper = clipper_for(unet, FLAT)
    assert clipper.path == "vmap"
    expected = loop_clipped_sum(unet, loss_fn, batch, FLAT)
    assert relative_error(clipper.clipped_sum_of(loss_fn, batch), expected) < 1e-5
    assert not any(tensor.any() for tensor in clipper.clipped_sum_of(loss_fn, images(0, 2)).values())


def tied():
    model = Layers(nn.Linear(4, 4), nn.Linear(4, 4))
    model.layers[1].weight = model.layers[0].weight
    return model


def tied_to_a_layer():
    layer = nn.Linear(4, 4)
    return Layers(layer, nn.Tanh(), layer)


def training_mode():
    model = Layers(nn.Linear(4, 4), nn.Tanh())
    model.layers[1].train()
    return model


def dropout_in_training():
    model = Layers(nn.Linear(4, 4), nn.Dropout(0.1))
    model.layers[1].train()
    return model


def weight_norm():
    return Layers(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def wrapped():
    model = Layers(nn.Linear(4, 4))
    model.layers[0].forward = model.layers[0].forward
    return model


REFUSED = {
    "tied weights": (tied, r"layers\.1\.weight is tied to layers\.0\.weight"),
    "a layer under two names": (tied_to_a_layer, r"layers\.2\.weight is tied to layers\.0\.weight"),
    "training mode": (training_mode, r"layers\.1 \(Tanh\) is in training mode"),
    "dropout in training": (dropout_in_training, r"layers\.1 \(Dropout\) is in training mode"),
    "a frozen batch norm": (
        lambda: Layers(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 4)),
        r"layers\.0 \(BatchNorm1d\) mixes",
    ),
    "an adapter dropout": (lambda: tiny_unet(ATTENTION, lora_dropout=0.1), r"to_q \(Linear\) has an adapter dropout"),
    "nothing trainable": (lambda: Layers(nn.Linear(4, 4)).requires_grad_(False), "no parameter"),
    "half precision": (lambda: Layers(nn.Linear(4, 4)).bfloat16(), r"layers\.0 \(Linear\) trains weight in torch\.bf"),
    "max_norm": (lambda: Layers(nn.Embedding(4, 4, max_norm=1.0)), r"layers\.0 \(Embedding\) has max_norm"),
    "scale_grad_by_freq": (lambda: Layers(nn.Embedding(4, 4, scale_grad_by_freq=True)), r"layers\.0 \(Embedding\)"),
    "a parametrization": (weight_norm, r"layers\.0"),
    "a wrapped forward": (wrapped, r"layers\.0 \(Linear\) has had its forward replaced"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_proved_right_is_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        PerSampleClipper(make())


def test_a_base_dropout_in_eval_mode_is_no_obstacle():
    PerSampleClipper(Layers(nn.Linear(4, 4), nn.Dropout(0.1)))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_grad_norm=0.0), "max_grad_norm"),
        (dict(max_grad_norm=float("nan")), "max_grad_norm"),
        (dict(max_grad_norm=float("inf")), "max_grad_norm"),
        (dict(clipping="normal"), "clipping"),
        (dict(clipping="automatic"), "gamma"),
        (dict(clipping="automatic", gamma=0.0), "gamma"),
        (dict(clipping="automatic", gamma=float("nan")), "gamma"),
        (dict(gamma=0.1), "gamma"),
    ],
)
def test_a_clip_function_that_bounds_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        PerSampleClipper(Layers(nn.Linear(4, 4)), **options)


def test_a_model_put_back_into_training_mode_is_refused_at_the_next_step():
    model = Layers(nn.Linear(4, 4))
    clipper = PerSampleClipper(model)
    model.train()
    with pytest.raises(UserError, match="training mode"):
        clipper.clipped_sum_of(repeated_loss(1), (torch.randn(2, 4),))


class Shared(nn.Module):
    """Looks at one row for the whole batch."""

    def __init__(self):
        super().__init__()
        self.code = nn.Linear(4, 4)
        self.eval()

    def forward(self, x):
        return x + self.code(torch.ones(1, 4))


class Unbatched(Shared):
    def forward(self, x):
        return x + self.code(torch.ones(4))


@pytest.mark.parametrize("model", [Shared(), Unbatched()], ids=["one row", "no row axis"])
def test_a_layer_whose_rows_are_not_a_multiple_of_b_is_refused_by_name(model):
    clipper = PerSampleClipper(model)
    with pytest.raises(UserError, match=r"layer code \(Linear\).*for 2 losses"):
        clipper.clipped_sum_of(repeated_loss(1), (torch.randn(2, 4),))
    assert not patched(model)


class Beside(nn.Module):
    """Uses a trainable weight beside its layer's own call."""

    def __init__(self, called):
        super().__init__()
        self.layer, self.called = nn.Linear(4, 4), called
        self.eval()

    def forward(self, x):
        return (self.layer(x) if self.called else x) + self.layer.weight.sum() * x


@pytest.mark.parametrize("called", [True, False])
def test_a_weight_that_reaches_the_loss_around_its_layer_is_refused_by_name(called):
    model = Beside(called)
    with pytest.raises(UserError, match=r"layer\.weight reaches the loss by another way"):
        PerSampleClipper(model).clipped_sum_of(repeated_loss(1), (torch.randn(2, 4),))
    assert model.layer.weight.grad is None


def test_a_trainable_parameter_without_gradient_is_refused_by_name():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.eval()

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UserError, match=r"unused\.weight got no gradient"):
        PerSampleClipper(Unused()).clipped_sum_of(repeated_loss(1), (torch.randn(2, 4),))


def test_calls_in_the_wrong_order_are_refused():
    model, batch, loss_fn = Layers(nn.Linear(4, 4)), (torch.randn(2, 4),), repeated_loss(1)
    clipper = PerSampleClipper(model)
    with pytest.raises(UserError, match="inside `with clipper:`"):
        clipper.clipped_sum(loss_fn(model, batch))
    with clipper:
        losses = loss_fn(model, batch)
    with pytest.raises(UserError, match=r"not backward\(\)"):
        losses.sum().backward()
    with clipper:
        losses = loss_fn(model, batch)
    with clipper:  # a new pass: the old losses are not its own
        loss_fn(model, batch)
    with pytest.raises(UserError, match="in this pass"):
        clipper.clipped_sum(losses)


def test_losses_that_do_not_match_the_batch_are_refused():
    clipper = PerSampleClipper(Layers(nn.Linear(4, 4)))
    with pytest.raises(UserError, match="one loss for each example"):
        clipper.clipped_sum_of(lambda model, batch: model(batch[0]).mean().view(1), (torch.randn(2, 4),))
    with pytest.raises(UserError, match="share their first size"):
        clipper.clipped_sum_of(repeated_loss(1), (torch.randn(2, 4), torch.randn(3, 4)))
