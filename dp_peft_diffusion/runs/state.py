"""The state of training after a step, from which an interrupted run goes on bit for bit (invariant 12).

Two files: the tensors as safetensors, and state.json, which names them, with their digest. The second is replaced only
when the first is on disk, so a crash at any point leaves a whole state. Never pickle.
"""

import hashlib
import hmac
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from dp_peft_diffusion.durable import move_durably, partial_of, write_durably
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.gradients.optimizer import Ema, Parameters
from dp_peft_diffusion.runs.folder import numbered


def save_state(folder: Path, key: bytes, attempt: int, steps: int, tensors: dict[str, Tensor]) -> None:
    """Put the state after `steps` updates on disk, then remove the one before.

    Args:
        folder: the private folder.
        key: of the attempt; a state carries its mark, so that another attempt's is not mistaken for its own.
        attempt: its number.
        steps: updates taken.
        tensors: from `training_tensors`.

    Raises:
        OSError, SafetensorError: the disk is full; the state before is still there.
    """
    path = folder / f"state-{attempt}-{steps}.safetensors"
    save_file(tensors, partial_of(path))
    move_durably(partial_of(path), path)
    facts = {"steps": steps, "file": path.name, "sha256": _sha256(path)}
    write_durably(folder / state_file(attempt), json.dumps({**facts, "mark": _mark(key, facts)}).encode(), 0o600)
    for old in folder.glob("state-*.safetensors*"):
        if old != path:
            old.unlink()


def state_file(attempt: int) -> str:
    """Name of the file that names the state of an attempt."""
    return numbered("state.json", attempt)


def steps_saved(folder: Path, attempt: int) -> int:
    """How many steps the saved state of an attempt claims to hold, unchecked: evidence that they were begun."""
    try:
        return int(json.loads((folder / state_file(attempt)).read_bytes())["steps"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def load_state(folder: Path, key: bytes, attempt: int) -> tuple[int, dict[str, Tensor]]:
    """Updates taken and tensors; (0, {}) when no state was saved.

    Raises:
        RunError: the state is damaged, or belongs to another attempt or run.
    """
    path = folder / state_file(attempt)
    if not path.is_file():
        return 0, {}
    try:
        facts = json.loads(path.read_bytes())
        mark = facts.pop("mark")
        if not hmac.compare_digest(mark, _mark(key, facts)):
            raise ValueError("it was not written by this attempt of this run")
        content = (folder / facts["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError(f"the content of {facts['file']} changed")
        return facts["steps"], load(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise RunError(
            f"the saved state {path} cannot be used: {error or type(error).__name__}. Remove that file "
            "and type the same command again: all steps are then replayed with the same noise, which costs time and no "
            "privacy."
        ) from error


def training_tensors(parameters: Parameters, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Tensor]:
    """Everything that training carries from step to step, by name."""
    tensors = {"ema_updates": torch.tensor(ema.updates)}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"ema.{name}"] = ema.average[name]
        for moment, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = value
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


@torch.no_grad()
def restore(tensors: dict[str, Tensor], parameters: Parameters, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
    """Put back what `training_tensors` took."""
    ema.updates = int(tensors["ema_updates"])
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
        ema.average[name].copy_(tensors[f"ema.{name}"])
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            moment, _, name = rest.partition(".")
            # Adam keeps its step count on the CPU, its moments with the parameter.
            optimizer.state[parameters[name]][moment] = value if value.dim() == 0 else value.to(parameters[name].device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark(key: bytes, facts: dict[str, object]) -> str:
    return hmac.new(key, json.dumps(facts, sort_keys=True).encode(), hashlib.sha256).hexdigest()
