"""Recipes: every choice of a run, as frozen dataclasses, read from strict YAML and flags.

A field says its meaning, range and choices once; `--help`, errors and the comments of written recipes come from there.
Flags stand over the recipe, the recipe over the defaults. Imports no torch.
"""

from dp_peft_diffusion.recipe.checks import validate
from dp_peft_diffusion.recipe.files import load_pretrain_recipe, load_recipe, recipe_path, to_yaml
from dp_peft_diffusion.recipe.pretraining import PretrainRecipe
from dp_peft_diffusion.recipe.sections import (
    ADAPTER_KINDS,
    AUGMENTATIONS,
    MAX_ROWS_PER_CLASS,
    MAX_SCALE,
    MAX_SEED,
    NEIGHBORING_RELATIONS,
    PATH_TO_BASE,
    PATH_TO_IMAGES,
    PREDICTION_TYPES,
    PROMISES,
    TIMESTEP_DISTRIBUTIONS,
    WITHOUT_TARGETS,
    Adapter,
    Data,
    Model,
    Privacy,
    Recipe,
    Sample,
    Train,
)

__all__ = [
    "ADAPTER_KINDS",
    "AUGMENTATIONS",
    "MAX_ROWS_PER_CLASS",
    "MAX_SCALE",
    "MAX_SEED",
    "NEIGHBORING_RELATIONS",
    "PATH_TO_BASE",
    "PATH_TO_IMAGES",
    "PREDICTION_TYPES",
    "PROMISES",
    "TIMESTEP_DISTRIBUTIONS",
    "WITHOUT_TARGETS",
    "Adapter",
    "Data",
    "Model",
    "PretrainRecipe",
    "Privacy",
    "Recipe",
    "Sample",
    "Train",
    "load_pretrain_recipe",
    "load_recipe",
    "recipe_path",
    "to_yaml",
    "validate",
]
