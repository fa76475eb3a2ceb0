"""Differentially private fine-tuning of diffusion models with small adapters.

Names are imported from their rooms when they are first used, so that `import dp_peft_diffusion` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_peft_diffusion.diffusion.adapters import inject_adapter
    from dp_peft_diffusion.diffusion.generation import generate
    from dp_peft_diffusion.diffusion.merging import load_adapter, merge_adapter
    from dp_peft_diffusion.gradients.clipper import PerSampleClipper
    from dp_peft_diffusion.privacy.certificate import verify
    from dp_peft_diffusion.privacy.mechanism import DPMechanism
    from dp_peft_diffusion.recipe import Recipe
    from dp_peft_diffusion.training import train

__all__ = [
    "DPMechanism",
    "PerSampleClipper",
    "Recipe",
    "generate",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "train",
    "verify",
]

_ROOMS = {
    "DPMechanism": "privacy.mechanism",
    "PerSampleClipper": "gradients.clipper",
    "Recipe": "recipe",
    "generate": "diffusion.generation",
    "inject_adapter": "diffusion.adapters",
    "load_adapter": "diffusion.merging",
    "merge_adapter": "diffusion.merging",
    "train": "training",
    "verify": "privacy.certificate",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room (PEP 562)."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
