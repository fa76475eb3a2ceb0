"""Autoencoders of latent bases: images to latents and back, one at a time."""

from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel

from dp_peft_diffusion.diffusion.base_folder import load_part, read_settings
from dp_peft_diffusion.errors import UserError

Autoencoder: TypeAlias = AutoencoderKL | VQModel
AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel)}


def load_autoencoder(folder: Path, name: str) -> Autoencoder | None:
    """The autoencoder in a base's folder, if it is a latent base; diffusers' LDMPipeline calls it vqvae.

    Raises:
        UserError: one that this version cannot read.
    """
    place = next((folder / part for part in ("vae", "vqvae") if (folder / part).is_dir()), None)
    if place is None:
        return None
    config = read_settings(place / "config.json") or {}
    kind = config.get("_class_name", "unnamed")
    if kind not in AUTOENCODERS or config.get("latents_mean") is not None:
        what = "latents_mean" if kind in AUTOENCODERS else f"the class {kind}"
        raise UserError(
            f"base {name!r}: its autoencoder has {what}, and this version reads {' and '.join(AUTOENCODERS)} with "
            "scaling_factor. Choose another base."
        )
    return load_part(AUTOENCODERS[kind], place, name)


@torch.no_grad()
def to_latents(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images (n, c, side, side) in [-1, 1] -> latents (n, channels, h, w), on the autoencoder's device.

    The mean of the posterior, shifted and scaled as the autoencoder's config says (Rombach et al. 2022, section 3.1),
    never by data. Each image goes through alone, in float32 and one fixed shape, so that no image changes a bit of
    another's latent (invariants 4, 9).
    """
    shift, scale = _shift_and_scale(vae)
    images = images.to(vae.device, torch.float32)
    return torch.cat([(_encode(vae, image[None]) - shift) * scale for image in images])


@torch.no_grad()
def from_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_latents`: (n, channels, h, w) -> images (n, c, side, side)."""
    shift, scale = _shift_and_scale(vae)
    latents = latents.to(vae.device, torch.float32) / scale + shift
    return torch.cat([vae.decode(latent[None]).sample for latent in latents])


def downsampling(vae: Autoencoder) -> int:
    """Side of an image over that of its latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_channels(vae: Autoencoder) -> int:
    """Channels of a latent."""
    return vae.config.get("vq_embed_dim") or vae.config.latent_channels


def _encode(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    encoded = vae.encode(images)
    return encoded.latent_dist.mode() if isinstance(vae, AutoencoderKL) else encoded.latents


def _shift_and_scale(vae: Autoencoder) -> tuple[float, float]:
    """Latent = (what the encoder gives - shift) * scale."""
    return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
