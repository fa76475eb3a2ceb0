"""The model that shareable folders make: what they hold is checked, their base is found, and the change added to it."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dp_peft_diffusion.diffusion.autoencoding import load_autoencoder
from dp_peft_diffusion.diffusion.base_folder import find_folder
from dp_peft_diffusion.diffusion.base_model import BaseModel, check_fit, load_base
from dp_peft_diffusion.diffusion.merging import attach_adapters, check_weighing, load_whole_model, merge_adapters
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_files import certified_base, check_weights_of, holds_whole_model
from dp_peft_diffusion.privacy.adapter_recipe import check_rows, read_recipe, stated_base
from dp_peft_diffusion.recipe import Recipe


def open_model(
    folders: Sequence[Path],
    weights: Sequence[float],
    base: str | None = None,
    unmerged: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[BaseModel, list[Recipe]]:
    """The base, with the sum of weight * change over the folders in its network; and the folders' recipes.

    Nothing is fetched, and no base opened, before all files of the folders are checked.

    base: in place of the one that the first folder's recipe names.
    unmerged: the adapters stay layers of stock peft.
    dtype: what merged weights are kept as; None: float32.

    Raises:
        UserError: no adapter folder, folders that do not go together, or a base that does not fit.
        PrivacyError: the files say what we never write.
    """
    check_weighing(folders, weights)
    for folder in folders:
        check_weights_of(folder)
    recipes = [read_recipe(folder) for folder in folders]
    whole = [folder for folder in folders if holds_whole_model(folder)]
    if whole and (len(folders) > 1 or weights[0] != 1.0):
        raise UserError(f"{whole[0]} holds a whole model, which takes the base's place. Take it alone, at weight 1.")
    check_rows(folders, recipes)
    loaded = base_of(folders, recipes[0], base)
    for folder, recipe in zip(folders, recipes, strict=True):
        if max(recipe.adapter.rows_in_turn or (-1,)) >= (loaded.num_class_embeds or 0):
            raise UserError(f"{folder} has rows of a class table that {loaded.name} lacks. Give its own base: --base")
    if whole:
        return loaded, recipes
    if unmerged:
        return replace(loaded, unet=attach_adapters(loaded.unet, folders, weights)), recipes
    return replace(loaded, unet=merge_adapters(loaded.unet, folders, weights, dtype)), recipes


def base_of(folders: Sequence[Path], recipe: Recipe, base: str | None) -> BaseModel:
    """The base that the folders' adapters go on, loaded from `base` or from where the recipe says.

    A folder with a whole model is its own base, but for the autoencoder of one on latents.

    Raises:
        UserError: nobody says where the base lies, it is another than was trained on and nobody asked for it, or
            somebody named one for a whole model that needs none.
    """
    whole = load_whole_model(folders[0]) if holds_whole_model(folders[0]) else None
    if whole is not None and not whole.layout.latent:
        if base is not None:
            raise UserError(f"{folders[0]} holds a whole model, which is its own base. Leave out --base {base}")
        return whole
    name, revision = (base, None) if base is not None else stated_base(folders[0], recipe)
    loaded = load_base(name, revision) if whole is None else with_autoencoder(whole, name, revision)
    for folder in folders:
        difference = difference_of_base(loaded, folder)
        if difference is not None and base is None:
            raise UserError(f"{difference} Name the right one with --base; --base {name} takes this one all the same.")
        if difference is not None:
            warnings.warn(f"{difference} The promise holds, but nobody has seen what it does here.", stacklevel=2)
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


def difference_of_base(base: BaseModel, folder: Path) -> str | None:
    """A sentence that says in what a base is not the one that a folder's certificate names; None if it is that one.

    Without privacy there is no certificate to ask. Of a whole model only the autoencoder comes from elsewhere.
    """
    trained_on = certified_base(folder)
    if trained_on is None:
        return None
    found = {
        "sha256": ("weights", base.sha256),
        "parts_sha256": ("autoencoder, text encoders or code encoder", base.parts_digest),
    }
    if holds_whole_model(folder):
        del found["sha256"]
    changed = []
    for key, (what, own) in found.items():
        wanted = trained_on.get(key, own)  # certificates of before have no parts_sha256
        if wanted != own:
            changed.append(f"{what} {(wanted or 'none')[:12]} there, {(own or 'none')[:12]} here")
    if not changed:
        return None
    return f"{folder} was trained on {trained_on['name']}, and {base.name} is another base: {'; '.join(changed)}."
