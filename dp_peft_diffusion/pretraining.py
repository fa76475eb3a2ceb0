"""Pretrain a base on public images. Not private: nothing here may see an image that must not leak."""

import json
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel, fingerprint, save_base
from dp_peft_diffusion.diffusion.datasets import open_dataset
from dp_peft_diffusion.diffusion.generation import image_grid, sample_images
from dp_peft_diffusion.diffusion.glyphs import DIHEDRAL, augment, crop_glyph
from dp_peft_diffusion.diffusion.objectives import denoising_losses
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import PretrainRecipe, to_yaml

CHECKPOINT_EVERY = 500  # steps
CODE_NOISE = 0.2  # per coordinate, where a class code has root mean square 1


class ClassCodes(nn.Module):
    """A class table of low rank: row = null row + code / rms(code) @ directions.

    Every class lies on a sphere around the null row, and noise on the codes makes the net smooth
    between classes. A new class then needs `rank` numbers instead of a whole row, which is what
    private training of class rows is short of.
    """

    def __init__(self, codes: torch.Tensor, dim: int):
        super().__init__()
        num_classes, rank = codes.shape
        self.codes = nn.Parameter(codes)
        self.directions = nn.Parameter(torch.randn(rank, dim) / math.sqrt(rank))
        self.null = nn.Parameter(torch.zeros(dim))

    def unit_codes(self) -> torch.Tensor:
        """Codes with root mean square 1, (num_classes, rank)."""
        return self.codes * torch.rsqrt(self.codes.square().mean(dim=1, keepdim=True) + 1e-8)

    def forward(self, classes: torch.Tensor, dropped: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Rows (b, dim) of noisy codes; a dropped label is the null row."""
        codes = self.unit_codes()[classes] + CODE_NOISE * noise
        return self.null + torch.where(dropped[:, None], 0.0, codes) @ self.directions

    def table(self, num_spare: int) -> torch.Tensor:
        """The stock class table: public rows, the null row, and spare rows that start as the null row."""
        rows = self.null + self.unit_codes() @ self.directions
        return torch.cat([rows, self.null.expand(1 + num_spare, -1)]).detach()


def pretrain(recipe: PretrainRecipe, output_dir: Path) -> Path:
    """Train a class-conditional handwriting base, resuming from `output_dir` when it holds a checkpoint.

    Returns the folder of the base (EMA weights), readable by stock `from_pretrained`.

    Raises:
        UserError: the images have no label column, or the folder holds a pretraining by another recipe.
    """
    claim_folder(output_dir, recipe)
    torch.manual_seed(recipe.seed)
    glyphs, characters = load_glyphs(recipe)
    num_classes = DIHEDRAL * (int(characters.max()) + 1)
    unet = build_unet(recipe, num_classes)
    codes = ClassCodes(initial_codes(glyphs, characters, recipe.class_code_rank), unet.class_embedding.embedding_dim)
    unet.class_embedding = nn.Identity()  # rows come from `codes` while training
    device = Accelerator(cpu=torch.backends.mps.is_available()).device
    trained = nn.ModuleDict({"unet": unet, "codes": codes}).to(device)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    optimizer = torch.optim.Adam(trained.parameters(), lr=recipe.learning_rate)
    ema = {name: value.detach().clone() for name, value in trained.state_dict().items()}
    first = _resume(output_dir, trained, optimizer, ema)
    log = open(output_dir / "pretraining.jsonl", "a")  # noqa: SIM115
    started, bar = time.monotonic(), tqdm(range(first, recipe.max_train_steps), initial=first, desc="pretrain")
    for step in bar:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.max_train_steps, recipe.lr_warmup_steps)
        loss = _loss(recipe, trained, scheduler, glyphs, characters, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        for name, value in trained.state_dict().items():
            ema[name].lerp_(value, 1 - decay)
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 5), "seconds": round(time.monotonic() - started, 1)}
            print(json.dumps(line), file=log, flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.max_train_steps:
            _checkpoint(output_dir, step + 1, trained, optimizer, ema)
            _export(recipe, output_dir / "base", num_classes, scheduler, ema)
    return output_dir / "base"


def claim_folder(output_dir: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe into the folder, which resumes this recipe only.

    Raises:
        UserError: the folder holds a pretraining by another recipe.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "recipe.yaml"
    if path.is_file() and path.read_text() != to_yaml(recipe):
        raise UserError(f"--output_dir {output_dir} holds a pretraining with other options. Choose another folder.")
    path.write_text(to_yaml(recipe))


def load_glyphs(recipe: PretrainRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """All characters, cropped: ((n, 1, CANVAS, CANVAS) uint8, (n,) labels)."""
    rows = open_dataset(recipe.dataset_name)
    for column in (recipe.image_column, recipe.label_column):
        if column not in rows.column_names:
            raise UserError(f"the images have no column {column!r}; there is: {', '.join(rows.column_names)}")
    labels = rows[recipe.label_column]
    if not all(isinstance(label, int) for label in labels):
        raise UserError(f"the labels in {recipe.label_column!r} must be whole numbers, one for each character.")
    images = [crop_glyph(image, recipe.invert) for image in rows[recipe.image_column]]
    return torch.stack(images), torch.tensor(labels)


def initial_codes(glyphs: torch.Tensor, characters: torch.Tensor, rank: int) -> torch.Tensor:
    """Codes (num_classes, rank) from the principal components of the mean images of the classes.

    Like characters start with like codes. Random codes teach the net nothing for thousands of steps:
    it learns to ignore them. Components count by the square root of their spread.
    """
    means = torch.stack([glyphs[characters == c].float().mean(dim=0) for c in range(int(characters.max()) + 1)])
    small = nn.functional.interpolate(means, size=(16, 16), mode="area")[:, 0]  # (characters, 16, 16)
    mirrored = [small, small.flip(2)]
    turned = torch.stack([torch.rot90(m, k, (1, 2)) for m in mirrored for k in range(DIHEDRAL // 2)], dim=1)
    offsets = turned.flatten(2).flatten(0, 1)  # (num_classes, 256), class = DIHEDRAL * character + turn
    left, spread, _ = torch.linalg.svd(offsets - offsets.mean(dim=0), full_matrices=False)
    codes = left[:, :rank] * spread[:rank].sqrt()
    return codes / codes.square().mean().sqrt()


def build_unet(recipe: PretrainRecipe, num_classes: int) -> UNet2DModel:
    """A small UNet on packed pixels with a class table of public, null and spare rows."""
    levels = len(recipe.block_out_channels)
    channels = recipe.pixel_packing**2
    return UNet2DModel(
        sample_size=recipe.resolution // recipe.pixel_packing,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=num_classes + 1 + recipe.spare_classes,
    )


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _loss(
    recipe: PretrainRecipe,
    trained: nn.ModuleDict,
    scheduler: DDPMScheduler,
    glyphs: torch.Tensor,
    characters: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    b, device = recipe.train_batch_size, next(trained.parameters()).device
    picked = torch.randint(len(glyphs), (b,), generator=generator)
    turns = torch.randint(DIHEDRAL, (b,), generator=generator)
    images = augment(glyphs[picked], turns, recipe.resolution, generator)
    clean = nn.functional.pixel_unshuffle(images, recipe.pixel_packing)
    dropped = torch.rand(b, generator=generator) < recipe.label_dropout
    code_noise = torch.randn(b, recipe.class_code_rank, generator=generator)
    classes = DIHEDRAL * characters[picked] + turns
    rows = trained["codes"](*(tensor.to(device) for tensor in (classes, dropped, code_noise)))
    noise = torch.randn(b, 1, *clean.shape[1:], generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (b, 1), generator=generator)

    def denoise(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return trained["unet"](noisy, steps, class_labels=rows).sample

    on_device = (tensor.to(device) for tensor in (clean, noise, timesteps))
    return denoising_losses(denoise, scheduler, *on_device).mean()


def _checkpoint(
    output_dir: Path, step: int, trained: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, torch.Tensor]
) -> None:
    """Write everything a resumed run needs, then move it into place: a kill leaves the last good one."""
    tensors = {f"model.{name}": value for name, value in trained.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    partial = output_dir / "checkpoint.partial"
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"step": str(step)})
    os.replace(partial, output_dir / "checkpoint.safetensors")


def _resume(
    output_dir: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, torch.Tensor]
) -> int:
    path = output_dir / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trained.load_state_dict({name: tensors[f"model.{name}"] for name in ema})
    ema.update({name: tensors[f"ema.{name}"].to(value.device) for name, value in ema.items()})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def _export(
    recipe: PretrainRecipe, folder: Path, num_classes: int, scheduler: DDPMScheduler, ema: dict[str, torch.Tensor]
) -> None:
    """The EMA weights as a stock diffusers folder, and a grid of samples of public classes."""
    unet = build_unet(recipe, num_classes)
    codes = ClassCodes(torch.zeros(num_classes, recipe.class_code_rank), unet.class_embedding.embedding_dim)
    codes.load_state_dict({name.removeprefix("codes."): ema[name] for name in ema if name.startswith("codes.")})
    weights = {name.removeprefix("unet."): ema[name] for name in ema if name.startswith("unet.")}
    unet.load_state_dict({**weights, "class_embedding.weight": codes.table(recipe.spare_classes)})
    layout = BaseLayout(
        pixel_packing=recipe.pixel_packing,
        null_class=num_classes,
        spare_classes=(num_classes + 1, num_classes + 1 + recipe.spare_classes),
        class_code_rank=recipe.class_code_rank,
    )
    save_base(folder, unet, scheduler, layout)
    base = BaseModel(unet.eval(), scheduler, layout, str(folder), None, "unet", fingerprint(unet))
    labels = torch.arange(64) * (num_classes // 64)
    images = sample_images(base, labels, seed=0)
    image_grid(images, columns=8).save(folder.parent / "samples.png")
