"""pytorch_lora_weights.safetensors: the adapter once more, in the file that `load_lora_weights` of diffusers reads.

It may say nothing that the files beside it do not say: the tensors of adapter_model.safetensors, bit for bit, the
config of adapter_config.json, and the promise of privacy.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy.adapter_files import WEIGHTS_FILE, holds_whole_model, read_adapter
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE, CONFIG_FILE, check_config
from dp_peft_diffusion.privacy.adapter_layers import PREFIX
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME, LORA_FILE
from dp_peft_diffusion.privacy.untrusted import (
    SafetensorsHeader,
    any_safetensors_header,
    parse_json,
    safetensors_header,
    tensor_chunks,
)

COMPONENT = "unet."  # diffusers' name of the net, before each tensor's and before each key of the config
CONFIG_KEY = "lora_adapter_metadata"  # what diffusers calls it; a key too many in it, and nothing loads
PROMISE_KEY = "dp_peft"
SCHEMA = "dp-peft/lora/1"
# Where the config differs from what every version of peft takes for granted.
_SAID = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")


def diffusers_takes(config: dict[str, Any]) -> bool:
    """Whether `load_lora_weights` takes an adapter of this config: the LoRA family, without biases or class rows."""
    return (
        config["peft_type"] == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("trainable_token_indices") is None
        and CLASS_TABLE not in config["target_modules"]
    )


def lora_name(name: str) -> str:
    """What the file calls a tensor of adapter_model.safetensors."""
    return COMPONENT + name.removeprefix(PREFIX)


def lora_metadata(config: dict[str, Any], document: dict[str, Any]) -> dict[str, str]:
    """The metadata of the file.

    Args:
        config: adapter_config.json.
        document: privacy.json.
    """
    said = {COMPONENT + key: value for key, value in _config_said(config).items()}
    return {"format": "pt", CONFIG_KEY: _text(said), PROMISE_KEY: promise_text(document)}


def promise_text(document: dict[str, Any]) -> str:
    """What a file of weights says of the promise it comes with: JSON."""
    return _text(_promise_said(document))


def check_lora_file(folder: Path, document: dict[str, Any]) -> int:
    """Check that the file says what the files beside it say, and nothing more; return the number of its tensors.

    Args:
        folder: a shareable folder.
        document: its privacy.json, in the strict form.

    Raises:
        PrivacyError: it differs, is malformed, or lies beside an adapter of which there is no such file.
        UserError: there is no adapter beside it.
    """
    if holds_whole_model(folder):
        raise PrivacyError(f"{LORA_FILE} lies beside a whole model, of which it can be no part. Remove it.")
    config = read_adapter(folder).config
    if not diffusers_takes(config):
        raise PrivacyError(f"{LORA_FILE} lies beside an adapter that diffusers cannot load in this way. Remove it.")
    header = any_safetensors_header(folder / LORA_FILE)
    _check_metadata(header.metadata, config, document)
    _check_tensors(folder, header)
    return len(header.tensors)


def _config_said(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _SAID if config.get(key)}


def _promise_said(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "statement": document["statement"],
        "epsilon": document["guarantee"]["epsilon"],
        "delta": document["guarantee"]["delta"],
        "base": {key: document["base"][key] for key in ("name", "revision", "sha256")},
        "certificate": FILE_NAME,
    }


def _check_metadata(metadata: dict[str, str], config: dict[str, Any], document: dict[str, Any]) -> None:
    if set(metadata) != {"format", CONFIG_KEY, PROMISE_KEY} or metadata["format"] != "pt":
        named = ", ".join(sorted(metadata)) or "none"
        raise PrivacyError(
            f'the metadata of {LORA_FILE} are not {{"format": "pt"}}, {CONFIG_KEY} and {PROMISE_KEY}, but '
            f"{ascii(named)[:200]}."
        )
    where = f"{CONFIG_KEY} of {LORA_FILE}"
    said = _object(metadata[CONFIG_KEY], where)
    if foreign := sorted(key for key in said if not key.startswith(COMPONENT)):
        raise PrivacyError(f"{where} says {ascii(foreign[0])[:80]}, which does not begin with {COMPONENT!r}.")
    bare = {key.removeprefix(COMPONENT): value for key, value in said.items()}
    try:
        check_config(bare)
    except PrivacyError as error:
        raise PrivacyError(f"{where} would be refused as an adapter's config: {error}") from error
    _check_same(bare, _config_said(config), where, CONFIG_FILE)
    where = f"{PROMISE_KEY} of {LORA_FILE}"
    _check_same(_object(metadata[PROMISE_KEY], where), _promise_said(document), where, FILE_NAME)


def _object(text: str, where: str) -> dict[str, Any]:
    value = parse_json(text.encode(), where)
    if not isinstance(value, dict):
        raise PrivacyError(f"{where} is not a JSON object.")
    return value


def _check_same(said: dict[str, Any], meant: dict[str, Any], where: str, source: str) -> None:
    """The same keys with the same values: 2 is not 2.0, nor True 1."""
    for key in sorted({*said, *meant}):
        if key not in said or key not in meant or _text(said[key]) != _text(meant[key]):
            raise PrivacyError(f"{where} does not say of {ascii(key)[:80]} what {source} says.")


def _check_tensors(folder: Path, header: SafetensorsHeader) -> None:
    """The tensors of the peft file under their other names: the same types, shapes and bits."""
    theirs = safetensors_header(folder / WEIGHTS_FILE)
    if astray := sorted(name for name in header.tensors if not name.startswith(COMPONENT)):
        raise PrivacyError(
            f"{LORA_FILE}: {astray[0][:100]} does not begin with {COMPONENT!r}, so diffusers would leave it out "
            "without a word."
        )
    _check_same_entries(header.tensors, {lora_name(name): entry for name, entry in theirs.tensors.items()})
    for name in theirs.tensors:
        here, there = (folder / LORA_FILE, header, lora_name(name)), (folder / WEIGHTS_FILE, theirs, name)
        if any(a != b for a, b in zip(tensor_chunks(*here), tensor_chunks(*there), strict=True)):
            raise PrivacyError(f"{LORA_FILE}: {lora_name(name)[:100]} holds other numbers than {WEIGHTS_FILE}.")


def _check_same_entries(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise PrivacyError(f"{LORA_FILE} and {WEIGHTS_FILE} differ in {name[:100]}: its type, its shape or at all.")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
