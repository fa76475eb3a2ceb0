"""A run of seconds, for tests: a tiny base, a few images made here, and a recipe for both."""

import dataclasses
from pathlib import Path

from tiny_models import tiny_base_folder, tiny_image_folder

from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, Train

KEY = bytes(range(16))


def tiny_recipe(folder: Path) -> Recipe:
    """A recipe of 6 updates on 10 images of two classes, which are made in `folder` with a base."""
    base = tiny_base_folder(folder / "base")
    images = tiny_image_folder(folder / "images", {"dark": 60, "light": 190}, 5)
    return Recipe(
        model=Model(pretrained_model_name_or_path=str(base)),
        data=Data(dataset_name=str(images)),
        adapter=Adapter(rank=2, target_modules=("to_q",)),
        privacy=Privacy(noise_multiplier=2.0, gamma=0.01),
        train=Train(
            train_batch_size=6,
            max_train_steps=6,
            micro_batch_size=4,
            learning_rate=0.1,
            ema_decay=0.5,
            checkpointing_steps=2,
            skip_self_check=True,
        ),
        sample=Sample(num_images=2, num_inference_steps=1, every=3),
    )


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    """The recipe with other values in one section."""
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})
