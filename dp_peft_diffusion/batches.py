"""One micro-batch of examples with everything each draws, and its losses."""

import numpy as np
import torch

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.draws import draw_dropped_labels, draw_noise, draw_timesteps
from dp_peft_diffusion.diffusion.objectives import denoising_losses
from dp_peft_diffusion.gradients.functional import LossFn
from dp_peft_diffusion.recipe import Recipe

Batch = dict[str, torch.Tensor]
PUBLIC_KEY = bytes(16)  # draws for made-up inputs; no secret hangs on it


def make_batch(
    recipe: Recipe,
    base: BaseModel,
    images: torch.Tensor,  # (b, c, side, side) in [-1, 1]
    labels: torch.Tensor,  # (b,) private classes
    weights: torch.Tensor,  # (b,) 1, or 0 for a null record
    ids: np.ndarray,  # (b,) example ids
    key: bytes,
    step: int,
) -> Batch:
    """One micro-batch: images with everything each example draws in this step (invariant 8)."""
    draws, clean = recipe.train.noise_multiplicity, base.encode(images)
    batch = {
        "clean": clean,
        "weights": weights,
        "noise": draw_noise(key, step, ids, draws, tuple(clean.shape[1:])),
        "timesteps": draw_timesteps(key, step, ids, draws, base.scheduler.config.num_train_timesteps),
    }
    if base.num_class_embeds is not None:
        rows = torch.full((len(ids), draws), base.layout.null_class or 0)
        if recipe.adapter.class_rows:
            rows = torch.tensor(recipe.adapter.class_rows)[labels][:, None].expand(-1, draws)
            if recipe.train.label_dropout and base.layout.null_class is not None:
                dropped = draw_dropped_labels(key, step, ids, draws, recipe.train.label_dropout)
                rows = torch.where(dropped, base.layout.null_class, rows)
        batch["rows"] = rows
    return {name: value.to(base.unet.device) for name, value in batch.items()}


def public_batch(recipe: Recipe, base: BaseModel, images: torch.Tensor) -> Batch:
    """A batch of public images with labels in turn and draws from a public key."""
    n = len(images)
    labels = torch.arange(n) % max(1, len(recipe.data.class_names or ()))
    return make_batch(recipe, base, images, labels, torch.ones(n), np.arange(n), PUBLIC_KEY, step=0)


def made_up_batch(recipe: Recipe, base: BaseModel, n: int) -> Batch:
    """Images of noise from a public seed, as `public_batch` takes public ones."""
    shape = (n, base.image_channels, base.resolution, base.resolution)
    return public_batch(recipe, base, torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def make_loss(base: BaseModel, mixed_precision: str = "no") -> LossFn:
    """loss_fn(unet, batch) -> (b,), as the clipper takes it. A null record's loss is zero.

    mixed_precision: "no" or "bf16": of the network. Losses are float32.
    """

    def loss_fn(unet: torch.nn.Module, batch: Batch) -> torch.Tensor:
        rows = batch["rows"].flatten() if "rows" in batch else None

        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                return unet(noisy, timesteps, class_labels=rows).sample

        losses = denoising_losses(denoise, base.scheduler, batch["clean"], batch["noise"], batch["timesteps"])
        return losses * batch["weights"]

    return loss_fn
