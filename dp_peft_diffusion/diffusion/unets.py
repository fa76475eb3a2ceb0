"""UNets that this version trains: their configs, checked, and their weights, loaded or drawn."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from dp_peft_diffusion.diffusion.base_folder import load_part, read_settings
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.model_files import has_weights

UNETS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel)}


def unet_config(folder: Path, index: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of a UNet that this version can train.

    folder: of the UNet. index: model_index.json of the base, for the name of its pipeline. name: of the base.

    Raises:
        UserError: another network, or one that wants more than a time, a class or a prompt.
    """
    config = read_settings(folder / "config.json") or {}
    kind = config.get("_class_name")
    if kind not in UNETS:
        found = f"its network is {kind}" if kind else f"{folder.name or folder} holds no config.json of one"
        pipeline = f" ({index['_class_name']})" if "_class_name" in index else ""
        raise UserError(
            f"--pretrained_model_name_or_path {name!r}{pipeline} is no base of this version: it trains "
            f"{' and '.join(UNETS)}, and {found}. Choose a base with such a UNet."
        )
    wants = [key for key in ("class_embed_type", "time_cond_proj_dim") if config.get(key)]
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        wants.append("encoder_hid_dim_type")
    if config.get("addition_embed_type") not in (None, "text_time"):
        wants.append("addition_embed_type")
    if kind == "UNet2DConditionModel" and config.get("num_class_embeds"):
        wants.append("num_class_embeds")
    if wants:
        raise UserError(
            f"base {name!r}: its {kind} has {', '.join(f'{key} {config[key]!r}' for key in wants)}, which this version "
            "does not serve. Choose a base with classes or with prompts, such as Stable Diffusion 1.x, 2.x or XL."
        )
    return config


def load_unet(config: dict[str, Any], folder: Path, name: str) -> torch.nn.Module:
    """The frozen UNet in a base's folder.

    Raises:
        UserError: there are no weights in full precision.
    """
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    if not has_weights(folder):
        variants = sorted(path.name for path in place.glob("*.safetensors"))
        if variants:
            raise UserError(f"base {name!r} has {variants[0]} alone. Get its weights in full precision too.")
        raise UserError(
            f"--pretrained_model_name_or_path {name!r} is an architecture: it has no safetensors weights. Train it "
            "from scratch (--from_scratch --adapter full), or choose a base with weights."
        )
    return load_part(UNETS[config["_class_name"]], place, name)


def make_unet(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """A frozen UNet whose weights are drawn as its layers' classes draw them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # public: the weights before step 1 are no secret
        return UNETS[config["_class_name"]].from_config(config).requires_grad_(False).eval()
