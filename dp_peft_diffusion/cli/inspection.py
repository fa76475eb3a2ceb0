"""Read a shareable folder without torch and without trusting it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dp_peft_diffusion.errors import UserError

JSON_FILES = ("adapter_config.json", "privacy.json")
_NUMPY_TYPES = {"F64", "F32", "F16"}


def inspect_files(folder: Path) -> dict[str, Any]:
    """Everything in the folder: {"folder", "files", "safetensors", "adapter_config.json", "privacy.json"}.

    files: path -> bytes. safetensors: path -> {"metadata", "tensors", "changes"}.

    Raises:
        UserError: no such folder, no safetensors file in it, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that `dp-peft train` wrote.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in paths if path.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{folder} holds no .safetensors file. Give the folder that `dp-peft train` wrote.")
    config = read_json(folder / "adapter_config.json")
    return {
        "folder": str(folder),
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in paths},
        "safetensors": {str(path.relative_to(folder)): read_weights(path, lora_scale(config)) for path in weights},
        **{name: read_json(folder / name) for name in JSON_FILES},
    }


def read_weights(path: Path, scale: float) -> dict[str, Any]:
    """One safetensors file: all its metadata, each tensor's type, shape and norm, and the change of each LoRA pair."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: part.get_dtype() for name, part in slices.items()}
            arrays = {name: file.get_tensor(name) for name in slices if types[name] in _NUMPY_TYPES}
            metadata = file.metadata() or {}
            shapes = {name: part.get_shape() for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}. Ask for the folder again.") from error
    tensors = {
        name: {"dtype": types[name], "shape": shapes[name], "norm": norm(arrays[name]) if name in arrays else None}
        for name in sorted(slices)
    }
    return {"metadata": metadata, "tensors": tensors, "changes": changes(arrays, scale)}


def changes(arrays: dict[str, np.ndarray], scale: float) -> dict[str, float]:
    """Frobenius norm of scale * B @ A, by module: how far the adapter moves each weight of the base.

    Convolutions have A (rank, in, h, w) and B (out, rank, 1, 1); flattened they are matrices like the rest.
    """
    found = {}
    for name, a in arrays.items():
        module = re.split(r"\.lora_(?:embedding_)?A\b", name)
        b = arrays.get(re.sub(r"\.lora_(embedding_)?A\b", r".lora_\1B", name))
        if len(module) != 2 or b is None or min(a.ndim, b.ndim) < 2 or not a.size or not b.size:
            continue
        left, right = (matrix.reshape(len(matrix), -1).astype(np.float64) for matrix in (b, a))
        if left.shape[1] == right.shape[0]:
            found[module[0].removeprefix("base_model.model.")] = scale * norm(left @ right)
    return found


def lora_scale(config: Any) -> float:
    """lora_alpha / r of an adapter_config.json; 1 where it does not say."""
    if not isinstance(config, dict):
        return 1.0
    alpha, rank = config.get("lora_alpha"), config.get("r")
    return alpha / rank if isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0 else 1.0


def norm(array: np.ndarray) -> float:
    """Frobenius norm, summed in float64."""
    return float(np.linalg.norm(array.astype(np.float64)))


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file.

    Raises:
        UserError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. Ask for the folder again.") from error
