"""What is installed, for bug reports, and whether torch and torchvision are a pair. Imports neither."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "dp-peft-diffusion torch torchvision diffusers peft accelerate transformers safetensors datasets huggingface_hub "
    "opacus dp-accounting clean-fid numpy scipy scikit-learn pillow pyarrow click PyYAML jinja2 tqdm matplotlib"
).split()
TESTED_PAIR = "torch==2.15.0 torchvision==0.29.2"  # as constraints.txt pins them
# Fails with "operator torchvision::nms does not exist" when the two are not built for each other.
PAIR_CHECK = (
    "import torchvision, torch; "
    "torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5); "
    "print('cuda' if torch.cuda.is_available() else 'cpu')"
)


def describe() -> dict[str, Any]:
    """Versions, platform, and the pair: {"python", "platform", "cpu_count", "packages", "pair"}."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: installed(name) for name in PACKAGES},
        "pair": check_pair(),
    }


def installed(name: str) -> str | None:
    """The version of a distribution; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_pair() -> dict[str, Any]:
    """Load torchvision in a process of its own: {"ok", "device", "error", "install"}."""
    found = subprocess.run([sys.executable, "-c", PAIR_CHECK], capture_output=True, text=True)
    if found.returncode == 0:
        return {"ok": True, "device": found.stdout.strip(), "error": None, "install": None}
    last_line = (found.stderr.strip().splitlines() or ["no message"])[-1]
    command = pair_command(installed("torch"), installed("torchvision"))
    return {"ok": False, "device": None, "error": last_line, "install": command}


def pair_command(torch: str | None, torchvision: str | None) -> str:
    """The command that installs the tested pair, both from one source.

    torch, torchvision: the versions found. Builds from torch's own index name it after a plus, as in 2.9.0+cpu; one of
    each kind is the usual way to a broken pair.
    """
    named = any(found and "+" in found for found in (torch, torchvision))
    index = " --index-url INDEX  # the one your torch came from, for both" if named else ""
    return f"pip install --force-reinstall {TESTED_PAIR}{index}"
