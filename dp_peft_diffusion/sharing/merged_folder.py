"""A base with adapters merged in, as a complete diffusers folder that says where its promises come from."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from safetensors import SafetensorError

from dp_peft_diffusion.diffusion.base_folder import find_folder, read_settings
from dp_peft_diffusion.diffusion.base_model import LAYOUT_FILE, BaseModel
from dp_peft_diffusion.diffusion.class_rows import without_spares
from dp_peft_diffusion.diffusion.opening import open_model
from dp_peft_diffusion.durable import fsync_tree, make_weights_readable, move_durably, partial_of
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME
from dp_peft_diffusion.recipe import Recipe
from dp_peft_diffusion.sharing.card import code, markdown
from dp_peft_diffusion.sharing.export import public_base_name
from dp_peft_diffusion.sharing.promises import NO_CERTIFICATE, check_apart, checked_promise

# Copied as they are. A safety checker is copied where it lies in the base's folder; it is not fetched.
PARTS = (
    "vae", "vqvae", "encoder", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    "safety_checker", "feature_extractor",
)  # fmt: skip
SUFFIXES = (".json", ".txt", ".safetensors")
INDEX = "model_index.json"
CHECKER = "safety_checker"
PLACES = {"_name_or_path", "name_or_path"}  # keys of configs: of models and schedulers, and of tokenizers


def write_merged(
    output_dir: Path,
    folders: Sequence[Path],
    weights: Sequence[float],
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write the base with the folders' adapters merged into it; whole or not at all.

    Stock `from_pretrained` opens it, and `load_base`. The certificates of the folders go along under other names, since
    they certify other files than these.

    dtype: what the network's weights are kept as; they are merged in float32.

    Returns:
        How it is opened, as Python.

    Raises:
        UserError: output_dir holds something or lies in a shareable folder, or what `open_model` refuses.
        PrivacyError: a folder's files say what we never write, or its certificate does not hold.
        RunError: the weights cannot be written.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} is not empty. Choose another --output_dir, or remove that folder.")
    check_apart(output_dir, "--output_dir", folders)
    model, recipes = open_model(folders, weights, base, dtype=dtype)
    promises = [checked_promise(folder) for folder in folders]
    source, partial = find_folder(model.name, model.revision), partial_of(output_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_parts(source, partial)
        write_network(model, recipes, dtype, partial)
        opened = write_index(source, model, partial)
        for number, (folder, promise) in enumerate(zip(folders, promises, strict=True), 1):
            if promise is not None:
                shutil.copyfile(folder / FILE_NAME, partial / source_name(number))
        text = readme(model, folders, weights, promises, opened, dtype)
        (partial / "README.md").write_text(text, encoding="utf-8")
        fsync_tree(partial)
        move_durably(partial, output_dir)
    except SafetensorError as error:  # a full disk, among others; it is no OSError
        raise RunError(
            f"the merged weights could not be written to {output_dir}: {error}. Nothing of it was kept: make room, "
            "then type the same command."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it was not moved
    return opened


def source_name(number: int) -> str:
    """What the certificate of a source is called in the merged folder, which it does not certify."""
    return f"privacy-of-source-{number}.json"


def copy_parts(source: Path, target: Path) -> None:
    """The parts of a base around its network, without pickles and without weights of other precisions."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(name).suffix not in SUFFIXES or ".fp16." in name or ".non_ema." in name]

    for part in PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, ignore=left_out)
    if not any((target / CHECKER).glob("*.safetensors")):  # of a base on the Hub its config alone is fetched
        for part in (CHECKER, "feature_extractor"):
            shutil.rmtree(target / part, ignore_errors=True)
    alone = source / "scheduler_config.json"  # of a base whose network lies beside it, not in a folder of its own
    if alone.is_file() and not (target / "scheduler").is_dir():
        (target / "scheduler").mkdir()
        shutil.copyfile(alone, target / "scheduler" / alone.name)
    for path in target.glob("*/*config.json"):
        without_places(path)


def without_places(path: Path) -> None:
    """A config without where its part lay on this machine, or on that of whoever made the base."""
    config = read_settings(path) or {}
    if not PLACES.isdisjoint(config):
        kept = {key: value for key, value in config.items() if key not in PLACES}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def write_network(model: BaseModel, recipes: Sequence[Recipe], dtype: torch.dtype, target: Path) -> None:
    """The merged network, and what stock files cannot say of it. The adapters' class rows are spare no more."""
    torch.nn.Module.to(
        model.unet, dtype
    )  # diffusers' own warns of modules to keep in float32, also where there are none
    model.unet.save_pretrained(target / "unet", safe_serialization=True)
    make_weights_readable(target)
    without_places(target / "unet" / "config.json")
    rows = tuple(row for recipe in recipes for row in recipe.adapter.rows_in_turn)
    layout = replace(without_spares(model.layout, rows), latent=model.is_latent)
    (target / LAYOUT_FILE).write_text(json.dumps(asdict(layout), indent=2) + "\n")


def write_index(source: Path, model: BaseModel, target: Path) -> str:
    """model_index.json, where a stock pipeline fits; how the folder is opened, as Python.

    Raises:
        UserError: that of the base names no pipeline.
    """
    index = read_settings(source / INDEX)
    if index is None and _is_ddpm(model):
        scheduler = (read_settings(target / "scheduler" / "scheduler_config.json") or {}).get("_class_name")
        parts = {"unet": type(model.unet).__name__, "scheduler": scheduler or "DDPMScheduler"}
        index = {"_class_name": "DDPMPipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    if index is None:
        return f'{type(model.unet).__name__}.from_pretrained("FOLDER", subfolder="unet")'
    if not str(index.get("_class_name")).isidentifier():
        raise UserError(f"{source / INDEX} names no pipeline as _class_name. Restore the file.")
    index.pop("_name_or_path", None)
    for name, kind in index.items():
        if isinstance(kind, list) and not (target / name).is_dir():
            index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return f'{index["_class_name"]}.from_pretrained("FOLDER")'


def _is_ddpm(model: BaseModel) -> bool:
    """Whether the network is told nothing but the time, and sees plain pixels: then DDPMPipeline samples from it."""
    plain = model.vae is None and model.text is None and model.num_class_embeds is None
    return plain and model.layout.pixel_packing == 1 and not isinstance(model.scheduler, EDMEulerScheduler)


def readme(
    model: BaseModel,
    folders: Sequence[Path],
    weights: Sequence[float],
    promises: Sequence[dict[str, Any] | None],
    opened: str,
    dtype: torch.dtype,
) -> str:
    """What the folder is, and which promises it rests on."""
    lines = [
        "# A base with private adapters merged into it",
        "",
        f"Base: {code(public_base_name(model.name))}, SHA-256 of its weights before merging `{model.sha256}`. "
        f"Merged in float32, kept as {str(dtype).removeprefix('torch.')}.",
        "",
        "```python",
        opened,
        "```",
        "",
        "No certificate is about these very files: `dp-peft verify` checks the folders they were merged from. Merging "
        "looks at no image, so each promise below holds for this folder too.",
    ]
    for number, (folder, weight, promise) in enumerate(zip(folders, weights, promises, strict=True), 1):
        lines += ["", f"## Source {number}: {markdown(folder.resolve().name)}, at weight {weight:g}", ""]
        if promise is None:
            lines += [f"{NO_CERTIFICATE} If these are private, do not share this folder."]
        else:
            lines += [f"> {markdown(promise['statement'])}", "", f"Its certificate: `{source_name(number)}`."]
    if len(folders) > 1:
        lines += ["", "If two sources were trained on the same images, their losses of privacy add up."]
    if (model.text is not None) and opened.startswith("StableDiffusionPipeline"):
        lines += ["", "A safety checker of the base is here only if its folder had one on the machine that merged."]
    return "\n".join(lines) + "\n"
