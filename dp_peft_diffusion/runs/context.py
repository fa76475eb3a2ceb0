"""Everything that shapes an update: under another context a run's noise is never used again (invariant 12)."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.runs.folder import line_differences

LIBRARIES = ("torch", "numpy", "scipy", "diffusers", "peft", "transformers", "tokenizers")
VARIABLES = (  # of the environment, by which libraries choose other kernels or another precision
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip


def context_of(
    recipe: str, mechanism: DPMechanism, promise: Promise | None, base: str, conditions: str, device: torch.device
) -> dict[str, str]:
    """What shapes the updates of a run but for its images, as texts.

    Args:
        recipe: resolved, as YAML, without places on this machine: what lies there has its own digest.
        mechanism: with its noise.
        promise: whose earlier releases the noise was calibrated beside; None without privacy.
        base: digest of its weights and settings.
        conditions: digest of what the network is told of each class.
        device: that computes.
    """
    computer = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "recipe": recipe,
        "mechanism": json.dumps(dataclasses.asdict(mechanism), sort_keys=True),
        "earlier releases": "none" if promise is None else str(promise.prior),
        "base": base,
        "conditions": conditions,
        "code": code_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {computer}",
        "threads": str(torch.get_num_threads()),
        "settings": json.dumps(settings(), sort_keys=True),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def settings() -> dict[str, str]:
    """Switches of torch and of the libraries below it that change what a kernel computes."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda_matmul_tf32": str(torch.backends.cuda.matmul.allow_tf32),
        "cudnn_tf32": str(torch.backends.cudnn.allow_tf32),
        "cudnn_benchmark": str(torch.backends.cudnn.benchmark),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "cuda": str(torch.version.cuda),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        **{name: os.environ.get(name, "") for name in VARIABLES},
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
        elif name in ("images", "base", "conditions", "code"):
            found.append(f"the {name} changed")
        else:
            found.append(f"{name}: {old} before, {new} now")
    return "; ".join(found)
