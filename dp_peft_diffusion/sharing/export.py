"""The shareable folder: stock peft or diffusers files, recipe, certificate, card; checked by loading them again."""

import dataclasses
import json
import sys
from pathlib import Path

from diffusers.loaders import PeftAdapterMixin
from safetensors import SafetensorError

from dp_peft_diffusion.diffusion.adapters import Adapter, to_peft, whole_model
from dp_peft_diffusion.diffusion.base_model import BaseModel, save_base
from dp_peft_diffusion.diffusion.class_rows import without_spares
from dp_peft_diffusion.diffusion.conditions import ConditionTable
from dp_peft_diffusion.durable import make_weights_readable
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy import adapter_form, certificate, model_files
from dp_peft_diffusion.privacy.adapter_files import read_adapter
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE
from dp_peft_diffusion.privacy.lora_files import diffusers_takes
from dp_peft_diffusion.privacy.model_files import FROM_SCRATCH
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.privacy.untrusted import sha256_of
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, Recipe, to_yaml
from dp_peft_diffusion.sharing.card import render_card
from dp_peft_diffusion.sharing.reloading import check_reload
from dp_peft_diffusion.sharing.report import render_report
from dp_peft_diffusion.sharing.stock_files import write_lora_file

DATA_PLACEHOLDER = PATH_TO_IMAGES
NOT_PRIVATE = "This adapter was trained WITHOUT privacy (`--no_privacy`), for comparison. Do not share it.\n"


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
        RunError: the files, loaded again with stock tools, do not give back the trained adapter.
    """
    write_weights(base, adapter, folder)
    recipe = shareable_recipe(recipe)
    (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    facts = None
    if promise is not None:
        facts = certify(folder, recipe, base, promise, gamma_source, key_source, key_after_export)
        write_other_files(base, adapter, folder, facts)
    print(check_reload(base, adapter, conditions, folder, facts).sentence, file=sys.stderr)
    if facts is None:
        (folder / "README.md").write_text(NOT_PRIVATE)
        return None
    grids = sorted((path.name for path in (folder / "samples").glob("step-*.png")), key=lambda name: (len(name), name))
    card = render_card(facts, recipe, base, grids[-1])
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "report.html").write_text(render_report(folder, facts, recipe, base), encoding="utf-8")
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
    make_weights_readable(folder)


def write_other_files(base: BaseModel, adapter: Adapter, folder: Path, document: dict) -> None:
    """The adapter once more in the file of diffusers' own loader, where network and adapter are such that it loads.

    document: the certificate, whose promise the file says, and which then lists the file.
    """
    has_loader = adapter.config is not None and isinstance(base.unet, PeftAdapterMixin)
    if has_loader and diffusers_takes(read_adapter(folder).config):
        write_lora_file(folder, document)
        document["sha256"][LORA_FILE] = sha256_of(folder / LORA_FILE)


def write_adapter(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as stock peft writes them, names sorted.

    Keys of a newer peft are left out, since a reader of strangers' files could not tell what they do.
    """
    to_peft(base, adapter).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card, which names where the base lies on this machine
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
