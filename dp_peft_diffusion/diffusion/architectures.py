"""How many parameters of an architecture an adapter trains, without any weights."""

from typing import Any

import torch

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion.adapters import inject_into
from dp_peft_diffusion.diffusion.unets import UNETS


def trainable_count(unet_config: dict[str, Any], spec: recipe.Adapter) -> int:
    """Numbers that `spec` trains in the UNet of a diffusers config, which names its class; class rows not counted.

    Raises:
        UserError: as `inject_into`.
    """
    with torch.device("meta"):
        unet = UNETS[unet_config["_class_name"]].from_config(unet_config)
        inject_into(unet, spec)
    return sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
