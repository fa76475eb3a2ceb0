"""Everything a pretraining resumes from, in one safetensors file."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

CHECKPOINT = "checkpoint.safetensors"


def write_checkpoint(
    output_dir: Path, step: int, trained: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, torch.Tensor]
) -> None:
    """Write weights, their average and Adam's moments, then move them into place: a kill leaves the last good ones."""
    tensors = {f"model.{name}": value for name, value in trained.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    partial = output_dir / "checkpoint.partial"
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"step": str(step)})
    os.replace(partial, output_dir / CHECKPOINT)


def resume(output_dir: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, torch.Tensor]) -> int:
    """Load the folder's checkpoint, in place. Returns the number of updates it has seen; 0 without one."""
    path = output_dir / CHECKPOINT
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trained.load_state_dict({name: tensors[f"model.{name}"] for name in ema})
    ema.update({name: tensors[f"ema.{name}"].to(value.device) for name, value in ema.items()})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
