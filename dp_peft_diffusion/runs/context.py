"""Everything that shapes an update: under another context a run's noise is never used again (invariant 12)."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.runs.folder import line_differences

LIBRARIES = ("torch", "numpy", "diffusers", "peft")


def context_of(
    recipe: str, mechanism: DPMechanism, images: bytes, base_sha256: str, device: torch.device
) -> dict[str, str]:
    """What shapes the updates of a run, as texts.

    Args:
        recipe: resolved, as YAML, without places on this machine: what lies there has its own digest.
        mechanism: with its noise.
        images: digest of the decoded records.
        base_sha256: of the base's weights.
        device: that computes.
    """
    computer = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "recipe": recipe,
        "mechanism": json.dumps(dataclasses.asdict(mechanism), sort_keys=True),
        "images": images.hex(),
        "base": base_sha256,
        "code": code_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {computer}",
        "threads": str(torch.get_num_threads()),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def context_digest(context: dict[str, str]) -> bytes:
    """SHA-256 of a context, for `attempt_key`."""
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).digest()


def code_digest() -> str:
    """SHA-256 of the sources of this package, 64 hex digits."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def differences(before: dict[str, str], now: dict[str, str]) -> str:
    """What differs between two contexts, for people: settings by value, contents by name only."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, ""), now.get(name, "")
        if old == new:
            continue
        if name == "recipe":
            found += line_differences(old, new)
        elif name in ("images", "base", "code"):
            found.append(f"the {name} changed")
        else:
            found.append(f"{name}: {old} before, {new} now")
    return "; ".join(found)
