"""Whole models in diffusers folders, read without torch: bases that adapters go on, and nets that trained as a whole.

A stranger's config.json says how large a net to build, before any weight is read. So every size in it must be that of
a tensor which lies in the file.
"""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE
from dp_peft_diffusion.privacy.strict_form import (
    Rule,
    check_keys,
    list_of,
    number,
    one_of,
    or_none,
    text,
    whole,
)
from dp_peft_diffusion.privacy.untrusted import (
    MODEL_WEIGHTS,
    SafetensorsHeader,
    any_safetensors_header,
    check_finite,
    float32_chunks,
    read_json,
    safetensors_header,
)

BUILTIN_BASES = Path(__file__).resolve().parent.parent / "bases"
MODEL_FOLDER = "unet"
SHARDS_INDEX = f"{MODEL_WEIGHTS}.index.json"
FROM_SCRATCH = "from scratch: "  # before the name of an architecture whose weights were drawn: nobody else has them
MAX_BASE_BYTES = 16 << 30  # of one file of a base, which the user names and no stranger; XL's network is 10 GB
MAX_TENSORS = 2000
Shape = tuple[int, ...]

_WORD, _YES_NO = text(r"[A-Za-z0-9_]{1,60}"), one_of(True, False)
_CHANNELS, _SMALL = whole(1, 8192), whole(0, 4096)
_SIDE = whole(1, 4096)
_VERSION = text(r"[A-Za-z0-9.+_\-]{1,60}")
_UNET: dict[str, Rule] = {  # diffusers' UNet2DModel
    "_class_name": one_of("UNet2DModel"),
    "_diffusers_version": _VERSION,
    "sample_size": or_none(lambda value: _SIDE(value) or (list_of(_SIDE, 2)(value) and len(value) == 2)),
    "block_out_channels": list_of(_CHANNELS, 16),
    "down_block_types": list_of(_WORD, 16),
    "up_block_types": list_of(_WORD, 16),
    "mid_block_type": or_none(_WORD),
    "layers_per_block": whole(1, 64),
    "num_class_embeds": or_none(whole(1, 10_000_000)),
    "num_train_timesteps": or_none(whole(1, 10_000)),
    "time_embedding_type": _WORD,
    "time_embedding_dim": or_none(whole(1, 32_768)),
    "attention_head_dim": or_none(_CHANNELS),
    "norm_num_groups": or_none(_CHANNELS),
    "attn_norm_num_groups": or_none(_CHANNELS),
    "class_embed_type": or_none(one_of("timestep", "identity")),
    **dict.fromkeys(("in_channels", "out_channels"), _CHANNELS),
    **dict.fromkeys(("freq_shift", "downsample_padding"), _SMALL),
    **dict.fromkeys(("center_input_sample", "flip_sin_to_cos", "add_attention"), _YES_NO),
    **dict.fromkeys(("downsample_type", "upsample_type", "act_fn", "resnet_time_scale_shift"), _WORD),
    **dict.fromkeys(("mid_block_scale_factor", "dropout", "norm_eps"), number(0, 1e6)),
}
_SCHEDULER: dict[str, Rule] = {  # diffusers' DDPMScheduler, or its EDMEulerScheduler
    "_class_name": one_of("DDPMScheduler", "EDMEulerScheduler"),
    "_diffusers_version": _VERSION,
    "num_train_timesteps": whole(1, 10_000),
    "trained_betas": or_none(list_of(number(0, 1), 10_000)),
    "steps_offset": _SMALL,
    **dict.fromkeys(("beta_start", "beta_end"), number(0, 1)),
    **dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing", "variance_type"), _WORD),
    **dict.fromkeys(("sigma_schedule", "final_sigmas_type"), _WORD),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "rho"), number(0, 1e6)),
    **dict.fromkeys(("clip_sample", "rescale_betas_zero_snr", "thresholding"), _YES_NO),
    **dict.fromkeys(("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"), number(0, 1e6)),
}
_ROW = whole(0, 10_000_000)
_LAYOUT: dict[str, Rule] = {
    "pixel_packing": whole(1, 64),
    "null_class": or_none(_ROW),
    "spare_classes": lambda value: list_of(_ROW, 2)(value) and len(value) == 2 and value[0] <= value[1],
    "class_code_rank": or_none(whole(1, 8192)),
    "latent": _YES_NO,
}
FORMS: dict[str, dict[str, Rule]] = {
    "unet/config.json": _UNET,
    "scheduler/scheduler_config.json": _SCHEDULER,
    "dp_peft_base.json": _LAYOUT,
}
# What loading a folder as a base would read besides, in place of the checked files or with them.
_LOADED_BESIDES = ("vae", "vqvae", "encoder", f"{MODEL_FOLDER}/{SHARDS_INDEX}")
_REQUIRED = {
    "unet/config.json": {"block_out_channels", "layers_per_block", "in_channels", "out_channels"},
    "scheduler/scheduler_config.json": {"num_train_timesteps"},
    "dp_peft_base.json": {"pixel_packing", "spare_classes"},
}


def has_weights(folder: Path) -> bool:
    """Whether a diffusers folder holds the weights of its net, and not its architecture alone."""
    return any((_net_folder(folder) / name).is_file() for name in (MODEL_WEIGHTS, SHARDS_INDEX))


def _net_folder(folder: Path) -> Path:
    return folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder


def _weights_files(folder: Path) -> list[Path]:
    """The files of the weights: one, or the shards that an index names.

    Raises:
        PrivacyError: the index is malformed.
    """
    place = _net_folder(folder)
    if not (place / SHARDS_INDEX).is_file():  # which diffusers prefers where both lie there
        return [place / MODEL_WEIGHTS]
    index = read_json(place / SHARDS_INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    shard = text(r"diffusion_pytorch_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
    if not isinstance(names, dict) or not names or not all(shard(name) for name in names.values()):
        raise PrivacyError(f"{SHARDS_INDEX} does not name the files of its tensors.")
    return sorted({place / name for name in names.values()})


def check_model(folder: Path) -> dict[str, Shape]:
    """A folder of a net that trained as a whole: strict configs, sizes that the file bears out, finite numbers.

    Returns:
        Parameter -> shape.

    Raises:
        PrivacyError: a file is missing, says what we never write, or holds numbers that are not finite.
    """
    for name in _LOADED_BESIDES:
        if (folder / name).exists():
            raise PrivacyError(f"{name} is no part of a net that trained as a whole, and would be loaded with it.")
    config, _, _ = (check_keys(read_json(folder / name), FORMS[name], _REQUIRED[name], name) for name in FORMS)
    path = folder / MODEL_FOLDER / MODEL_WEIGHTS
    header = safetensors_header(path)
    check_weights(path, header)
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    for name, start in _sizes(config).items():
        if shapes.get(name, ())[: len(start)] != start:
            raise PrivacyError(f"unet/config.json promises {name} of {list(start)}, and the file has another or none.")
    return shapes


def check_weights(path: Path, header: SafetensorsHeader) -> None:
    """Not too many tensors, and finite numbers in them.

    Raises:
        PrivacyError: too many, or a number that is not finite.
    """
    if len(header.tensors) > MAX_TENSORS:
        raise PrivacyError(f"{path.name} holds {len(header.tensors)} tensors; at most {MAX_TENSORS} are opened.")
    check_finite(path, header)


def _sizes(config: dict[str, Any]) -> dict[str, Shape]:
    """Parameter -> how its shape begins, for the parameters that bear out every size in the config."""
    channels = config["block_out_channels"]
    if not channels:
        raise PrivacyError("unet/config.json: block_out_channels is empty.")
    sizes = {
        "conv_in.weight": (channels[0], config["in_channels"]),
        "conv_out.weight": (config["out_channels"], channels[0]),
        "time_embedding.linear_1.weight": (config.get("time_embedding_dim") or 4 * channels[0],),
    }
    if config.get("num_class_embeds") is not None:
        sizes[f"{CLASS_TABLE}.weight"] = (config["num_class_embeds"],)
    for block, width in enumerate(channels):
        for layer in range(config["layers_per_block"]):
            sizes[f"down_blocks.{block}.resnets.{layer}.conv1.weight"] = (width,)
    return sizes


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """A base as diffusers would load it.

    Attributes:
        shapes: parameter -> shape, under the names that diffusers gives them today.
        sha256: the fingerprint, that of `diffusion.base_model.fingerprint`.
    """

    shapes: dict[str, Shape]
    sha256: str


def read_base(folder: Path) -> BaseFiles:
    """The base in a diffusers folder.

    Raises:
        UserError: no weights there.
        PrivacyError: they are malformed, or too large to be read here.
    """
    if not has_weights(folder):
        raise UserError(
            f"--base {folder}: no {MODEL_FOLDER}/{MODEL_WEIGHTS} there. Give the diffusers folder of a base."
        )
    files = {path: any_safetensors_header(path, MAX_BASE_BYTES) for path in _weights_files(folder)}
    for path, header in files.items():
        check_weights(path, header)
    stored = sorted((_todays_name(name), name, path) for path, header in files.items() for name in header.tensors)
    digest, shapes = hashlib.sha256(), {}
    for today, name, path in stored:
        if today in shapes:
            raise PrivacyError(f"{path.name} holds {name}, which another file holds too.")
        shapes[today] = files[path].tensors[name][1]
        digest.update(f"{today} {shapes[today]} torch.float32\n".encode())  # what diffusers loads every type as
        for numbers in float32_chunks(path, files[path], name):
            digest.update(numbers.tobytes())
    return BaseFiles(shapes, digest.hexdigest())


def _todays_name(name: str) -> str:
    """Old checkpoints have attention under other names, which diffusers changes on loading."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"\.(query|key|value|proj_attn)\.(?=(weight|bias)$)", lambda found: f".{names[found[1]]}.", name)
