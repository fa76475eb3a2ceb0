"""A stranger's adapter or model, checked before stock tools see it: form, sizes, numbers, and whether it fits its base.

No torch, no pickle, no network; nothing in the files is run, imported, matched as a pattern or used as a path.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_form import CONFIG_FILE, check_config
from dp_peft_diffusion.privacy.adapter_layers import AdapterLayers, adapter_layers, check_fit
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME
from dp_peft_diffusion.privacy.model_files import (
    BUILTIN_BASES,
    FROM_SCRATCH,
    MODEL_FOLDER,
    check_model,
    check_weights,
    read_base,
)
from dp_peft_diffusion.privacy.strict_form import or_none, text
from dp_peft_diffusion.privacy.untrusted import read_json, safetensors_header

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """An adapter's files, whose form has been checked.

    Attributes:
        config: adapter_config.json.
        tensors: names in the safetensors file.
        layers: what they change.
    """

    config: dict[str, Any]
    tensors: frozenset[str]
    layers: AdapterLayers


def holds_whole_model(folder: Path | str) -> bool:
    """Whether a shareable folder holds a whole model and not an adapter."""
    return (Path(folder) / MODEL_FOLDER).is_dir()


def read_adapter(folder: Path) -> AdapterFiles:
    """The adapter in a folder: strict config, well-formed tensors of its ranks and targets, finite numbers.

    Raises:
        UserError: there is no adapter.
        PrivacyError: the files say what our kinds never write; the message names it.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"adapter {folder}: no {name} there. Give the folder that `dp-peft train` wrote.")
    config = check_config(read_json(folder / CONFIG_FILE))
    header = safetensors_header(folder / WEIGHTS_FILE)
    check_weights(folder / WEIGHTS_FILE, header)
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    return AdapterFiles(config, frozenset(shapes), adapter_layers(config, shapes))


def check_weights_of(folder: Path) -> None:
    """The weights of a shareable folder, an adapter or a whole model, have the form that we write. No base is needed.

    Raises:
        UserError: there are none.
        PrivacyError: the files say what we never write.
    """
    if holds_whole_model(folder):
        check_model(folder)
    else:
        read_adapter(folder)


def check_adapter(folder: Path, base: Path | None = None) -> str:
    """Check the weights of a shareable folder, and that they fit the base that privacy.json names.

    Args:
        folder: holds an adapter, or a whole model.
        base: diffusers folder of the base. A built-in base is found without it.

    Returns:
        A sentence that says what was checked, and what was not.

    Raises:
        PrivacyError: the files say what we never write, or do not fit the base that is certified.
        UserError: there is no adapter, or `base` is not the base that it was trained on.
    """
    if holds_whole_model(folder):
        adapter, shapes = None, check_model(folder)
        about = f"A whole model of {len(shapes)} tensors, all finite"
    else:
        adapter, shapes = read_adapter(folder), {}
        kind, layers = adapter.config["peft_type"], len(adapter.layers.layers)
        about = f"{kind} on {layers} layers in {len(adapter.tensors)} tensors, all finite"
    certified = certified_base(folder) or {"name": "which no certificate names", "sha256": None}
    name, sha256 = str(certified["name"]), certified["sha256"]
    if name.startswith(FROM_SCRATCH):
        if adapter is not None:
            raise PrivacyError(f"{FILE_NAME} says that an adapter was trained from scratch. It needs a base.")
        return f"{about}. Trained from scratch: it began as random weights, and is its own base."
    found = _base_folder(name, base)
    if found is None:
        return f"{about}. NOT CHECKED: whether it fits its base, {name}. Say where that lies: --base FOLDER"
    files = read_base(found)
    if sha256 not in (None, files.sha256):
        raise UserError(
            f"trained on {name} with weights {sha256[:12]}..., and the base in {found.name} has "
            f"{files.sha256[:12]}... Give the right one: --base FOLDER"
        )
    if adapter is not None:
        check_fit(adapter.config, adapter.layers, files.shapes, found.name)
    elif shapes != files.shapes:
        raise UserError(
            f"the model is not of the shape of {found.name}. Give the base it was trained on: --base FOLDER"
        )
    fingerprint = "no certificate names its weights" if sha256 is None else "whose weights are those certified"
    return f"{about}. Fits {found.name if base else name}, {fingerprint}."


def certified_base(folder: Path) -> dict[str, str | None] | None:
    """`base` of privacy.json: its name, its sha256, and parts_sha256 where the certificate says it.

    None without a certificate, that is without privacy. The rest of the certificate is not looked at: `verify` does.

    Raises:
        PrivacyError: the certificate names no base.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    document = read_json(folder / FILE_NAME)
    base = document.get("base") if isinstance(document, dict) else None
    if not isinstance(base, dict) or not text(r"[^\x00-\x1f\x7f]{1,1000}")(base.get("name")):
        raise PrivacyError(f"{FILE_NAME} names no base.")
    digest = text("[0-9a-f]{64}")
    if not digest(base.get("sha256")) or not or_none(digest)(base.get("parts_sha256")):
        raise PrivacyError(f"{FILE_NAME} has no SHA-256 of the base.")
    return {key: base[key] for key in ("name", "sha256", "parts_sha256") if key in base}


def _base_folder(name: str, given: Path | None) -> Path | None:
    if given is not None or not name.startswith("builtin:"):
        return given
    if not re.fullmatch("builtin:[a-z0-9_]{1,60}", name) or not (BUILTIN_BASES / name[8:] / "scheduler").is_dir():
        raise PrivacyError(f"{name[:80]} is no base of this version.")
    return BUILTIN_BASES / name[8:]
