"""The adapter of a shareable folder in the files of other tools: diffusers' own loader, and web UIs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_files import WEIGHTS_FILE, AdapterFiles, holds_whole_model, read_adapter
from dp_peft_diffusion.privacy.adapter_form import matches, rank_of
from dp_peft_diffusion.privacy.adapter_layers import AdapterLayers
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE
from dp_peft_diffusion.privacy.lora_files import (
    PROMISE_KEY,
    diffusers_takes,
    lora_metadata,
    lora_name,
    promise_text,
)
from dp_peft_diffusion.sharing.promises import NO_CERTIFICATE, check_apart, checked_promise

# Width of the prompts a network reads -> what kohya's trainer calls the family. Of these there are web UIs.
FAMILIES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
# The layers that kohya's trainer adapts, and that web UIs know by their diffusers names.
_KNOWN = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\.\d+\.[a-z0-9_.]+"
)


@dataclass(frozen=True)
class KohyaFile:
    """What `write_kohya` wrote: where, how many layers, and the family of the base where its width tells."""

    path: Path
    layers: int
    family: str | None


def write_lora_file(folder: Path, document: dict[str, Any]) -> None:
    """pytorch_lora_weights.safetensors beside the peft pair in `folder`: the same adapter, and the promise.

    document: privacy.json.

    Raises:
        PrivacyError: the peft pair is not what our kinds write.
    """
    config = read_adapter(folder).config
    tensors = {lora_name(name): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    (folder / LORA_FILE).write_bytes(file_of(tensors, lora_metadata(config, document)))


def write_kohya(folder: Path, output: Path | None = None) -> KohyaFile:
    """One file for web UIs such as AUTOMATIC1111's and ComfyUI, in the format of kohya-ss/sd-scripts.

    folder: a shareable folder; its files are checked first. output: NAME.kohya.safetensors beside it if None.

    Raises:
        UserError: the format has no words for this adapter, no web UI takes its base, or a bad `output`.
        PrivacyError: the files say what our kinds never write, or the certificate does not hold.
    """
    output = folder.resolve().with_name(f"{folder.resolve().name}.kohya.safetensors") if output is None else output
    check_output(folder, output)
    if holds_whole_model(folder):
        raise UserError(f"{folder} holds a whole model, and no adapter. Load it with from_pretrained of diffusers.")
    adapter = read_adapter(folder)
    check_kohya_says(folder, adapter)
    tensors = {lora_name(name): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    metadata = kohya_metadata(adapter) | promise_metadata(folder)
    write_durably(output, file_of(kohya_tensors(tensors, adapter), metadata))
    return KohyaFile(output, len(adapter.layers.layers), family(adapter.layers))


def file_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file that is the same for the same content: the library writes metadata in any order."""
    plain = save(tensors)
    end = 8 + int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(plain[8:end])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[end:]


def kohya_tensors(tensors: dict[str, torch.Tensor], adapter: AdapterFiles) -> dict[str, torch.Tensor]:
    """Tensors by the names of diffusers' LoRA files -> by kohya's, with the alpha of each layer.

    All layers have one alpha: load_lora_weights of diffusers 0.42.1 leaves others out. Where a layer's own is another,
    its matrix B makes up for it.
    """
    named = {name: tensor.contiguous() for name, tensor in convert_state_dict_to_kohya(tensors).items()}
    alpha = kohya_alpha(adapter.config, "")
    for module in adapter.layers.layers:
        layer = f"lora_unet_{module.replace('.', '_')}"
        named[f"{layer}.alpha"] = torch.tensor(alpha)
        if (own := kohya_alpha(adapter.config, module)) != alpha:
            named[f"{layer}.lora_up.weight"] = named[f"{layer}.lora_up.weight"] * (own / alpha)
    return named


def kohya_alpha(config: dict[str, Any], module: str) -> float:
    """The alpha of a layer by which alpha / rank is its scale, also where stock peft divides by the root of the rank.

    module: path of the layer; "" for what the config says of all others.
    """
    alphas = config.get("alpha_pattern") or {}
    alpha = next((own for name, own in alphas.items() if matches(module, name)), config["lora_alpha"])
    return float(alpha * rank_of(config, module) ** 0.5 if config.get("use_rslora") else alpha)


def kohya_metadata(adapter: AdapterFiles) -> dict[str, str]:
    """The keys that web UIs read: what network this is, and which models they offer it for."""
    rank, alpha, known = adapter.config["r"], kohya_alpha(adapter.config, ""), family(adapter.layers)
    told = {"ss_network_module": "networks.lora", "ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha:g}"}
    if known is not None:
        told |= {"ss_base_model_version": known, "ss_v2": str(known == "sd_v2")}
    return {"format": "pt", **told}


def promise_metadata(folder: Path) -> dict[str, str]:
    """The promise of the folder; of one without, that there is none.

    Raises:
        PrivacyError: its certificate does not hold.
    """
    document = checked_promise(folder)
    if document is None:
        return {PROMISE_KEY: json.dumps({"certificate": None, "statement": NO_CERTIFICATE})}
    return {PROMISE_KEY: promise_text(document)}


def family(layers: AdapterLayers) -> str | None:
    """The family of a base, by the width of the prompts that cross-attention reads; None if that does not tell."""
    shapes = [shape for module, shape in layers.layers.items() if module.endswith(("attn2.to_k", "attn2.to_v"))]
    return FAMILIES.get(shapes[0][1] or 0) if shapes else None


def check_kohya_says(folder: Path, adapter: AdapterFiles) -> None:
    """The format has words for the adapter, and there are web UIs for its base.

    Raises:
        UserError: there are none; the message names what can load it.
    """
    other = f"Load it with stock peft, or write a whole model: dp-peft merge --adapter {folder} --output_dir DIR"
    config = adapter.config
    network = (config.get("auto_mapping") or {}).get("base_model_class", "an unnamed network")
    if network != "UNet2DConditionModel":
        raise UserError(f"{folder}: no web UI takes {network}; they take Stable Diffusion 1, 2 and XL. {other}")
    if not diffusers_takes(config) or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config["peft_type"]
        more = " with more than LoRA layers" if kind == "LORA" else ""
        raise UserError(f"{folder}: kohya's format has LoRA alone, and this is {kind}{more}. {other}")
    for module in adapter.layers.layers:
        if not _KNOWN.fullmatch(module):
            raise UserError(f"{folder}: web UIs do not adapt the layer {module}, which trained. {other}")


def check_output(folder: Path, output: Path) -> None:
    """A new safetensors file outside of shareable folders.

    Raises:
        UserError: it is anything else.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: web UIs know the format by its ending. End it with .safetensors")
    check_apart(output, "--output", [folder])
    if output.exists():
        raise UserError(f"--output {output} exists. Remove it, or choose another.")
