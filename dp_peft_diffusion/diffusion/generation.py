"""Sampling from a base or a merged model with any diffusers scheduler, and image grids."""

import csv
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image

from dp_peft_diffusion.diffusion.adapters import load_whole_model, merge_adapter
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.adapter_files import holds_whole_model
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME
from dp_peft_diffusion.recipe import Recipe, load_recipe

SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}


def make_scheduler(base: BaseModel, name: str) -> SchedulerMixin:
    """A sampler on the base's own noise schedule: a short name, or a diffusers class name.

    Raises:
        UserError: diffusers has no such scheduler.
    """
    class_name = SCHEDULERS.get(name, name)
    if class_name not in dir(diffusers) or not class_name.endswith("Scheduler"):
        raise UserError(f"--scheduler {name!r}: diffusers has no such scheduler. Try {', '.join(SCHEDULERS)}.")
    return getattr(diffusers, class_name).from_config(base.scheduler.config)


@torch.no_grad()
def sample_images(
    base: BaseModel,
    class_labels: torch.Tensor | None,  # (n,) rows of the class table; None for an unconditional base
    *,
    num_images: int | None = None,
    seed: int,
    scheduler: str = "ddim",
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Images (n, c, side, side) uint8. Image i depends on `seed` and i alone, not on the batch.

    guidance_scale: classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w); 1 is without.

    Raises:
        UserError: guidance asked of a base that has no null class.
    """
    if guidance_scale != 1.0 and class_labels is not None and base.layout.null_class is None:
        raise UserError("--guidance_scale needs a base with a null class; this one has none. Leave it at 1.")
    n = len(class_labels) if class_labels is not None else num_images or 0
    shape = (base.unet.config.in_channels, *[base.resolution // base.layout.pixel_packing] * 2)
    parts = []
    for start in range(0, n, batch_size):
        ids = range(start, min(n, start + batch_size))
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in ids]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        labels = None if class_labels is None else class_labels[start : ids.stop].to(device)
        try:
            sampler = make_scheduler(base, scheduler)
            sampler.set_timesteps(num_inference_steps, device=device)
            x = _denoise(base, sampler, noise * sampler.init_noise_sigma, labels, guidance_scale, generators)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise UserError(
                f"--scheduler {scheduler} with {num_inference_steps} steps does not fit this base: {error}. "
                f"Try {', '.join(SCHEDULERS)}."
            ) from error
        parts.append(base.decode(x).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, base.image_channels, base.resolution, base.resolution).byte()


def _denoise(
    base: BaseModel,
    sampler: SchedulerMixin,
    x: torch.Tensor,  # (b, c, h, w)
    labels: torch.Tensor | None,
    guidance_scale: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(x, t)
        prediction = base.unet(scaled, t, class_labels=labels).sample
        if guidance_scale != 1.0 and labels is not None and base.layout.null_class is not None:
            null = base.unet(scaled, t, class_labels=torch.full_like(labels, base.layout.null_class)).sample
            prediction = null + guidance_scale * (prediction - null)
        x = sampler.step(prediction, t, x, **extra).prev_sample
    return x


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(n, c, h, w) uint8 -> PIL images, grey or RGB."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def image_grid(images: torch.Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """One picture of all images (n, c, h, w) uint8, row by row, with a thin grey line between."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 96, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = 1 + index // columns * (h + 1), 1 + index % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def generate(
    folder: Path | str,
    *,
    num_images: int = 64,
    class_labels: Sequence[str] | None = None,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    base: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[Image.Image], list[str] | None]:
    """Sample from a shareable folder: the adapter merged into its base in float32, or the whole model in it.

    class_labels: class names, taken in turn; None takes all classes in turn. What is None is as in
    the folder's recipe. Returns PIL images, and their class names (None if the adapter has no classes).

    Raises:
        UserError: unknown class name, not an adapter folder, or another base than it was trained on.
    """
    recipe = load_recipe(Path(folder) / "recipe.yaml")
    loaded = base_of(Path(folder), recipe, base)
    names, rows = recipe.data.class_names, recipe.adapter.class_rows
    if class_labels and (names is None or rows is None):
        raise UserError(f"adapter {folder} has no classes; leave out --class_labels.")
    labels = None if names is None or rows is None else class_indices(names, class_labels, num_images)
    unet = loaded.unet if holds_whole_model(folder) else merge_adapter(loaded.unet, folder)
    merged = replace(loaded, unet=unet.to(device))
    images = sample_images(
        merged,
        class_rows(loaded, rows, labels, num_images),
        num_images=num_images,
        seed=seed,
        scheduler=scheduler or recipe.sample.scheduler,
        num_inference_steps=num_inference_steps or recipe.sample.num_inference_steps,
        guidance_scale=recipe.sample.guidance_scale if guidance_scale is None else guidance_scale,
        device=device,
    )
    return to_pil(images), None if labels is None or names is None else [names[i] for i in labels]


def base_of(folder: Path, recipe: Recipe, base: str | None) -> BaseModel:
    """The base that a folder's adapter goes on, loaded from `base` or from where the recipe says.

    A folder with a whole model is its own base.

    Raises:
        UserError: nobody says where the base lies, or it is another than was trained on.
    """
    if holds_whole_model(folder):
        return load_whole_model(folder)
    name = recipe.model.pretrained_model_name_or_path
    if base is None and name.startswith("./"):
        raise UserError(f"{folder} was trained on a base in a local folder. Say where it lies: --base PATH/{name[2:]}")
    loaded = load_base(base or name, None if base else recipe.model.revision)
    check_base(loaded, folder)
    return loaded


def check_base(base: BaseModel, folder: Path) -> None:
    """The base must be the one that the certificate names. Without privacy there is no certificate to ask.

    Raises:
        UserError: its weights are others.
    """
    if not (folder / FILE_NAME).is_file():
        return
    trained_on = certificate.read(folder)["base"]
    if trained_on["sha256"] != base.sha256:
        raise UserError(
            f"{folder} was trained on {trained_on['name']} with weights {trained_on['sha256'][:12]}..., but "
            f"{base.name} has {base.sha256[:12]}... Give the right one with --base."
        )


def class_rows(
    base: BaseModel, rows: Sequence[int] | None, labels: Sequence[int] | None, num_images: int
) -> torch.Tensor | None:
    """Rows of the class table (n,) for private classes; the null row without classes; None if there is no table."""
    if base.num_class_embeds is None:
        return None
    if rows is None or labels is None:
        return torch.full((num_images,), base.layout.null_class or 0)
    return torch.tensor(rows)[torch.tensor(labels)]


def class_indices(names: Sequence[str], wanted: Sequence[str] | None, num_images: int) -> list[int]:
    """The class of each image: the wanted names (default all) in turn.

    Raises:
        UserError: a name that is not among the classes.
    """
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise UserError(f"--class_labels {unknown[0]!r} is not a class of this adapter. There is: {', '.join(names)}")
    chosen = [names.index(name) for name in wanted or names]
    return [chosen[i % len(chosen)] for i in range(num_images)]


def write_images(folder: Path, images: list[Image.Image], labels: list[str] | None, parquet: bool = False) -> None:
    """Write PNGs with a metadata.csv as `datasets` reads them, a grid, and a parquet file on request."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files = [f"{index:06d}.png" for index in range(len(images))]
    for name, image in zip(files, images, strict=True):
        image.save(folder / "images" / name)
    with open(folder / "images" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name"] if labels is None else ["file_name", "label"])
        writer.writerows([name] if labels is None else [name, labels[i]] for i, name in enumerate(files))
    stacked = torch.stack([torch.from_numpy(np.atleast_3d(np.array(image))) for image in images]).permute(0, 3, 1, 2)
    image_grid(stacked[:400], columns=min(20, max(1, int(len(images) ** 0.5)))).save(folder / "grid.png")
    if parquet:
        rows: dict = {"image": images} | ({} if labels is None else {"label": labels})
        features = datasets.Features(
            {"image": datasets.Image()} | ({} if labels is None else {"label": datasets.Value("string")})
        )
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "images.parquet")
