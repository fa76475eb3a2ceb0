"""A small convolutional classifier without its last layer: what it says of an image are features."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class FeatureNet(ModelMixin, ConfigMixin):
    """Levels of 3x3 convolutions, each with group norm and SiLU; all levels but the first halve the side.

    Features are the means of the last maps over the image. No layer mixes images: the features of an image do not
    depend on those beside it. Stock `save_pretrained` and `from_pretrained` of diffusers write and read it.

    Args:
        resolution: side of the images in pixels.
        image_channels: 1 for grey, 3 for colour.
        pixel_packing: side of the pixel blocks folded into channels.
        block_out_channels: width of each level; the last is the number of features.
        layers_per_block: convolutions in each level.
        norm_num_groups: groups of each group norm.
        trained_on: name of the public images that it was trained on.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 32,
        image_channels: int = 1,
        pixel_packing: int = 1,
        block_out_channels: Sequence[int] = (32, 64, 80),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        trained_on: str = "",
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(pixel_packing)]
        width = image_channels * pixel_packing**2
        for level, new_width in enumerate(block_out_channels):
            for layer in range(layers_per_block):
                stride = 2 if level > 0 and layer == 0 else 1
                convolution = nn.Conv2d(width, new_width, kernel_size=3, padding=1, stride=stride)
                layers += [convolution, nn.GroupNorm(norm_num_groups, new_width), nn.SiLU()]
                width = new_width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (b, d) of images (b, c, side, side) in [-1, 1]."""
        return self.layers(images).mean(dim=(2, 3))
