"""The start-up self-check finds what would break the bound, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients import taps
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.merged import MergedLora
from dp_peft_diffusion.gradients.rules import RULES
from dp_peft_diffusion.gradients.self_check import check_gradients
from tests.gradients.cases import Layers, Twice, repeated_loss
from tests.gradients.test_clipper import ATTENTION, denoising_loss, images, tiny_unet


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def at_start(targets=(*ATTENTION, "conv1"), **options):
    """A fresh adapter, whose B is zero."""
    model = tiny_unet(targets, **options)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["hooks", "vmap"])
def test_a_right_model_passes_and_keeps_every_bit(options):
    unet = at_start(ATTENTION, **options)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    check_gradients(PerSampleClipper(unet), denoising_loss(2), images(2, 2))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_right_model_passes_in_bfloat16():
    def autocast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return denoising_loss(2)(model, batch).float()

    check_gradients(PerSampleClipper(at_start()), autocast_loss, images(2, 2), torch.bfloat16)


def planted_scale(monkeypatch):
    """Every gradient of B twice as large as it is."""
    right = MergedLora.gradients

    def wrong(self, x, dy, b):
        return {name: g * (2 if "lora_B" in name else 1) for name, g in right(self, x, dy, b).items()}

    monkeypatch.setattr(MergedLora, "gradients", wrong)


def planted_zero(monkeypatch):
    """A's gradients lost: unseen as long as B is zero."""
    right = MergedLora.gradients

    def wrong(self, x, dy, b):
        return {name: g * (0 if "lora_A" in name else 1) for name, g in right(self, x, dy, b).items()}

    monkeypatch.setattr(MergedLora, "gradients", wrong)


def planted_order(monkeypatch):
    """Rows taken as draw-major."""
    right = MergedLora.gradients

    def wrong(self, x, dy, b):
        def swap(rows):
            return rows.unflatten(0, (-1, b)).transpose(0, 1).flatten(0, 1)

        return right(self, swap(x), swap(dy), b)

    monkeypatch.setattr(MergedLora, "gradients", wrong)


@pytest.mark.parametrize("plant", [planted_scale, planted_zero, planted_order])
def test_a_planted_bug_is_found_at_the_start_of_training_and_nothing_stays_moved(monkeypatch, plant):
    unet = at_start()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    plant(monkeypatch)
    with pytest.raises(UserError, match=r"lora_[AB]\.default\.weight differ"):
        check_gradients(PerSampleClipper(unet), denoising_loss(2), images(2, 2))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_lost_second_call_is_found(monkeypatch):
    def overwrite(self, site, activations, backprops):
        self.gradients |= {f"{site.path}.{n}": g for n, g in site.gradients(activations, backprops, self.b).items()}

    check_gradients(PerSampleClipper(Layers(Twice())), repeated_loss(2), (torch.randn(2, 4),))
    monkeypatch.setattr(taps.Pass, "collect", overwrite)
    with pytest.raises(UserError, match=r"layers\.0\.layer\.weight differ"):
        check_gradients(PerSampleClipper(Layers(Twice())), repeated_loss(2), (torch.randn(2, 4),))


def test_a_wrong_rule_of_any_layer_is_found(monkeypatch):
    model = Layers(nn.GroupNorm(1, 4), nn.Linear(4, 3))
    check_gradients(PerSampleClipper(model), repeated_loss(2), (torch.randn(2, 4),))
    rule = RULES[nn.GroupNorm]
    wrong = rule._replace(gradients=lambda *args: {n: g.flip(0) for n, g in rule.gradients(*args).items()})
    monkeypatch.setitem(RULES, nn.GroupNorm, wrong)
    with pytest.raises(UserError, match=r"layers\.0\.\w+ differ"):
        check_gradients(PerSampleClipper(model), repeated_loss(2), (torch.randn(2, 4),))


def test_a_trainable_tensor_without_effect_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
            self.eval()

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UserError, match="scale has no effect"):
        check_gradients(PerSampleClipper(Half()), repeated_loss(2), (torch.randn(2, 4),))


def test_one_example_is_too_few():
    with pytest.raises(UserError, match="2 or more"):
        check_gradients(PerSampleClipper(at_start()), denoising_loss(2), images(1, 2))


def test_a_fresh_lora_is_moved_off_zero_for_the_check():
    """At B = 0 the gradient of A is zero, and a wrong one would be too."""
    seen = []

    def loss_fn(model, batch):
        seen.append(all(p.any() for name, p in model.named_parameters() if ".lora_B." in name))
        return denoising_loss(2)(model, batch)

    check_gradients(PerSampleClipper(at_start()), loss_fn, images(2, 2))
    assert seen and all(seen)


class Positions(nn.Module):
    """One table for the whole batch, of as many rows as there are examples, or a multiple."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.eval()

    def forward(self, x):  # (b, 4, 3)
        return x + self.table(torch.arange(4))


def test_a_table_whose_rows_look_like_examples_is_found():
    def loss_fn(model, batch):
        return (model(batch) * batch).flatten(1).sum(dim=1)

    with pytest.raises(UserError, match="table.weight differ"):
        check_gradients(PerSampleClipper(Positions()), loss_fn, torch.randn(2, 4, 3))
