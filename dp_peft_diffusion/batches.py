"""One micro-batch of examples with everything each draws, and its losses."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_peft_diffusion.diffusion.augmentation import augment
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.conditions import ConditionTable, condition_table, null_conditions
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.draws import draw_dropped_labels, draw_levels, draw_noise, draw_variants
from dp_peft_diffusion.diffusion.noise_levels import LevelQuantile, level_quantile
from dp_peft_diffusion.diffusion.objectives import Objective, make_objective
from dp_peft_diffusion.gradients.functional import LossFn
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE
from dp_peft_diffusion.recipe import Recipe

Batch = dict[str, Tensor]
PUBLIC_KEY = bytes(16)  # draws for made-up inputs; no secret hangs on it
MADE_UP_CAPTIONS = ("a cat", "two dogs in a park", "an old house", "a drawing of the sea")


@dataclass(frozen=True)
class Task:
    """What the network of a run learns: the objective, how noise levels are drawn, what it is told of each class.

    Everything in it is public.
    """

    recipe: Recipe
    base: BaseModel
    objective: Objective
    quantile: LevelQuantile
    conditions: ConditionTable


def make_task(recipe: Recipe, base: BaseModel) -> Task:
    """The task of a resolved recipe.

    Raises:
        UserError: objective, noise levels or prompts do not fit the base.
    """
    objective = make_objective(base.scheduler, recipe.train.snr_gamma)
    if recipe.data.caption_column is None:
        classes = recipe.data.class_names
        table = condition_table(base, recipe.adapter.class_rows, classes, recipe.data.prompt_template)
    else:
        table = ConditionTable(null_conditions(base, 1))  # each example brings its own
    return Task(recipe, base, objective, level_quantile(recipe.train, objective), table)


def make_batch(task: Task, examples: Examples, ids: np.ndarray, key: bytes, step: int) -> Batch:
    """One micro-batch: examples with everything each draws in this step (invariant 8).

    ids: (b,) example ids.
    """
    train, table = task.recipe.train, task.conditions
    views, draws = train.augmentation_multiplicity, train.noise_multiplicity
    clean, rows = views_of(task, examples, ids, key, step), views * draws
    if task.recipe.adapter.kind == "code_moments":
        return code_batch(task, clean, examples)
    batch = {
        "clean": clean,  # (b, views, c, h, w)
        "weights": examples.weights,  # (b,)
        "noise": draw_noise(key, step, ids, rows, tuple(clean.shape[2:])),  # (b, rows, c, h, w)
        "levels": draw_levels(key, step, ids, draws, views, task.quantile),  # (b, rows)
    }
    if table.rows:
        labels = examples.labels[:, None].expand(-1, rows)
        dropped = torch.zeros(labels.shape, dtype=torch.bool)
        if train.label_dropout:
            dropped = draw_dropped_labels(key, step, ids, rows, train.label_dropout)
        batch["labels"] = torch.where(dropped, table.null, labels)
        if examples.text:
            batch |= {"dropped": dropped, **examples.text}
    return {name: value.to(task.base.unet.device) for name, value in batch.items()}


@torch.no_grad()
def code_batch(task: Task, clean: Tensor, examples: Examples) -> Batch:
    """What `code_moments` sums: the codes of each example's views (b, views, d), its class and its weight."""
    base = task.base
    assert base.codes is not None  # `resolve` has refused other bases
    images = base.decode(clean.flatten(0, 1).to(base.unet.device))
    batch = {"codes": base.codes(images).unflatten(0, clean.shape[:2]), "labels": examples.labels}
    return {name: value.to(base.unet.device) for name, value in (batch | {"weights": examples.weights}).items()}


def views_of(task: Task, examples: Examples, ids: np.ndarray, key: bytes, step: int) -> Tensor:
    """The network inputs of each example's views, (b, views, c, h, w): changed anew, or picked among cached ones."""
    views, changes, base = task.recipe.train.augmentation_multiplicity, task.recipe.data.augmentations, task.base
    clean = examples.clean  # (b, variants, c, h, w)
    if base.is_latent:
        if changes is None:
            return clean
        picked = draw_variants(key, step, ids, views, clean.shape[1])  # (b, views)
        return clean[torch.arange(len(clean))[:, None], picked]
    if changes is not None:
        clean = augment(clean[:, 0], changes, key, step, ids, views)
    return base.encode(clean.flatten(0, 1)).unflatten(0, clean.shape[:2])


def public_batch(task: Task, images: Tensor) -> Batch:
    """A batch of public images (n, c, side, side) in [-1, 1], with labels in turn and draws from a public key."""
    n, base, recipe = len(images), task.base, task.recipe
    clean = images
    if base.is_latent:  # one at a time, as private images are
        clean = torch.cat([base.encode(image.to(base.unet.device)).cpu() for image in images.split(1)])
    variants = recipe.data.augmentation_variants if recipe.data.augmentations and base.is_latent else 1
    captions = (
        {} if base.text is None or recipe.data.caption_column is None else base.text.encode(list(MADE_UP_CAPTIONS))
    )
    turns = torch.arange(n) % len(MADE_UP_CAPTIONS)
    examples = Examples(
        clean=clean[:, None].expand(-1, variants, -1, -1, -1),
        labels=torch.arange(n) % max(1, len(recipe.data.class_names or ())),
        weights=torch.ones(n),
        text={name: value.cpu()[turns] for name, value in captions.items()},
    )
    return make_batch(task, examples, np.arange(n), PUBLIC_KEY, step=0)


def made_up_batch(task: Task, n: int) -> Batch:
    """Images of noise from a public seed, as `public_batch` takes public ones."""
    shape = (n, task.base.image_channels, task.base.resolution, task.base.resolution)
    return public_batch(task, torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def make_loss(task: Task, mixed_precision: str = "no") -> LossFn:
    """loss_fn(unet, batch) -> (b,), as the clipper takes it. A null record's loss is zero.

    mixed_precision: "no" or "bf16": of the network. Losses are float32.
    """

    def loss_fn(unet: torch.nn.Module, batch: Batch) -> Tensor:
        if "codes" in batch:
            return code_losses(unet, batch)
        conditions = conditions_of(task, batch)

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                return task.base.predict(unet, noisy, times, conditions)

        losses = task.objective.losses(predict, batch["clean"], batch["noise"], batch["levels"])
        return losses * batch["weights"]

    return loss_fn


def code_losses(unet: torch.nn.Module, batch: Batch) -> Tensor:
    """(b,): linear in the sums of `code_moments`; the views of an example are averaged inside it (invariant 2)."""
    b, views, _ = batch["codes"].shape
    labels = batch["labels"].repeat_interleave(views)
    table: Any = unet.get_submodule(CLASS_TABLE)
    losses = table.losses(batch["codes"].flatten(0, 1), labels)
    return losses.view(b, views).mean(dim=1) * batch["weights"]


def conditions_of(task: Task, batch: Batch) -> dict[str, Tensor]:
    """What the network is told of each row of a batch: argument -> (b * rows, ...), example-major."""
    if not task.conditions.rows:
        return {}
    told = task.conditions.take(batch["labels"].flatten())
    if "dropped" not in batch:
        return told
    b, rows = batch["dropped"].shape
    for name, null in told.items():
        own = batch[name][:, None].expand(b, rows, *batch[name].shape[1:]).flatten(0, 1)
        told[name] = torch.where(batch["dropped"].flatten().view(-1, *[1] * (own.dim() - 1)), null, own)
    return told
