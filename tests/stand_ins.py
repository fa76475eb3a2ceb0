"""Small stand-ins for what the documentation names: images, bases, runs, keys and a Hub, made once and copied.

A name that no function here knows is nowhere, so a command that needs it fails.
"""

import functools
import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from diffusers import DDPMScheduler
from PIL import Image
from tiny_bases import latent, pixel_codes, stable_diffusion_1, stable_diffusion_xl, tiny_autoencoder, tiny_unet2d
from tiny_models import tiny_image_folder

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.diffusion import base_folder, base_model
from dp_peft_diffusion.diffusion.base_model import BaseLayout, save_base
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining import codes, image_codes
from dp_peft_diffusion.pretraining import folder as pretraining_folder
from dp_peft_diffusion.privacy import adapter_files
from dp_peft_diffusion.sharing import hub

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef" * 2 + "01234567"
HUB_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB_ADAPTER = "some-owner/some-adapter"
# What the pages train, sample and test in minutes and hours, here in a second; a later option stands over an earlier.
SHORTER = {
    "train": "--max_train_steps 1 --lr_warmup_steps 0 --noise_multiplicity 1 --train_batch_size 10"
    " --micro_batch_size 10 --skip_self_check --clipping automatic --gamma 0.01 --sample_num_images 2"
    " --sample_num_inference_steps 1",
    "pretrain": "--max_train_steps 1 --lr_warmup_steps 0 --train_batch_size 2 --resolution 16 --block_out_channels 8,16"
    " --layers_per_block 1 --norm_num_groups 4 --attention_head_dim 8 --attention_levels 1",
    "sample": "--num_images 2 --num_inference_steps 1",
    "evaluate": "--num_images 20 --num_inference_steps 1 --num_seeds 1 --epochs 1",
    "bench": "--methods floor,ours --memory_format contiguous --rounds 1 --repeats 1 --batch_size 2 --logical_batch 2",
    "plan": "--train_batch_size 60000 --max_train_steps 100",
}


# The same, for what knows codes: no gradient of it is clipped automatically, and small nets have few features.
OF_CODES = {
    "mnist-codes": "--clipping flat --gamma none",
    "handwriting-codes": "--class_code_rank 8",
}


def shortened(line: str) -> list[str]:
    """The words of a documented command after `dp-peft`, with the options of `SHORTER`.

    A command's bare name in a sentence stands for the command: its help is asked for.
    """
    words = shlex.split(line, comments=True)[1:]
    if len(words) == 1 and words[0] not in ("env", "recipes", "spent"):
        return [*words, "--help"]
    meant = {"COMMAND": "train", "NAME": "digits"}
    words = [meant.get(word, word).replace("PATH_TO_YOUR_IMAGES", "path/to/images") for word in words]
    more = [option for name, option in OF_CODES.items() if name in words]
    return words + shlex.split(" ".join([SHORTER.get(words[0], ""), *more]))


def type_in(line: str) -> Result:
    """Run a documented command here, shortened."""
    return CliRunner().invoke(main, shortened(line), prog_name="dp-peft")


def made(line: str) -> None:
    """Run a command that makes a stand-in."""
    result = type_in(line)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


class StandIns:
    """What may be put into a workplace, by the name that a page gives it; made when first asked for."""

    def __init__(self, place: Path):
        self.place = place

    def put(self, name: str, workplace: Path, with_captions: bool = False) -> None:
        """Put the stand-in of that name, if there is one, into the workplace; images with captions if need be."""
        source = self.of(name)
        if source is None:
            return
        target = workplace / name.replace("PATH_TO_YOUR_IMAGES", "path/to/images")
        if with_captions and source == self.images:
            source = self.captioned_folder
        if source == self.own_recipe:
            self.put("path/to/images", workplace)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def of(self, name: str) -> Path | None:
        """What stands for a name."""
        if name.startswith("adapters/"):
            return ROOT / name
        places = {
            "path/to/images": "images",
            "path/to/images.parquet": "captioned",
            "PATH_TO_YOUR_IMAGES": "images",  # which `shortened` calls by the name above: this one is refused
            "PATH_TO_YOUR_IMAGES.parquet": "captioned",
            "PATH_TO_PUBLIC_IMAGES": "images",
            "PATH_TO_HELD_OUT_IMAGES": "held_out_images",
            "PATH_TO_OMNIGLOT": "images",
            "PATH_TO_AUTOENCODER": "autoencoder",
            "data/mnist": "images",
            "PATH_TO_CIFAR10": "images",
            "scans": "scans",
            "scans.parquet": "captioned",
            "prompts.txt": "prompts",
            "mine.yaml": "own_recipe",
            "my-recipe.yaml": "own_recipe",
            "PATH_TO_BASE": "text_base",
            "PATH_TO_ANOTHER_BASE": "other_text_base",
            "FOLDER_OF_THE_BASE": "text_base",
            "runs/imagenet64-vae": "autoencoder",
            "runs/imagenet64-base/base": "latent_base",
            "runs/emnist-letters-base/base": "latent_base",
            "runs/mine": "text_run",
            "runs/theirs": "text_run",
            "runs/other": "text_run",
            "FOLDER": "text_run",
            "merged": "merged",
            "runs/mine-samples": "text_samples",
            "runs/digits-eps1": "digits_run",
            "runs/digits-eps1-0": "digits_run",
            "runs/digits-eps1-0-samples": "digits_samples",
            "runs/mnist-eps1": "codes_run",
            "runs/mnist-eps1-samples": "codes_samples",
            "runs/cifar10-eps10": "codes_run",
            "privacy.json": "certificate",
            "runs/first/privacy.json": "certificate",
        }
        return getattr(self, places[name]) if name in places else None

    @functools.cached_property
    def images(self) -> Path:
        """Two classes of five images."""
        return tiny_image_folder(self.place / "images", {"ill": 60, "healthy": 190}, 5)

    @functools.cached_property
    def held_out_images(self) -> Path:
        """As many others of the same classes."""
        return tiny_image_folder(self.place / "held-out", {"ill": 70, "healthy": 180}, 5)

    @functools.cached_property
    def scans(self) -> Path:
        """The three files that a page puts into a parquet file."""
        folder = self.place / "scans"
        folder.mkdir()
        for name in ("ann-1", "ann-2", "bob-1"):
            shutil.copy(self.images / "ill" / "0.png", folder / f"{name}.png")
        return folder

    @functools.cached_property
    def captioned(self) -> Path:
        """Ten images with captions, labels and owners, as parquet."""
        rng, rows = np.random.default_rng(0), []
        for index in range(10):
            encoded = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(encoded, "png")
            told = {"text": f"a scan {index}", "label": ["healthy", "ill"][index % 2], "patient": f"p{index // 2}"}
            rows.append({"image": {"bytes": encoded.getvalue(), "path": None}, **told})
        pq.write_table(pa.Table.from_pylist(rows), self.place / "captioned.parquet")
        return self.place / "captioned.parquet"

    @functools.cached_property
    def captioned_folder(self) -> Path:
        """The images with captions, as an image folder has them."""
        folder = shutil.copytree(self.images, self.place / "captioned_folder")
        lines = [{"file_name": str(path.relative_to(folder)), "text": "a scan"} for path in folder.rglob("*.png")]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    @functools.cached_property
    def prompts(self) -> Path:
        """Two prompts."""
        (self.place / "prompts.txt").write_text("a photo of a cat\n\na photo of a dog\n")
        return self.place / "prompts.txt"

    @functools.cached_property
    def own_recipe(self) -> Path:
        """A recipe file: the one of digits, for other images."""
        text = (ROOT / "recipes" / "digits.yaml").read_text()
        (self.place / "own.yaml").write_text(text.replace("builtin:digits  #", "path/to/images  #"))
        return self.place / "own.yaml"

    @functools.cached_property
    def builtin_bases(self) -> Path:
        """A tiny base under the name of each built-in one; those that read text are Stable Diffusion's kind."""
        folder = self.place / "builtin"
        layout = BaseLayout(pixel_packing=2, null_class=20, spare_classes=(21, 60), class_code_rank=16)
        for real in (path.parent for path in base_model.BUILTIN_BASES.glob("*/scheduler")):
            if (real / "text_encoder").is_dir():
                stable_diffusion_1(folder / real.name)
            elif (real / "encoder").is_dir():
                pixel_codes(folder / real.name)
            else:
                save_base(folder / real.name, tiny_unet2d(4, 60), DDPMScheduler(), layout)
        return folder

    @functools.cached_property
    def text_base(self) -> Path:
        """A base of Stable Diffusion's kind, where huggingface_hub would put it."""
        return stable_diffusion_1(self.place / "sd" / "snapshots" / COMMIT)

    @functools.cached_property
    def other_text_base(self) -> Path:
        """The same with other weights."""
        folder = shutil.copytree(self.text_base, self.place / "other")
        unet = base_model.load_base(str(folder)).unet
        unet.conv_out.bias.data += 0.01
        unet.save_pretrained(folder / "unet")
        return folder

    @functools.cached_property
    def xl_base(self) -> Path:
        """A base of Stable Diffusion XL's kind."""
        return stable_diffusion_xl(self.place / "xl" / "snapshots" / COMMIT)

    @functools.cached_property
    def latent_base(self) -> Path:
        """A base on latents."""
        return latent(self.place / "latent")

    @functools.cached_property
    def autoencoder(self) -> Path:
        """What `dp-peft pretrain` leaves of an autoencoder."""
        tiny_autoencoder().save_pretrained(self.place / "autoencoder" / "vae")
        return self.place / "autoencoder"

    @functools.cached_property
    def text_run(self) -> Path:
        """A run on a base of the Hub, by the command of the README."""
        base, folder = f"--pretrained_model_name_or_path {HUB_BASE}", self.place / "text_run"
        made(f"dp-peft train {base} --dataset_name {self.images} --epsilon 8 --output_dir {folder}")
        return folder

    @functools.cached_property
    def digits_run(self) -> Path:
        """A run on the built-in base."""
        made(f"dp-peft train --adapter lora --epsilon 1 --output_dir {self.place / 'digits_run'}")
        return self.place / "digits_run"

    @functools.cached_property
    def merged(self) -> Path:
        """A base with an adapter merged into it."""
        made(f"dp-peft merge --adapter {self.text_run} --output_dir {self.place / 'merged'}")
        return self.place / "merged"

    @functools.cached_property
    def text_samples(self) -> Path:
        """Images sampled from it, some of each class."""
        made(f"dp-peft sample --adapter {self.text_run} --output_dir {self.place / 'text_samples'}")
        return self.place / "text_samples"

    @functools.cached_property
    def digits_samples(self) -> Path:
        """The same of the digits."""
        made(f"dp-peft sample --adapter {self.digits_run} --output_dir {self.place / 'digits_samples'}")
        return self.place / "digits_samples"

    @functools.cached_property
    def codes_run(self) -> Path:
        """A run whose classes have many rows each."""
        made(f"dp-peft train --recipe mnist-codes --dataset_name {self.images} --output_dir {self.place / 'codes_run'}")
        return self.place / "codes_run"

    @functools.cached_property
    def codes_samples(self) -> Path:
        """Images sampled from it, some of each class."""
        made(f"dp-peft sample --adapter {self.codes_run} --output_dir {self.place / 'codes_samples'}")
        return self.place / "codes_samples"

    @functools.cached_property
    def certificate(self) -> Path:
        """The certificate of an earlier release."""
        made(f"dp-peft train --dataset_name {self.images} --epsilon 8 --output_dir {self.place / 'earlier'}")
        return self.place / "earlier" / "privacy.json"

    @functools.cached_property
    def hub_adapter(self) -> Path:
        """What is on the Hub under `HUB_ADAPTER`."""
        return shutil.copytree(self.text_run, self.place / "hub" / "snapshots" / COMMIT)


class NoHub:
    """As much of `HfApi` as a push asks for; nothing is sent."""

    sent: list[str] = []

    def __init__(self, token: str | None = None):
        self.siblings: list[object] = []
        self.private = True

    def create_repo(self, repo: str, **_: object) -> None:
        """Make no repository."""

    def model_info(self, repo: str, **_: object) -> "NoHub":
        """An empty private repository."""
        return self

    def create_commit(self, repo: str, operations: list, **_: object) -> "NoHub":
        """Note the files of the commit."""
        NoHub.sent = [operation.path_in_repo for operation in operations]
        self.commit_url = f"https://example.org/{repo}"
        return self


def lead_to_stand_ins(patch: pytest.MonkeyPatch, stand_ins: StandIns, builtin: bool = True) -> None:
    """Names of the Hub lead to stand-ins, and so do built-in bases, unless `builtin` is false.

    Pretraining does what no option can shorten, looking for codes and drawing a grid, on few images in one step.
    """

    def fetch_base(name: str, **_: object) -> str:
        return str(stand_ins.xl_base if "xl" in name else stand_ins.text_base)

    def fetch_adapter(repo: str, revision: str | None = None) -> Path:
        if repo != HUB_ADAPTER:
            raise UserError(f"{repo} is not on the Hub of the tests.")
        return stand_ins.hub_adapter

    patch.setattr(base_folder, "snapshot_download", fetch_base)
    patch.setattr(hub, "fetch", fetch_adapter)
    patch.setattr(hub, "HfApi", NoHub)
    patch.setattr(hub, "get_token", lambda: "a token")
    patch.setattr(codes, "IMAGES_FOR_CODES", 256)
    patch.setattr(image_codes, "sample_images", functools.partial(sample_images, num_inference_steps=1))
    patch.setattr(pretraining_folder, "sample_images", functools.partial(sample_images, num_inference_steps=1))
    if builtin:
        for module in (base_folder, base_model, adapter_files):
            patch.setattr(module, "BUILTIN_BASES", stand_ins.builtin_bases)
