"""Read a shareable folder without torch and without trusting it."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.strict_form import number, whole
from dp_peft_diffusion.privacy.untrusted import (
    EXPONENTS,
    SafetensorsHeader,
    any_safetensors_header,
    float32_chunks,
    read_json,
)

JSON_FILES = ("adapter_config.json", "privacy.json")
MAX_FACTOR, MAX_RANK = 1 << 23, 2048  # numbers and rank of LoRA matrices that are multiplied; more would take long


def inspect_files(folder: Path) -> dict[str, Any]:
    """Everything in the folder: {"folder", "files", "safetensors", "adapter_config.json", "privacy.json"}.

    files: path -> bytes. safetensors: path -> {"metadata", "tensors", "changes"}.

    Raises:
        UserError: no such folder, or no safetensors file in it.
        PrivacyError: a file that is too big, or not what its name says.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that `dp-peft train` wrote.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in paths if path.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{folder} holds no .safetensors file. Give the folder that `dp-peft train` wrote.")
    said = {name: read_json(folder / name) if (folder / name).is_file() else None for name in JSON_FILES}
    scale = lora_scale(said["adapter_config.json"])
    return {
        "folder": str(folder),
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in paths},
        "safetensors": {str(path.relative_to(folder)): read_weights(path, scale) for path in weights},
        **said,
    }


def read_weights(path: Path, scale: float) -> dict[str, Any]:
    """One safetensors file: all its metadata, each tensor's type, shape and norm, and the change of each LoRA pair."""
    header = any_safetensors_header(path)
    tensors = {
        name: {"dtype": dtype, "shape": list(shape), "norm": norm(path, header, name) if dtype in EXPONENTS else None}
        for name, (dtype, shape) in sorted(header.tensors.items())
    }
    shapes = {name: shape for name, (dtype, shape) in header.tensors.items() if dtype in EXPONENTS}
    return {
        "metadata": header.metadata,
        "tensors": tensors,
        "changes": changes(shapes, lambda name: _matrix(path, header, name), scale),
    }


def changes(
    shapes: Mapping[str, tuple[int, ...]], matrix: Callable[[str], np.ndarray], scale: float
) -> dict[str, float]:
    """Frobenius norm of scale * B @ A, by module: how far the adapter moves each weight of the base.

    shapes: name -> shape. matrix: name -> the tensor in float64, flattened to (first dimension, all others).
    Convolutions have A (rank, in, h, w) and B (out, rank, 1, 1). Pairs of tensors above `MAX_FACTOR` are left out.
    """
    found = {}
    for name, a in shapes.items():
        module = re.split(r"\.lora_(?:embedding_)?A\b", name)
        partner = re.sub(r"\.lora_(embedding_)?A\b", r".lora_\1B", name)
        b = shapes.get(partner, ())
        if len(module) != 2 or min(len(a), len(b)) < 2 or not 0 < max(math.prod(a), math.prod(b)) <= MAX_FACTOR:
            continue
        if a[0] == math.prod(b[1:]) <= MAX_RANK:
            left, right = matrix(partner), matrix(name)
            with np.errstate(all="ignore"):
                # |B A|^2 = <B'B, A A'>: matrices of the rank's size, however large the product
                square = float(((left.T @ left) * (right @ right.T)).sum())
            found[module[0].removeprefix("base_model.model.")] = scale * max(square, 0.0) ** 0.5
    return found


def lora_scale(config: Any) -> float:
    """lora_alpha / r of an adapter_config.json; 1 where it does not say."""
    if not isinstance(config, dict):
        return 1.0
    alpha, rank = config.get("lora_alpha"), config.get("r")
    return float(alpha or 0) / (rank or 1) if number(0, 1e9)(alpha) and whole(1, 10**9)(rank) else 1.0


def _matrix(path: Path, header: SafetensorsHeader, name: str) -> np.ndarray:
    numbers = np.concatenate([np.zeros(0, np.float32), *float32_chunks(path, header, name)])
    with np.errstate(all="ignore"):  # of NaN
        return numbers.astype(np.float64).reshape(header.tensors[name][1][0], -1)


def norm(path: Path, header: SafetensorsHeader, name: str) -> float:
    """Frobenius norm of a tensor, summed in float64."""
    with np.errstate(all="ignore"):  # of NaN
        return sum(float(np.square(part, dtype=np.float64).sum()) for part in float32_chunks(path, header, name)) ** 0.5
