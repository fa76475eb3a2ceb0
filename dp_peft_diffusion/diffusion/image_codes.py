"""Codes: a few numbers that say what an image shows. Some bases are told a code, in place of a class."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from dp_peft_diffusion.diffusion.base_folder import load_part, read_settings
from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.errors import UserError

ENCODER = "encoder"  # sub-folder of a base
CANVAS = 16  # side of the small image that a sketch is made of
SKETCHED = 0.6  # norm of the sketch in a code, which is a unit vector


class CodeEncoder(ModelMixin, ConfigMixin):
    """Images -> codes, and codes -> what the base is told: a row, as if of its class table.

    A code is a unit vector of two parts. The first says what is shown: the features of a net that tells public classes
    apart. The second, the sketch, says where it lies: the image at 16x16 pixels. Both are taken in the directions in
    which they vary most among public images. No layer mixes images: the code of one does not depend on those beside it.

    Args:
        code_size: numbers of a code.
        sketch_size: how many of them are the sketch.
        row_size: width of the class table.
        others: as `FeatureNet` takes them.
    """

    @register_to_config
    def __init__(
        self,
        code_size: int = 64,
        sketch_size: int = 16,
        row_size: int = 128,
        resolution: int = 32,
        image_channels: int = 1,
        pixel_packing: int = 1,
        block_out_channels: Sequence[int] = (32, 64, 80),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        trained_on: str = "",
    ):
        super().__init__()
        self.features = FeatureNet(
            resolution, image_channels, pixel_packing, block_out_channels, layers_per_block, norm_num_groups, trained_on
        )
        self.shown = nn.Linear(block_out_channels[-1], code_size - sketch_size)
        self.sketch = nn.Linear(image_channels * CANVAS**2, sketch_size)
        self.directions = nn.Linear(code_size, row_size, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (b, code_size), unit vectors, of images (b, c, side, side) in [-1, 1]."""
        shown = nn.functional.normalize(self.shown(self.features(images)), dim=1)
        sketch = nn.functional.normalize(self.sketch(on_canvas(images)), dim=1)
        return torch.cat([math.sqrt(1 - SKETCHED**2) * shown, SKETCHED * sketch], dim=1)

    def rows(self, codes: torch.Tensor) -> torch.Tensor:
        """What the base is told (b, row_size) of codes (b, code_size); nothing at all is zeros."""
        return self.directions(codes * math.sqrt(codes.shape[1]))  # root mean square 1

    @torch.no_grad()
    def fit(self, images: Sequence[torch.Tensor]) -> None:
        """Take the directions of codes from PUBLIC images, batches (b, c, side, side) in [-1, 1]."""
        fit_principal(self.shown, torch.cat([self.features(batch) for batch in images]))
        fit_principal(self.sketch, torch.cat([on_canvas(batch) for batch in images]))


def on_canvas(images: torch.Tensor) -> torch.Tensor:
    """Images (b, c, side, side) at 16x16 pixels, (b, c * 256)."""
    return nn.functional.interpolate(images, size=(CANVAS, CANVAS), mode="area").flatten(1)


@torch.no_grad()
def fit_principal(layer: nn.Linear, vectors: torch.Tensor) -> None:
    """Make `layer` give the leading principal components of `vectors` (n, d), each over the square root of its spread.

    That is half way between components as large as they are, and all of them equally large.
    """
    mean, directions, spread = principal_directions(vectors.double(), layer.out_features)
    weight = directions * (spread / spread[0]).clamp(min=1e-3).rsqrt()[:, None]  # (size, d)
    layer.weight.copy_(weight)
    layer.bias.copy_(-weight @ mean)


def principal_directions(vectors: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (d,) of vectors (n, d), their leading principal directions (size, d), and singular values (size,).

    The largest number of a direction is positive, so that no chance decides its sign.
    """
    mean = vectors.mean(dim=0)
    _, spread, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    directions = directions[:size]
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    return mean, directions * signs, spread[:size]


def load_encoder(folder: Path, name: str) -> CodeEncoder | None:
    """The frozen encoder that lies beside a base's UNet; None where there is none.

    name: of the base, for messages.

    Raises:
        UserError: it cannot be opened.
    """
    settings = read_settings(folder / ENCODER / "config.json")
    if settings is None:
        return None
    if settings.get("_class_name") != CodeEncoder.__name__:
        raise UserError(
            f"base {name!r}: its {ENCODER} is {settings.get('_class_name')}, and this version knows "
            f"{CodeEncoder.__name__} alone. Choose another base."
        )
    return load_part(CodeEncoder, folder / ENCODER, name)
