"""What a pretraining leaves behind: a stock diffusers folder that says it is not private, and a grid of samples."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, StableDiffusionPipeline, UNet2DModel

from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel, load_base, save_base
from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.durable import make_weights_readable
from dp_peft_diffusion.pretraining.vocabulary import write_vocabulary
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, PretrainRecipe

BASE, AUTOENCODER = "base", "vae"  # sub-folders of the output folder
GUIDANCE = 2.0  # of the grid of a base with prompts
README = """# Made by `dp-peft pretrain`: NOT private

These weights were trained on {images}, taken as PUBLIC images, without any protection. Whoever has the weights may find
those images in them. No epsilon belongs to this folder. If the images were not public, delete it.

It holds {what}, which stock diffusers opens. What it is made for:

```sh
{next}
```
"""


def write_base(
    recipe: PretrainRecipe,
    output_dir: Path,
    unet: UNet2DModel,
    scheduler: DDPMScheduler | EDMEulerScheduler,
    layout: BaseLayout,
    vae: AutoencoderKL | None,
    device: torch.device,
) -> None:
    """Write a base, read it back as its users will, and draw a grid of public classes from it."""
    save_base(output_dir / BASE, unet, scheduler, layout)
    if vae is not None:
        vae.save_pretrained(output_dir / BASE / AUTOENCODER)
    base = finished_base(recipe, output_dir, device)
    labels = None if layout.null_class is None else torch.arange(64) * layout.null_class // 64
    conditions = None if labels is None else {"class_labels": labels}
    images = sample_images(base, conditions, num_images=64, seed=0, device=device)
    image_grid(images, columns=8).save(output_dir / "samples.png")


def write_pipeline(
    recipe: PretrainRecipe,
    output_dir: Path,
    pipeline: StableDiffusionPipeline,
    pictures: torch.Tensor,  # (n, c, side, side) uint8
    captions: list[str],  # of the pictures
    device: torch.device,
) -> None:
    """Write a base with prompts, read it back as its users will, and draw a grid: images above samples of theirs."""
    pipeline.save_pretrained(output_dir / BASE, safe_serialization=True)
    write_vocabulary(output_dir / BASE / "tokenizer", pipeline.tokenizer)
    base = finished_base(recipe, output_dir, device)
    assert base.text is not None  # as it was written
    conditions = base.text.encode(captions)
    samples = sample_images(base, conditions, num_images=len(captions), seed=0, guidance_scale=GUIDANCE, device=device)
    write_pairs(pictures, samples, output_dir)


def finished_base(recipe: PretrainRecipe, output_dir: Path, device: torch.device) -> BaseModel:
    """The base that was saved in `output_dir`, told what it is in its README.md, and read back as its users will."""
    folder = output_dir / BASE
    make_weights_readable(folder)
    write_readme(folder, recipe)
    return load_base(str(folder)).to(device)


def write_pairs(pictures: torch.Tensor, samples: torch.Tensor, output_dir: Path) -> None:
    """The grid: rows of eight pictures (n, c, side, side) uint8, and below them what was drawn of each."""
    pairs = torch.stack([pictures.view(-1, 8, *pictures.shape[1:]), samples.view(-1, 8, *samples.shape[1:])], 1)
    image_grid(pairs.flatten(0, 2), columns=8).save(output_dir / "samples.png")


def write_readme(folder: Path, recipe: PretrainRecipe) -> None:
    """Say in the folder itself what it must not be taken for."""
    images = Path(recipe.dataset_name).name  # not where it lay on somebody's machine
    size = f"{recipe.resolution} x {recipe.resolution} {'grey' if recipe.image_channels == 1 else 'colour'} images"
    if recipe.kind == "autoencoder":
        what, channels = f"an autoencoder of {size}", recipe.image_channels
        kind = "captions --characters" if recipe.characters else "latent"
        shape = f"--resolution {recipe.resolution} --image_channels {channels}"
        follow = f"dp-peft pretrain --kind {kind} --vae THIS_FOLDER --dataset_name PATH_TO_PUBLIC_IMAGES {shape}"
    else:
        net = "a StableDiffusionPipeline" if recipe.kind == "captions" else "a UNet"
        what, given = f"{net} that draws {size}", f"--dataset_name {PATH_TO_IMAGES} --epsilon 1"
        follow = f"dp-peft train --pretrained_model_name_or_path THIS_FOLDER {given}"
        if recipe.kind == "codes":
            follow = follow.replace("train", "train --recipe mnist-codes --train_batch_size NUMBER_OF_IMAGES", 1)
    (folder / "README.md").write_text(README.format(images=images, what=what, next=follow))


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 on the CPU, same shape."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
