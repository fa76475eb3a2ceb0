"""The shareable folder: stock peft or diffusers files, recipe, certificate, card; checked by loading them again."""

import copy
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from dp_peft_diffusion.diffusion.adapters import Adapter, load_adapter, load_whole_model, to_peft, whole_model
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base, save_base
from dp_peft_diffusion.diffusion.class_rows import without_spares
from dp_peft_diffusion.diffusion.conditions import ConditionTable
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy import adapter_form, certificate, model_files
from dp_peft_diffusion.privacy.adapter_files import holds_whole_model
from dp_peft_diffusion.privacy.model_files import FROM_SCRATCH
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, Recipe, to_yaml
from dp_peft_diffusion.sharing.card import render_card

DATA_PLACEHOLDER = PATH_TO_IMAGES
NOT_PRIVATE = "This adapter was trained WITHOUT privacy (`--no_privacy`), for comparison. Do not share it.\n"
ROWS = 64  # conditions that the re-loaded adapter is tried on
TOLERANCE = 1e-5  # largest difference of outputs between the trained and the re-loaded adapter


def export(
    folder: Path,
    recipe: Recipe,
    base: BaseModel,
    conditions: ConditionTable,
    adapter: Adapter,
    promise: Promise | None,
    gamma_source: str | None,
    key_source: str,
    key_after_export: str,
) -> dict | None:
    """Write everything shareable into `folder` and check it; return the certificate.

    conditions: what the network is told of each class.
    promise: None with --no_privacy, and then no certificate is written.
    gamma_source: where the gamma of automatic clipping comes from; None for flat clipping.
    key_source, key_after_export: as `certificate.certificate` takes them.

    Raises:
        RunError: the files, loaded again, do not give back the trained adapter.
    """
    write_weights(base, adapter, folder)
    recipe = shareable_recipe(recipe)
    (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    check_reload(base, recipe.model.from_scratch, adapter.unet, conditions, folder)
    if promise is None:
        (folder / "README.md").write_text(NOT_PRIVATE)
        return None
    facts = certify(folder, recipe, base, promise, gamma_source, key_source, key_after_export)
    grids = sorted((path.name for path in (folder / "samples").glob("step-*.png")), key=lambda name: (len(name), name))
    card = render_card(facts, recipe, base, grids[-1])
    (folder / "README.md").write_text(card, encoding="utf-8")
    return certificate.write(folder, facts)


def certify(
    folder: Path,
    recipe: Recipe,
    base: BaseModel,
    promise: Promise,
    gamma_source: str | None,
    key_source: str,
    key_after_export: str,
) -> dict:
    """The certificate of the weights and the shareable recipe that lie in `folder`; arguments as of `export`."""
    public_inputs = {
        "resolution": base.resolution,
        "image_channels": base.image_channels,
        "class_names": recipe.data.class_names and list(recipe.data.class_names),
        "gamma_source": gamma_source,
        "grid_labels": grid_labels(recipe),
    }
    if recipe.data.caption_column is not None:
        public_inputs["caption_column"] = recipe.data.caption_column
    elif base.text is not None:
        public_inputs["prompt_template"] = recipe.data.prompt_template
    if recipe.sample.prompts is not None:
        public_inputs["prompts"] = list(recipe.sample.prompts)
    if recipe.data.group_column is not None:
        public_inputs["group_column"] = recipe.data.group_column
    return certificate.certificate(
        promise,
        clipping=recipe.privacy.clipping,
        gamma=recipe.privacy.gamma,
        noise_multiplicity=recipe.train.noise_multiplicity,
        public_inputs=public_inputs,
        base={
            "name": public_base_name(base.name),
            "revision": base.revision,
            "sha256": base.sha256,
            "parts_sha256": base.parts_digest,
        },
        folder=folder,
        key_source=key_source,
        key_after_export=key_after_export,
        gradient_check="skipped" if recipe.train.skip_self_check else "passed",  # else `prepare` had refused
    )


def grid_labels(recipe: Recipe) -> str | None:
    """What the grids of samples show; None where nothing is told of an image."""
    if recipe.sample.prompts is not None:
        return "prompts given by the user"
    return None if recipe.data.class_names is None else "every class in turn"


def public_base_name(name: str) -> str:
    """The base's name without the folders of this machine. "./" keeps a folder from being taken for a Hub name."""
    scratch = FROM_SCRATCH if name.startswith(FROM_SCRATCH) else ""
    place = Path(name.removeprefix(FROM_SCRATCH))
    return f"{scratch}./{place.resolve().name}" if place.is_dir() else name


def shareable_recipe(recipe: Recipe) -> Recipe:
    """The resolved recipe with the place of the private images, and folders of this machine, taken out."""
    base = public_base_name(recipe.model.pretrained_model_name_or_path)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, pretrained_model_name_or_path=base),
        privacy=dataclasses.replace(recipe.privacy, prior_event=None),  # the certificate names them
    )
    if recipe.data.dataset_name.startswith("builtin:"):
        return recipe
    data = dataclasses.replace(recipe.data, dataset_name=DATA_PLACEHOLDER, dataset_config_name=None)
    return dataclasses.replace(recipe, data=data)


def write_weights(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """The trained weights as stock files: an adapter, or the whole net where all of it trained.

    Raises:
        RunError: they cannot be written.
    """
    try:
        if adapter.config is None:
            write_model(base, adapter, folder)
        else:
            write_adapter(base, adapter, folder)
    except SafetensorError as error:  # a full disk, among others; it is no OSError
        raise RunError(
            f"the weights could not be written to {folder}: {error}. Nothing was published and nothing is lost: make "
            "room, then type the same command to go on."
        ) from error


def write_adapter(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as stock peft writes them, names sorted.

    Keys of a newer peft are left out, since a reader of strangers' files could not tell what they do.
    """
    to_peft(base, adapter).save_pretrained(folder, save_embedding_layers=False)
    path = folder / adapter_form.CONFIG_FILE
    config = json.loads(path.read_text())
    config = {key: value for key, value in config.items() if key in adapter_form.FORMS[config["peft_type"]]}
    config["base_model_name_or_path"] = public_base_name(base.name)
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_model(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """The whole net as a base of its own: what `load_base` and stock `from_pretrained` read."""
    rows = () if adapter.class_rows is None else tuple(adapter.class_rows.rows.tolist())
    layout = dataclasses.replace(without_spares(base.layout, rows), latent=base.is_latent)
    save_base(folder, whole_model(base, adapter), base.scheduler, layout)
    for name, form in model_files.FORMS.items():
        path = folder / name
        # Not "_name_or_path", where the base lay on this machine, nor anything else that the base's config brought.
        config = {key: value for key, value in json.loads(path.read_text()).items() if key in form}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_reload(
    base: BaseModel, from_scratch: bool, unet: torch.nn.Module, conditions: ConditionTable, folder: Path
) -> float:
    """Load the folder with stock peft on a fresh base, or with diffusers; return how far it moves the outputs.

    This is invariant 14.

    Raises:
        RunError: the re-loaded weights answer differently from the trained one, or does nothing.
    """
    fresh = copy.deepcopy(base.unet).cpu() if from_scratch else load_again(base)
    before = outputs(base, fresh, conditions)
    after = outputs(base, stock_model(fresh, folder), conditions)
    del fresh  # one network of the size of the base at a time
    trained = outputs(base, copy.deepcopy(unet).cpu(), conditions)
    difference, change = (after - trained).abs().max().item(), (after - before).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, trained.abs().max().item()):
        raise RunError(f"the exported weights, loaded with stock tools, differ from the trained by {difference:.3g}.")
    if change == 0.0:
        raise RunError("the exported weights change nothing: no step moved them. Try a larger --learning_rate.")
    return change


@torch.no_grad()
def outputs(base: BaseModel, unet: torch.nn.Module, conditions: ConditionTable) -> torch.Tensor:
    """What a network, which is turned into float64 for it, makes of made-up inputs, of up to `ROWS` conditions in turn.

    In float64, on the CPU: in float32 two networks of the same weights differ by rounding, which a large adapter
    magnifies, and a GPU may compute in TF32.
    """
    n, last = max(8, min(ROWS, conditions.null + 1)), conditions.null
    x = torch.randn(n, *base.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(1, base.scheduler.config.num_train_timesteps - 1, n).long()
    rows = torch.linspace(0, last, n).round().long() if last >= n else torch.arange(n) % (last + 1)
    told = {name: value.cpu() for name, value in conditions.take(rows).items()}
    told = {name: value.double() if value.is_floating_point() else value for name, value in told.items()}
    net, parts = unet.double(), []
    for i in range(0, n, 8):
        part = {name: value[i : i + 8] for name, value in told.items()}
        parts.append(base.predict(net, x[i : i + 8], t[i : i + 8], part))
    return torch.cat(parts)


def load_again(base: BaseModel) -> torch.nn.Module:
    """The base's network from where it lies, on the CPU.

    Raises:
        RunError: it is another one now.
    """
    reloaded = load_base(base.name, base.revision)
    if reloaded.sha256 != base.sha256:
        raise RunError(f"the base {base.name} has changed since the run began. Nothing was published.")
    return reloaded.unet


def stock_model(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """What stock peft or diffusers loads from the folder, once it is checked as a stranger's.

    Raises:
        RunError: the files would be refused.
    """
    try:
        return load_whole_model(folder).unet if holds_whole_model(folder) else load_adapter(base, folder)
    except (PrivacyError, UserError) as error:
        raise RunError(f"the exported weights would be refused: {error} Nothing was published.") from error
