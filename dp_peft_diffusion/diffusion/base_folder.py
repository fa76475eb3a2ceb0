"""The diffusers folder of a base: built in, on this machine or fetched from the Hub, and the models that lie in it."""

import json
import re
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from transformers.utils import logging

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.certificate_form import REVISION
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES
from dp_peft_diffusion.privacy.untrusted import MODEL_WEIGHTS

_COMMIT = re.compile("[0-9a-f]{40}")
# What is fetched from the Hub: settings and tokenizers, which are JSON but for the merges, and the weights of the parts
# used here in full precision. An asterisk stands for slashes too.
_WEIGHTS = (MODEL_WEIGHTS, "diffusion_pytorch_model-*-of-*.safetensors")
_FILES = ["*.json", "tokenizer/merges.txt", "tokenizer_2/merges.txt", *_WEIGHTS]
_FILES += [f"{part}/{name}" for part in ("unet", "vae", "vqvae", "encoder") for name in _WEIGHTS]
_FILES += [f"text_encoder{which}/model{shard}.safetensors" for which in ("", "_2") for shard in ("", "-*-of-*")]


def find_folder(name: str, revision: str | None) -> Path:
    """Where the files of a base lie: `builtin:NAME`, a folder, or a Hub repository, which is fetched.

    Raises:
        UserError: there is none of that name, the revision cannot be one, or the Hub cannot be reached.
    """
    if name.startswith("builtin:"):
        folder = BUILTIN_BASES / name.removeprefix("builtin:")
        if not (folder / "scheduler").is_dir():  # features lie there too, and are no base
            known = ", ".join(f"builtin:{path.parent.name}" for path in sorted(BUILTIN_BASES.glob("*/scheduler")))
            raise UserError(f"--pretrained_model_name_or_path {name!r} is not a built-in base. There is: {known}")
        return folder
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--pretrained_model_name_or_path {name!r}: no such folder.")
    if revision is not None and re.fullmatch(REVISION, revision) is None:
        raise UserError(f"{revision[:80]!r} is no revision of {name}. Give a commit, a branch or a tag.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, HTTPError) as error:  # HTTPError: a proxy, among others
        raise UserError(
            f"--pretrained_model_name_or_path {name!r} is no local folder, and could not be read from the Hub: "
            f"{error}. Check the name and the network, or give a folder, or builtin:handwriting."
        ) from error


def hub_commit(name: str, folder: Path) -> str | None:
    """The commit of a base that `find_folder` fetched from the Hub; None of one that lies here.

    A branch moves on, and a commit does not. huggingface_hub names the folder of a snapshot by it.
    """
    here = name.startswith("builtin:") or Path(name).is_dir()
    return folder.name if not here and _COMMIT.fullmatch(folder.name) else None


def read_settings(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        UserError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. Restore the file.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object. Restore the file.")
    return settings


def load_part(kind: Any, folder: Path, name: str) -> Any:
    """A part of the base from its own folder: float32, frozen, in eval mode.

    kind: a model class of diffusers or transformers. name: of the base, for messages.

    Raises:
        UserError: it cannot be opened, or a weight is missing.
    """
    logging.disable_progress_bar()  # one bar for each text encoder says nothing
    diffusers_logging.disable_progress_bar()  # nor does one for the files of a network
    try:
        part, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name!r} could not be opened as a diffusers {kind.__name__}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):  # the libraries only warn of it
        raise UserError(f"--pretrained_model_name_or_path {name!r} lacks weights: {', '.join(missing[:4])}.")
    return part.float().requires_grad_(False).eval()
