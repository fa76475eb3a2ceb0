"""Small models and losses that the tests of this room share."""

import torch
from torch import Tensor, nn

from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Batch, Clip, Gradients

FLAT = Clip(max_grad_norm=0.1)
AUTOMATIC = Clip(max_grad_norm=0.1, clipping="automatic", gamma=0.05)
CLIPS = {"flat": FLAT, "automatic": AUTOMATIC}


class Layers(nn.Module):
    """Some layers, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def repeated_loss(k: int):
    """Losses (b,), each the mean over k rows that differ: draw j of an example is its input times (j + 1)."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        (x,) = batch
        b = len(x)
        rows = x.repeat_interleave(k, dim=0)
        if rows.is_floating_point():
            draw = torch.arange(1, k + 1).repeat(b).view(-1, *[1] * (x.dim() - 1))
            rows = rows * draw
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                rows = rows.contiguous(memory_format=torch.channels_last)
        return model(rows).flatten(1).sin().sum(dim=1).view(b, k).mean(dim=1)

    return loss_fn


def clipper_for(model: nn.Module, clip: Clip) -> PerSampleClipper:
    return PerSampleClipper(model, clip.max_grad_norm, clip.clipping, clip.gamma)


def distance(left: Gradients, right: Gradients) -> float:
    assert list(left) == list(right)
    return sum((left[name] - right[name]).double().square().sum() for name in left) ** 0.5


FLOOR = 0.1  # of the whole norm, in the error of each tensor: rounding of the large ones reaches the small ones


def relative_error(found: Gradients, expected: Gradients) -> float:
    """The worst tensor's: its distance, relative to its own norm and a share of the whole's."""
    assert list(found) == list(expected)
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    worst = ((found[name] - expected[name]).double().norm().item() / (norms[name] + FLOOR * whole) for name in norms)
    return max(worst)
