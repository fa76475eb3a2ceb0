"""Features of images, by name: of Inception, of CLIP, of the net for handwriting that ships, or of one's own net."""

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from transformers import CLIPVisionModelWithProjection
from transformers.utils import logging

from dp_peft_diffusion.diffusion.base_folder import read_settings
from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES
from dp_peft_diffusion.privacy.untrusted import MODEL_WEIGHTS

BATCH = 100
HANDWRITING = BUILTIN_BASES / "handwriting_features"
# The file that clean-fid fetches, 95,607,719 bytes. Its digest stands in k-diffusion's evaluation.py, too.
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLIP, CLIP_REVISION = "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_SIDE = 224
OFFLINE = "type --features handwriting, which comes with the package"
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL makes grey of colour


@dataclass(frozen=True)
class Features:
    """A net that gives features of images.

    Attributes:
        name: what distances in these features are named after.
        is_inception: whether they may be called FID and KID.
        extract: images (b, c, h, w) uint8 -> features (b, d).
    """

    name: str
    is_inception: bool
    extract: Callable[[np.ndarray], torch.Tensor]

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (n, d) float64 of images (n, c, h, w) uint8, grey or colour, of any size. No image sees another.

        Raises:
            UserError: images of neither one nor three channels, none at all, or features that are no numbers.
        """
        if len(images) == 0 or images.shape[1] not in (1, 3):
            raise UserError(f"images of shape {images.shape} have no features: they must be some, grey or colour.")
        starts = range(0, len(images), BATCH)
        parts = [self.extract(images[start : start + BATCH].copy()) for start in starts]
        features = torch.cat([part.cpu() for part in parts]).double().numpy()
        if not np.isfinite(features).all():
            raise UserError(f"the features {self.name!r} of some images are no finite numbers. Restore the net's file.")
        return features


def open_features(name: str, device: str = "cpu") -> Features:
    """The features `inception`, `clip` or `handwriting`, or those in a folder of `dp-peft pretrain --kind features`.

    Raises:
        UserError: there are none of that name, or their weights are not here and cannot be fetched.
    """
    if name == "inception":
        return _open_inception(device)
    if name == "clip":
        return _open_clip(device)
    if name == "handwriting":
        return _open_net(HANDWRITING, name, device)
    if not Path(name).is_dir():
        raise UserError(
            f"--features {name!r}: no such folder. There are inception, clip and handwriting, and folders made by "
            "dp-peft pretrain --kind features."
        )
    return _open_net(Path(name), None, device)


def cache_folder() -> Path:
    """Where fetched weights lie: $XDG_CACHE_HOME/dp-peft, by default ~/.cache/dp-peft."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "dp-peft"


def fetch_inception() -> Path:
    """The file of Inception's weights, in this user's cache; fetched if it is not there.

    clean-fid 0.1.35 keeps it in /tmp under a name that everybody knows, and whoever uses the machine can put another
    program there first: TorchScript is code. So it lies in a folder of this user alone, and is read only if it is the
    published file to the last byte.

    Raises:
        UserError: it is another file, or there is none and it cannot be fetched.
    """
    path = cache_folder() / INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            torch.hub.download_url_to_file(inception_url, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: of a file with another digest
            raise UserError(
                f"--features inception: its weights are not here, and could not be fetched from {inception_url}: "
                f"{error}. Get that file elsewhere and put it at {path}, or {OFFLINE}."
            ) from error
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != INCEPTION_SHA256:
        raise UserError(
            f"{path} is not the published file: its SHA-256 is {found}, and that of {inception_url} is "
            f"{INCEPTION_SHA256}. Delete it and try again, or {OFFLINE}."
        )
    return path


def _open_inception(device: str) -> Features:
    """The 2048 features of FID, from images resized by clean-fid's "clean" method."""
    folder = str(fetch_inception().parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15: torch.jit.load will go, and clean-fid calls it
        net = InceptionV3W(folder, download=False, resize_inside=False).to(device).eval()
    resize = build_resizer("clean")

    def extract(images: np.ndarray) -> torch.Tensor:
        resized = np.stack([resize(image.transpose(1, 2, 0)) for image in _in_colour(images)])
        return net(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device))

    return Features("inception", True, extract)


def _open_clip(device: str) -> Features:
    """The 512 image embeddings of CLIP ViT-B/32, from images prepared as clean-fid prepares them for its CLIP-FID.

    clean-fid itself wants the package `clip` of github.com/openai/CLIP, which is not on PyPI; transformers has the same
    net.
    """
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of the text half, which is not asked for
    try:
        net, report = CLIPVisionModelWithProjection.from_pretrained(
            CLIP, revision=CLIP_REVISION, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # HTTPError: a proxy, among others
        raise UserError(
            f"--features clip: {CLIP} is not here, and could not be read from the Hub: {error}. Type `hf download "
            f"{CLIP} --revision {CLIP_REVISION}` where there is a network and copy the Hub's cache here, or {OFFLINE}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:  # transformers only warns of it, and draws them at random
        raise UserError(f"--features clip: {CLIP} lacks weights: {sorted(report['missing_keys'])[:4]}. Fetch it again.")
    net = net.to(device).eval()
    resize = v2.Compose([v2.Resize(CLIP_SIDE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(CLIP_SIDE)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def extract(images: np.ndarray) -> torch.Tensor:
        resized = [np.asarray(resize(Image.fromarray(image.transpose(1, 2, 0)))) for image in _in_colour(images)]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        return net(((pixels - mean) / std).to(device)).image_embeds

    return Features("clip", False, extract)


def _open_net(folder: Path, name: str | None, device: str) -> Features:
    """The features of a net of ours; by its training images and its file, if it has no name."""
    if (read_settings(folder / "config.json") or {}).get("_class_name") != FeatureNet.__name__:
        raise UserError(f"--features {str(folder)!r} holds no net made by dp-peft pretrain --kind features.")
    try:
        net, report = FeatureNet.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        digest = hashlib.sha256((folder / MODEL_WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--features {str(folder)!r} could not be opened: {error}. Restore the folder.") from error
    if report["missing_keys"]:  # diffusers only warns of it
        raise UserError(f"--features {str(folder)!r} lacks weights: {sorted(report['missing_keys'])[:4]}.")
    net = net.float().to(device).eval()
    trained_on = re.sub(r"[^A-Za-z0-9.]+", "-", str(net.config.trained_on)).strip("-")[:40]
    side, channels = net.config.resolution, net.config.image_channels

    def extract(images: np.ndarray) -> torch.Tensor:
        wanted = _in_colour(images) if channels == 3 else _in_grey(images)
        pixels = torch.from_numpy(wanted).to(device).float()
        return net(_to_side(pixels, side) / 127.5 - 1)

    return Features(name or f"{trained_on}-{digest[:8]}", False, extract)


def _to_side(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images (b, c, side, side): stretched, and smoothed where they shrink."""
    if images.shape[2:] == (side, side):
        return images
    return nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def _in_colour(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images


def _in_grey(images: np.ndarray) -> np.ndarray:
    return images if images.shape[1] == 1 else np.einsum("bchw,c->bhw", images, LUMA)[:, None]
