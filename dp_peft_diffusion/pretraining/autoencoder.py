"""A small KL autoencoder learns public images; its latents are what a latent base denoises.

Plain: absolute error and a small KL term. The autoencoders of latent diffusion (Rombach et al. 2022, section 3.1 and
appendix G) add a perceptual and an adversarial loss, for which further nets would have to be downloaded or trained.
Theirs are sharper.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.durable import make_weights_readable
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.folder import AUTOENCODER, to_bytes, write_readme
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import build_autoencoder, encode
from dp_peft_diffusion.recipe import PretrainRecipe

IMAGES_FOR_SCALE = 1024  # public images whose latents give the scaling factor


class Reconstruction:
    """`kind: autoencoder`."""

    folder = AUTOENCODER

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images = open_images(recipe)
        self.trained = build_autoencoder(recipe).to(device)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Summed absolute error plus kl_weight times the summed KL of one batch, per number in an image."""
        images = self.images.draw(generator)[0].to(self.device)  # (b, c, side, side)
        posterior = self.trained.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        rebuilt = self.trained.decode(posterior.mean + posterior.std * noise).sample
        errors = (images - rebuilt.float()).abs().flatten(1).sum(dim=1)  # (b,)
        return (errors + self.recipe.kl_weight * posterior.kl().float()).mean() / images[0].numel()

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights with their scaling factor, and a grid of originals above reconstructions."""
        vae = build_autoencoder(self.recipe).to(self.device).eval()
        vae.load_state_dict(ema)
        vae.register_to_config(scaling_factor=scaling_factor(vae, self.images))
        vae.save_pretrained(output_dir / self.folder)
        make_weights_readable(output_dir / self.folder)
        write_readme(output_dir / self.folder, self.recipe)
        originals = self._first(32)
        with torch.no_grad():
            rebuilt = vae.decode(encode(vae, originals)).sample
        pairs = torch.stack([originals.view(-1, 8, *originals.shape[1:]), rebuilt.view(-1, 8, *rebuilt.shape[1:])], 1)
        image_grid(to_bytes(pairs.flatten(0, 2)), columns=8).save(output_dir / "samples.png")

    def _first(self, count: int) -> torch.Tensor:
        """The first images of the data set, over and over if there are fewer."""
        return self.images.read(torch.arange(count) % len(self.images)).to(self.device)


def open_images(recipe: PretrainRecipe) -> PublicImages | Characters:
    """The recipe's images: characters that change at random, or images as they are."""
    return Characters(recipe) if recipe.characters else PublicImages(recipe)


def scaling_factor(vae: AutoencoderKL, images: PublicImages | Characters) -> float:
    """One over the standard deviation of latents (Rombach et al. 2022, appendix G), of PUBLIC images spread evenly."""
    count = min(len(images), IMAGES_FOR_SCALE)
    ids = torch.arange(count) * len(images) // count
    latents = [encode(vae, images.read(part).to(vae.device)) for part in ids.split(64)]
    return 1 / torch.cat(latents).std().item()


def load_autoencoder(name: str) -> AutoencoderKL:
    """The frozen autoencoder in a folder, or in its sub-folder vae.

    Raises:
        UserError: there is none.
    """
    folder = Path(name) / AUTOENCODER if (Path(name) / AUTOENCODER).is_dir() else Path(name)
    if not folder.is_dir():  # diffusers would ask the Hub
        raise UserError(
            f"--vae {name!r}: no such folder. `dp-peft pretrain --recipe NAME-vae` makes the autoencoder that recipe "
            "NAME asks for; give its folder."
        )
    try:
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--vae {name!r} could not be opened as a diffusers AutoencoderKL: {error}") from error
    vae.register_to_config(_name_or_path="")  # where it lies here is nobody's business once it is in a base
    return vae.requires_grad_(False).eval()
