"""Load exported files with stock tools and nothing else, in a process of its own: `python stock_reload.py JOB.json`.

Nothing of this package is imported here. What loads here loads wherever torch, diffusers and peft are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file

CHUNK = 8  # rows at once
ADDED = ("text_embeds", "time_ids")  # what XL is told besides the prompt


def reload(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each loader of a job makes of the exported folder.

    job: {"network": class of diffusers, "base": its folder, "adapter": exported folder, "loaders": names in `LOADERS`,
        "tensors": safetensors file of what `answers` takes, with the outputs "before" training and "trained"}.

    Returns:
        loader -> {"layers", "difference" from the trained outputs, "change" from those before}, or {"error"}.
    """
    return {name: facts(name, job, load_file(job["tensors"])) for name in job["loaders"]}


def facts(name: str, job: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What one loader makes of the exported folder."""
    try:
        network = LOADERS[name](getattr(diffusers, job["network"]), job)
        found = answers(network, given)
    except Exception as error:  # whatever stock tools raise is what there is to tell
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "layers": sum(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in network.modules()),
        "difference": (found - given["trained"]).abs().max().item(),
        "change": (found - given["before"]).abs().max().item(),
    }


def by_peft(network: Any, job: dict[str, Any]) -> torch.nn.Module:
    """The base with the peft pair."""
    return PeftModel.from_pretrained(network.from_pretrained(job["base"]), job["adapter"]).eval()


def by_diffusers(network: Any, job: dict[str, Any]) -> torch.nn.Module:
    """The base with pytorch_lora_weights.safetensors, as the pipelines' `load_lora_weights` loads it."""
    base = network.from_pretrained(job["base"])
    base.load_lora_adapter(job["adapter"], prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    return base.eval()


def whole(network: Any, job: dict[str, Any]) -> torch.nn.Module:
    """A net that trained as a whole."""
    return network.from_pretrained(job["adapter"], subfolder="unet").eval()


LOADERS = {"peft": by_peft, "diffusers": by_diffusers, "whole": whole}


@torch.no_grad()
def answers(network: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a network, which is turned into float64 for it, makes of made-up inputs: (n, c, h, w).

    In float64: in float32 two networks of the same weights differ by rounding, which a large adapter magnifies.

    given: "sample" (n, c, h, w), "timestep" (n,), and "told.NAME" (n, ...) for each condition.
    """
    told = {name.removeprefix("told."): rows for name, rows in given.items() if name.startswith("told.")}
    network, parts = network.double(), []
    for begin in range(0, len(given["sample"]), CHUNK):
        rows = slice(begin, begin + CHUNK)
        part: dict[str, Any] = {name: value[rows] for name, value in told.items()}
        if added := {name: part.pop(name) for name in ADDED if name in part}:
            part["added_cond_kwargs"] = added
        parts.append(network(given["sample"][rows], given["timestep"][rows], **part).sample)
    return torch.cat(parts)


if __name__ == "__main__":
    print(json.dumps(reload(json.loads(Path(sys.argv[1]).read_text()))))
