"""A UNet learns to denoise public images, in pixels or in the latents of an autoencoder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel

from dp_peft_diffusion.diffusion.base_model import BaseLayout
from dp_peft_diffusion.diffusion.objectives import Objective, make_objective
from dp_peft_diffusion.pretraining.autoencoder import load_autoencoder
from dp_peft_diffusion.pretraining.folder import BASE, write_base
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import build_scheduler, build_unet, encode, latent_shape
from dp_peft_diffusion.recipe import PretrainRecipe

P_MEAN, P_STD = -1.2, 1.2  # of log sigma while training (Karras et al. 2022, table 1)


class Denoising:
    """`kind: pixel` and `kind: latent`.

    With labels, the class table has a row for each class, the null row, and spare rows that are given the null row's
    values when the base is written.
    """

    folder = BASE

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images = PublicImages(recipe)
        self.vae = None if recipe.vae is None else load_autoencoder(recipe.vae).to(device)
        self.scheduler = build_scheduler(recipe)
        self.objective = make_objective(self.scheduler)
        self.trained = self._new_unet().to(device)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean denoising loss of one batch."""
        images, labels = self.images.draw(generator)
        told = {}
        if self.images.num_classes:
            dropped = torch.rand(len(labels), generator=generator) < self.recipe.label_dropout
            told = {"class_labels": labels.masked_fill(dropped, self.images.num_classes).to(self.device)}
        clean = self.encode(images.to(self.device))
        return denoising_loss(self.trained, self.objective, clean, generator, **told)

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights as a base, and a grid of its samples."""
        unet, layout = self._new_unet(), BaseLayout(self.recipe.pixel_packing)
        unet.load_state_dict(ema)
        if self.images.num_classes:
            null, rows = self.images.num_classes, unet.class_embedding.weight.detach()
            rows[null + 1 :] = rows[null]
            layout = BaseLayout(self.recipe.pixel_packing, null, (null + 1, len(rows)))
        write_base(self.recipe, output_dir, unet, self.scheduler, layout, self.vae, self.device)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """What the network sees of images (b, c, side, side), as `BaseModel.encode` of the base will have it."""
        if self.vae is None:
            return F.pixel_unshuffle(images, self.recipe.pixel_packing)
        return self.vae.config.scaling_factor * encode(self.vae, images)

    def _new_unet(self) -> UNet2DModel:
        recipe, classes = self.recipe, self.images.num_classes
        rows = classes + 1 + recipe.spare_classes if classes else None
        if self.vae is None:
            side, channels = recipe.resolution // recipe.pixel_packing, recipe.image_channels * recipe.pixel_packing**2
        else:
            channels, side = latent_shape(self.vae, recipe)
        return build_unet(recipe, side, channels, rows)


def denoising_loss(
    unet: UNet2DModel | UNet2DConditionModel,
    objective: Objective,
    clean: torch.Tensor,  # (b, c, h, w)
    generator: torch.Generator,
    **conditions: torch.Tensor,
) -> torch.Tensor:
    """Mean loss of a batch, with one draw of noise and noise level for each image.

    conditions: what the net is told besides: class_labels (b,), rows of the class table or the rows themselves, or
        encoder_hidden_states (b, T, D).
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    levels = draw_levels(objective, len(clean), generator).to(clean.device)

    def predict(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return unet(noisy, times, **conditions).sample

    return objective.losses(predict, clean[:, None], noise[:, None], levels).mean()


def draw_levels(objective: Objective, count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count, 1), uniform; or sigma, log-normal, where noise levels are continuous."""
    if objective.num_timesteps is None:
        return (P_MEAN + P_STD * torch.randn(count, 1, generator=generator)).exp()
    return torch.randint(objective.num_timesteps, (count, 1), generator=generator)
