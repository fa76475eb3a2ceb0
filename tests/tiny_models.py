"""Small bases made in process, for tests."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from dp_peft_diffusion.diffusion.base_model import BaseLayout, save_base


def tiny_unet(num_class_embeds: int | None = 30, packing: int = 1, seed: int = 0) -> UNet2DModel:
    """A UNet2DModel of about 20,000 parameters for 8x8 inputs."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=packing**2,
        out_channels=packing**2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=num_class_embeds,
    )
    return unet.requires_grad_(False).eval()


def tiny_image_folder(folder: Path, levels: dict[str, int], count: int) -> Path:
    """An image folder of grey noise, 16x16: `count` images for each class, around the class's grey level."""
    rng = np.random.default_rng(0)
    for name, level in levels.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(rng.normal(level, 20, (16, 16)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def tiny_base_folder(folder: Path, num_class_embeds: int | None = 30, packing: int = 2) -> Path:
    """A base on disk: 9 public classes, a null row and 20 spare rows; or an unconditional one."""
    layout = BaseLayout(packing, 9, (10, 30), 4) if num_class_embeds else BaseLayout(packing)
    save_base(folder, tiny_unet(num_class_embeds, packing), DDPMScheduler(prediction_type="v_prediction"), layout)
    return folder
