"""Images from a shareable folder: what each of them shows, and the base that its adapter goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dp_peft_diffusion import recipe as recipes
from dp_peft_diffusion.diffusion.adapters import load_whole_model, merge_adapter
from dp_peft_diffusion.diffusion.autoencoding import load_autoencoder
from dp_peft_diffusion.diffusion.base_folder import find_folder
from dp_peft_diffusion.diffusion.base_model import BaseModel, check_fit, load_base
from dp_peft_diffusion.diffusion.conditions import LABEL, class_prompts, null_conditions
from dp_peft_diffusion.diffusion.grids import to_pil
from dp_peft_diffusion.diffusion.samplers import default_batch_size, sample_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.adapter_files import holds_whole_model
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME
from dp_peft_diffusion.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class ImageSource:
    """A model, and what its images show: image i shows entry i of the labels, rows and prompts, taken in turn.

    sample: scheduler, num_inference_steps, guidance_scale and seed.
    """

    base: BaseModel
    sample: recipes.Sample
    labels: tuple[str, ...] | None  # names of classes
    rows: tuple[int, ...] | None  # theirs in the class table
    prompts: tuple[str, ...] | None  # of a text-conditional base
    batch_size: int
    dtype: torch.dtype
    device: torch.device | str

    def batches(self, ids: range) -> Iterator[tuple[range, Tensor]]:
        """The ids of a batch and its images (n, c, side, side) uint8, for all of `ids`."""
        for start in range(ids.start, ids.stop, self.batch_size):
            batch = range(start, min(ids.stop, start + self.batch_size))
            yield (
                batch,
                sample_images(
                    self.base,
                    self.conditions(batch),
                    num_images=len(batch),
                    first_image=start,
                    seed=self.sample.seed,
                    scheduler=self.sample.scheduler,
                    num_inference_steps=self.sample.num_inference_steps,
                    guidance_scale=self.sample.guidance_scale,
                    batch_size=self.batch_size,
                    dtype=self.dtype,
                    device=self.device,
                ),
            )

    def conditions(self, ids: range) -> dict[str, Tensor]:
        """What the network is told of these images."""
        if self.prompts is not None and self.base.text is not None:
            wanted = [self.prompts[i % len(self.prompts)] for i in ids]
            distinct = list(dict.fromkeys(wanted))
            places = torch.tensor([distinct.index(prompt) for prompt in wanted])
            return {name: rows[places.to(rows.device)] for name, rows in self.base.text.encode(distinct).items()}
        if self.rows is not None:
            return {"class_labels": torch.tensor([self.rows[i % len(self.rows)] for i in ids])}
        return null_conditions(self.base, len(ids))

    def told(self, i: int) -> dict[str, str]:
        """What is written beside image i: its `label`, its `text`."""
        columns = {"label": self.labels, "text": self.prompts}
        return {name: entries[i % len(entries)] for name, entries in columns.items() if entries is not None}


def open_source(
    folder: Path | str,
    *,
    class_labels: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    base: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ImageSource:
    """A shareable folder as a source of images: the adapter merged into its base in float32, or the whole model in it.

    class_labels, prompts: taken in turn; None takes all classes in turn. What is None is as in the folder's recipe.

    Raises:
        UserError: unknown class name, not an adapter folder, another base than it was trained on, or no prompts.
    """
    folder = Path(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    loaded = base_of(folder, recipe, base)
    labels = choose_labels(loaded, recipe, class_labels, prompts)
    names, rows = recipe.data.class_names or (), recipe.adapter.class_rows
    given: dict[str, Any] = {
        "scheduler": scheduler,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    unet = loaded.unet if holds_whole_model(folder) else merge_adapter(loaded.unet, folder)
    return ImageSource(
        base=replace(loaded, unet=unet).to(device),
        sample=replace(recipe.sample, seed=seed, **{key: value for key, value in given.items() if value is not None}),
        labels=labels,
        rows=None if labels is None or rows is None else tuple(rows[names.index(label)] for label in labels),
        prompts=choose_prompts(loaded, recipe, prompts, labels),
        batch_size=batch_size or default_batch_size(loaded),
        dtype=dtype,
        device=device,
    )


def choose_labels(
    base: BaseModel, recipe: Recipe, wanted: Sequence[str] | None, prompts: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The names of classes that images take in turn: those wanted, or all; None where prompts or nothing is shown.

    Raises:
        UserError: a name that is no class, or classes where there are none.
    """
    if wanted and prompts:
        raise UserError("--class_labels and --prompt both say what to show. Leave one of them out.")
    names = recipe.data.class_names
    if names is None or (base.text is None and recipe.adapter.class_rows is None):
        if wanted:
            raise UserError("this adapter has no classes; leave out --class_labels.")
        return None
    return None if prompts else tuple(names[i] for i in class_indices(names, wanted, len(wanted or names)))


def choose_prompts(
    base: BaseModel, recipe: Recipe, prompts: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The prompts that images take in turn: those given, those of the labels, or those of the recipe's grids.

    Never captions, which are private.

    Raises:
        UserError: prompts for a base that reads no text, or none for one that does.
    """
    if base.text is None:
        if prompts:
            raise UserError(f"--prompt: base {base.name!r} reads no text. Use --class_labels, or leave it out.")
        return None
    template = recipe.data.prompt_template
    if prompts or labels:
        return tuple(prompts or class_prompts(labels, template))
    if recipe.sample.prompts or LABEL not in template:
        return recipe.sample.prompts or (template,)
    raise UserError(
        "this adapter was trained on captions, which are private. Say what to show: --prompt 'a photo of ...'"
    )


def generate(
    folder: Path | str,
    *,
    num_images: int = 64,
    first_image: int = 0,
    class_labels: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    base: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[list[Image.Image], list[str] | None]:
    """Sample from a shareable folder, as `open_source` says, which has the options.

    first_image: the first of the images; image i alone is first_image=i, num_images=1.

    Returns PIL images, and their class names (None if they have none).

    Raises:
        UserError: what `open_source` and `sample_images` refuse.
    """
    source = open_source(
        folder,
        class_labels=class_labels,
        prompts=prompts,
        scheduler=scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        base=base,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    ids = range(first_image, first_image + num_images)
    images = [image for _, batch in source.batches(ids) for image in to_pil(batch)]
    return images, None if source.labels is None else [source.told(i)["label"] for i in ids]


def base_of(folder: Path, recipe: Recipe, base: str | None) -> BaseModel:
    """The base that a folder's adapter goes on, loaded from `base` or from where the recipe says.

    A folder with a whole model is its own base, but for the autoencoder of one on latents.

    Raises:
        UserError: nobody says where the base lies, or it is another than was trained on.
    """
    name, revision = base or recipe.model.pretrained_model_name_or_path, None if base else recipe.model.revision
    whole = load_whole_model(folder) if holds_whole_model(folder) else None
    if whole is not None and not whole.layout.latent:
        return whole
    if base is None and name.startswith("./"):
        raise UserError(f"{folder} was trained on a base in a local folder. Say where it lies: --base PATH/{name[2:]}")
    loaded = load_base(name, revision) if whole is None else with_autoencoder(whole, name, revision)
    check_base(loaded, folder)
    return loaded


def with_autoencoder(model: BaseModel, name: str, revision: str | None) -> BaseModel:
    """A net on latents, with the autoencoder of the base `name`.

    Raises:
        UserError: that base has none, or one that does not fit.
    """
    vae = load_autoencoder(find_folder(name, revision), name)
    if vae is None:
        raise UserError(
            f"--base {name}: this model draws latents, and no autoencoder lies there. Give the base it was trained on."
        )
    whole = replace(model, vae=vae, name=name)
    check_fit(whole)
    return whole


def check_base(base: BaseModel, folder: Path) -> None:
    """The base must be the one that the certificate names. Without privacy there is no certificate to ask.

    Of a whole model only the autoencoder comes from elsewhere.

    Raises:
        UserError: its weights are others, or those of its autoencoder or text encoders.
    """
    if not (folder / FILE_NAME).is_file():
        return
    trained_on = certificate.read(folder)["base"]
    found = {
        "sha256": ("weights", base.sha256),
        "parts_sha256": ("an autoencoder or text encoders", base.parts_digest),
    }
    if holds_whole_model(folder):
        del found["sha256"]
    for key, (what, own) in found.items():
        wanted = trained_on.get(key, own)  # certificates of before have no parts_sha256
        if wanted != own:
            raise UserError(
                f"{folder} was trained on {trained_on['name']} with {what} {(wanted or 'none')[:12]}, but {base.name} "
                f"has {(own or 'none')[:12]}. Give the right one with --base."
            )


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
