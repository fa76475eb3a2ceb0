"""Load a frozen base: a diffusers UNet, its noise schedule, and how images and prompts become its input."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel

from dp_peft_diffusion.diffusion.autoencoding import (
    Autoencoder,
    downsampling,
    from_latents,
    latent_channels,
    load_autoencoder,
    to_latents,
)
from dp_peft_diffusion.diffusion.base_folder import find_folder, hub_commit, read_settings
from dp_peft_diffusion.diffusion.image_codes import CodeEncoder, load_encoder
from dp_peft_diffusion.diffusion.schedules import Schedule, read_schedule, with_prediction_type
from dp_peft_diffusion.diffusion.text_encoding import TextEncoders, load_text_encoders
from dp_peft_diffusion.diffusion.unets import load_unet, make_unet, unet_config
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES, FROM_SCRATCH

__all__ = [
    "BUILTIN_BASES",
    "BaseLayout",
    "BaseModel",
    "check_fit",
    "fingerprint",
    "load_base",
    "load_parts",
    "save_base",
]
LAYOUT_FILE = "dp_peft_base.json"
_PRIVATE_KEYS = ("_name_or_path", "_diffusers_version", "_class_name", "_use_default_values")  # say nothing of the net
# Of the configs of autoencoders and text encoders, what the shapes of weights do not show.
_BESIDE_WEIGHTS = (
    "scaling_factor", "shift_factor", "norm_num_groups", "act_fn", "norm_type", "lookup_from_codebook",
    "num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class BaseLayout:
    """What stock config files cannot say of a base. A base without the file has the defaults.

    pixel_packing: side of the pixel blocks folded into channels (torch's pixel_unshuffle).
    null_class: row of the class table that means "no class" (label dropout), if there is one.
    spare_classes: first row, and one past the last, that stands for nothing yet.
    class_code_rank: dimensions that the public rows of the class table span around the null row.
    latent: it denoises latents of an autoencoder, which need not lie beside it.
    """

    pixel_packing: int = 1
    null_class: int | None = None
    spare_classes: tuple[int, int] = (0, 0)
    class_code_rank: int | None = None
    latent: bool = False


@dataclass(frozen=True)
class BaseModel:
    """A frozen UNet in eval mode with its training noise schedule, and what turns images and prompts into its input.

    name: as the user gave it; of a net from scratch with `FROM_SCRATCH` before it.
    revision: commit of a base from the Hub, whatever branch was asked for; None of one that lies here.
    sha256: the UNet's fingerprint. vae: of a latent base. text: of a text-conditional base. codes: of a base that is
        told codes of images.
    """

    unet: UNet2DModel | UNet2DConditionModel
    scheduler: Schedule
    layout: BaseLayout
    name: str
    revision: str | None
    subfolder: str | None
    sha256: str
    vae: Autoencoder | None = None
    text: TextEncoders | None = None
    codes: CodeEncoder | None = None

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        factor = self.layout.pixel_packing if self.vae is None else downsampling(self.vae)
        return factor * self.input_shape[-1]

    @property
    def image_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        if self.vae is not None:
            return self.vae.config.in_channels
        return self.unet.config.in_channels // self.layout.pixel_packing**2

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network denoises."""
        side = _side(self.unet.config.sample_size)
        return (self.unet.config.in_channels, side, side)

    @property
    def is_latent(self) -> bool:
        """Whether the network denoises latents of an autoencoder."""
        return self.vae is not None

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the class table; None for a base without classes."""
        return self.unet.config.num_class_embeds

    @property
    def public_rows(self) -> list[int]:
        """Rows of the class table that stand for public classes; all but the null row where every other is spare."""
        first, end = self.layout.spare_classes
        rows = [row for row in range(self.num_class_embeds or 0) if row != self.layout.null_class]
        return [row for row in rows if not first <= row < end] or rows

    @cached_property
    def parts_digest(self) -> str | None:
        """SHA-256 of the autoencoder and the encoders of text and codes; None of a base that has none of them.

        Certificates hold it. So of the configs it takes `_BESIDE_WEIGHTS` alone: libraries add keys as years go by.
        """
        parts = self._parts
        if not parts:
            return None
        facts = [[fingerprint(part), *(getattr(part.config, key, None) for key in _BESIDE_WEIGHTS)] for part in parts]
        zeros_for_empty = self.text is not None and self.text.zeros_for_empty
        return hashlib.sha256(json.dumps([facts, zeros_for_empty]).encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the base puts into an update: weights and settings of every part, schedule, layout."""
        facts: list[Any] = [self.sha256, _settings(self.unet), _settings(self.scheduler), asdict(self.layout)]
        if self.vae is not None:
            facts += [fingerprint(self.vae), _settings(self.vae)]
        if self.text is not None:
            facts += [*map(fingerprint, self.text.encoders), *self.text.settings]
        if self.codes is not None:
            facts += [fingerprint(self.codes), _settings(self.codes)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def to(self, device: torch.device | str) -> "BaseModel":
        """The same base, every part of it moved to a device."""
        for part in (self.unet, *self._parts):
            part.to(device)
        return self

    @property
    def _parts(self) -> list[Any]:
        """All that is frozen beside the UNet."""
        parts = (self.vae, *(self.text.encoders if self.text else ()), self.codes)
        return [part for part in parts if part is not None]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, c, side, side) in [-1, 1] -> the network's input (n, *input_shape), on the base's device.

        Packed pixels, or latents: each image alone, scaled by the config and never by data (`to_latents`).
        """
        if self.vae is None:
            return F.pixel_unshuffle(images, self.layout.pixel_packing)
        return to_latents(self.vae, images)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`: network inputs (n, *input_shape) -> images (n, c, side, side)."""
        if self.vae is None:
            return F.pixel_shuffle(samples, self.layout.pixel_packing)
        return from_latents(self.vae, samples)

    def predict(
        self, unet: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The raw output (n, *input_shape) of `unet`, which is the base's own, an adapted or a merged one.

        noisy: (n, *input_shape). times: what the network takes, (n,) or one number for all rows.
        conditions: {"class_labels": (n,)}, or {"encoder_hidden_states": (n, T, D)} and of XL {"text_embeds": (n, P)};
            empty for an unconditional base.
        """
        if "text_embeds" not in conditions:
            return unet(noisy, times, **conditions).sample
        side = self.resolution  # XL is told original size, crop and target size (Podell et al. 2023, section 2.2)
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=noisy.dtype, device=noisy.device)
        added = {"text_embeds": conditions["text_embeds"], "time_ids": sizes.expand(len(noisy), 6)}
        return unet(noisy, times, conditions["encoder_hidden_states"], added_cond_kwargs=added).sample


def load_base(
    name: str,
    revision: str | None = None,
    from_scratch: bool = False,
    prediction_type: str | None = None,
    seed: int = 0,
) -> BaseModel:
    """Load `builtin:NAME`, a diffusers folder, or a Hub repository; freeze it; eval mode.

    from_scratch: draw the UNet's weights from the public `seed` instead of loading them.
    prediction_type: must be the base's own, unless from scratch.

    Raises:
        UserError: unknown name, or a base that this version cannot train; the message names what is missing.
    """
    base = load_parts(name, revision, from_scratch, prediction_type, seed)
    if base.layout.latent and base.vae is None:
        raise UserError(
            f"base {name!r} denoises latents and has no autoencoder: it trained as a whole on a latent base. To train "
            "on it, copy its folder, and put vae/ (or vqvae/) of that base into the copy. For images, type dp-peft "
            "sample --base with that base."
        )
    return base


def load_parts(
    name: str,
    revision: str | None = None,
    from_scratch: bool = False,
    prediction_type: str | None = None,
    seed: int = 0,
) -> BaseModel:
    """As `load_base`, but the autoencoder of a net on latents may lie elsewhere: `layout.latent` says so.

    Raises:
        UserError: what `load_base` refuses besides.
    """
    folder = find_folder(name, revision)
    index = read_settings(folder / "model_index.json") or {}
    subfolder = "unet" if (folder / "unet").is_dir() else None
    config = unet_config(folder / (subfolder or ""), index, name)
    vae = load_autoencoder(folder, name)
    layout = _load_layout(folder)
    latent = layout.latent or vae is not None
    scheduler = with_prediction_type(read_schedule(folder, name, latent), prediction_type, from_scratch, latent)
    conditional = config["_class_name"] == "UNet2DConditionModel"
    text = load_text_encoders(folder, index, name) if conditional else None
    unet = make_unet(config, seed) if from_scratch else load_unet(config, folder, name)
    base = BaseModel(
        unet=unet,
        scheduler=scheduler,
        layout=layout,
        name=FROM_SCRATCH + name if from_scratch else name,
        revision=hub_commit(name, folder),
        subfolder=subfolder,
        sha256=fingerprint(unet),
        vae=vae,
        text=text,
        codes=load_encoder(folder, name),
    )
    check_fit(base)
    return base


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all weights, in order of name."""
    digest = hashlib.sha256()
    # Some versions of transformers put "text_model." before the weights of a CLIPTextModel, others do not.
    for name, tensor in sorted((k.removeprefix("text_model."), v) for k, v in model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_base(folder: Path, unet: UNet2DModel, scheduler: Schedule, layout: BaseLayout) -> None:
    """Write a base as `load_base` and stock `from_pretrained` read it."""
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / LAYOUT_FILE).write_text(json.dumps(asdict(layout), indent=2) + "\n")


def _load_layout(folder: Path) -> BaseLayout:
    """The layout file beside the weights; most bases have none."""
    path = folder / LAYOUT_FILE
    if not path.is_file():
        return BaseLayout()
    try:
        fields = json.loads(path.read_text())
        return BaseLayout(**{**fields, "spare_classes": tuple(fields["spare_classes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no layout of a base: {error}. Restore the file, or pretrain again.") from error


def check_fit(base: BaseModel) -> None:
    """The parts of a base fit one another, and the UNet denoises what it is given and nothing else.

    Raises:
        UserError: naming what does not fit.
    """
    config, fault = base.unet.config, None
    if config.in_channels != config.out_channels:  # inpainting, upscaling, learned variances
        fault = f"its UNet takes {config.in_channels} channels and gives {config.out_channels}"
    elif _side(config.sample_size) is None:
        fault = "its UNet's config says no square sample_size"
    elif base.vae is not None and latent_channels(base.vae) != config.in_channels:
        fault = f"its autoencoder makes {latent_channels(base.vae)} channels and its UNet takes {config.in_channels}"
    elif base.vae is not None and base.layout.pixel_packing != 1:
        fault = "it packs pixels and has an autoencoder"
    elif base.text is not None and not _told_all(base):
        fault = "its UNet wants more than text encoders, an image size and a time give it"
    elif base.codes is not None and not _takes_codes(base):
        fault = (
            "its encoder takes other images than its UNet draws, or gives rows that its class table has no place for"
        )
    if fault is not None:
        raise UserError(f"base {base.name!r}: {fault}, which this version does not train. Choose another base.")


def _told_all(base: BaseModel) -> bool:
    """Whether prompts are as wide as the UNet wants them, and XL's vector of sizes and pooled text as long."""
    config, null = base.unet.config, base.text.null if base.text else {}
    pooled = 6 * (config.addition_time_embed_dim or 0) + null["text_embeds"].shape[1] if "text_embeds" in null else None
    wanted = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
    width = config.encoder_hid_dim or config.cross_attention_dim  # a layer of the UNet may come between
    return null["encoder_hidden_states"].shape[2] == width and pooled == wanted


def _takes_codes(base: BaseModel) -> bool:
    """Whether the encoder sees the images that the UNet draws, and its rows are as wide as the class table."""
    config: Any = base.codes.config if base.codes else None
    shown = (config.resolution, config.image_channels) == (base.resolution, base.image_channels)
    told = base.num_class_embeds is not None and base.vae is None
    return shown and told and base.unet.class_embedding.embedding_dim == config.row_size


def _side(size: int | list[int] | tuple[int, ...] | None) -> Any:
    """Side of a square; None of anything else."""
    return size if isinstance(size, int) else size[0] if size and len(set(size)) == 1 else None


def _settings(part: Any) -> dict[str, Any]:
    return {key: value for key, value in part.config.items() if key not in _PRIVATE_KEYS}
