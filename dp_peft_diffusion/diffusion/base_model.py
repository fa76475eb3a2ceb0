"""Load a frozen base: a diffusers UNet, its noise schedule, and how images become its input."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES

LAYOUT_FILE = "dp_peft_base.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class BaseLayout:
    """What stock config files cannot say of a base. A base without the file has the defaults.

    pixel_packing: side of the pixel blocks folded into channels (torch's pixel_unshuffle).
    null_class: row of the class table that means "no class" (label dropout), if there is one.
    spare_classes: first row, and one past the last, that stands for nothing yet.
    class_code_rank: dimensions that the public rows of the class table span around the null row.
    """

    pixel_packing: int = 1
    null_class: int | None = None
    spare_classes: tuple[int, int] = (0, 0)
    class_code_rank: int | None = None


@dataclass(frozen=True)
class BaseModel:
    """A frozen UNet in eval mode with its training noise schedule."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    layout: BaseLayout
    name: str
    revision: str | None
    subfolder: str | None
    sha256: str

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        size = self.unet.config.sample_size
        return self.layout.pixel_packing * (size if isinstance(size, int) else size[0])

    @property
    def image_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.unet.config.in_channels // self.layout.pixel_packing**2

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the class table; None for an unconditional base."""
        return self.unet.config.num_class_embeds

    @property
    def digest(self) -> str:
        """SHA-256 of all that the base puts into an update: weights, the net's and the schedule's settings, layout."""
        settings = [dict(self.unet.config), dict(self.scheduler.config), asdict(self.layout)]
        for config in settings:
            for name in ("_name_or_path", "_diffusers_version", "_class_name", "_use_default_values"):
                config.pop(name, None)
        text = json.dumps([self.sha256, *settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, c, side, side) in [-1, 1] -> the network's input."""
        return F.pixel_unshuffle(images, self.layout.pixel_packing)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(samples, self.layout.pixel_packing)


def load_base(name: str, revision: str | None = None) -> BaseModel:
    """Load `builtin:NAME`, a local diffusers folder, or a Hub repository; freeze it; eval mode.

    Raises:
        UserError: unknown name, or not a UNet2DModel with safetensors weights.
    """
    folder, subfolder = _locate(name, revision)
    try:
        unet = UNet2DModel.from_pretrained(folder, subfolder=subfolder, revision=revision, use_safetensors=True)
        scheduler = _load_scheduler(folder, revision)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name!r} could not be opened as a diffusers UNet2DModel: {error}"
        ) from error
    if missing := [key for key, value in unet.state_dict().items() if value.is_meta]:  # diffusers only warns of it
        raise UserError(f"--pretrained_model_name_or_path {name!r} lacks weights: {', '.join(missing[:4])}.")
    unet.requires_grad_(False).eval()
    return BaseModel(unet, scheduler, _load_layout(folder, revision), name, revision, subfolder, fingerprint(unet))


def _locate(name: str, revision: str | None) -> tuple[str, str | None]:
    """Where the UNet lies: (folder or Hub id, subfolder)."""
    if name.startswith("builtin:"):
        folder = BUILTIN_BASES / name.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{path.name}" for path in sorted(BUILTIN_BASES.glob("*/")))
            raise UserError(f"--pretrained_model_name_or_path {name!r} is not a built-in base. There is: {known}")
        return str(folder), "unet"
    path = Path(name)
    if path.is_dir():
        return name, "unet" if (path / "unet").is_dir() else None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--pretrained_model_name_or_path {name!r}: no such folder.")
    try:
        index = UNet2DModel.load_config(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--pretrained_model_name_or_path {name!r} is no local folder, and could not be read from the Hub: "
            f"{error}. Check the name and the network, or give a folder, or builtin:handwriting."
        ) from error
    return name, "unet" if index.get("_class_name") != "UNet2DModel" else None


def _load_scheduler(folder: str, revision: str | None) -> DDPMScheduler:
    """The base's training schedule; alphas and prediction type are what matters of it."""
    local = Path(folder)
    subfolder = "scheduler" if not local.is_dir() or (local / "scheduler").is_dir() else None
    return DDPMScheduler.from_pretrained(folder, subfolder=subfolder, revision=revision)


def _load_layout(folder: str, revision: str | None) -> BaseLayout:
    """The layout file beside the weights; most bases have none.

    Raises:
        UserError: it is not what `save_base` writes.
    """
    path = Path(folder) / LAYOUT_FILE
    if not Path(folder).is_dir():
        try:
            path = Path(hf_hub_download(folder, LAYOUT_FILE, revision=revision))
        except EntryNotFoundError:
            return BaseLayout()
    if not path.is_file():
        return BaseLayout()
    try:
        fields = json.loads(path.read_text())
        return BaseLayout(**{**fields, "spare_classes": tuple(fields["spare_classes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no layout of a base: {error}. Restore the file, or pretrain again.") from error


def fingerprint(unet: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_base(folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler, layout: BaseLayout) -> None:
    """Write a base as `load_base` and stock `from_pretrained` read it."""
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / LAYOUT_FILE).write_text(json.dumps(asdict(layout), indent=2) + "\n")
