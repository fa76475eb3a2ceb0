"""How the data room sees a base: what makes the network's inputs of images, and embeddings of captions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class Text(Protocol):
    """Frozen text encoders."""

    @property
    def null(self) -> Mapping[str, torch.Tensor]:
        """What no prompt is: arrays of one row, as `encode` gives them."""

    def encode(self, prompts: list[str]) -> Mapping[str, torch.Tensor]:
        """Embeddings (n, ...) of n prompts."""


class Encoder(Protocol):
    """How a base sees images and captions; `BaseModel` is one."""

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""

    @property
    def image_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def is_latent(self) -> bool:
        """Whether the net sees what a frozen autoencoder makes of an image."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(c, h, w) of the net's input."""

    @property
    def text(self) -> Text | None:
        """None where the base takes no prompts."""

    @property
    def digest(self) -> str:
        """What tells this base from another."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, c, s, s) in [-1, 1] -> (n, *input_shape)."""


@dataclass(frozen=True)
class PixelEncoder:
    """Pixels as they are, without any base: for evaluation."""

    resolution: int
    image_channels: int
    is_latent: bool = False
    text: None = None
    digest: str = ""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(c, s, s)."""
        return (self.image_channels, self.resolution, self.resolution)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The images."""
        return images
