"""The released adapters: each verifies, loads with stock tools, and is paid for together with the others."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from peft import PeftModel
from test_documentation import fenced

from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "scripts"))
import gallery  # noqa: E402

NAMES = list(gallery.folders())
MAX_BYTES = 3_000_000


def test_every_folder_stands_in_the_table_and_every_row_is_a_folder():
    assert sorted(NAMES) == sorted(path.name for path in gallery.ADAPTERS.iterdir() if path.is_dir())


def test_the_tables_of_the_page_are_what_the_certificates_say():
    page = gallery.PAGE.read_text()
    assert gallery.rendered(page) == page, "type: python docs/scripts/gallery.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_released_adapter_verifies_and_is_small_and_whole(name):
    folder = gallery.ADAPTERS / name
    report = verify(folder)
    assert report.ok, report.levels
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MAX_BYTES
    for file in ("README.md", "report.html", "recipe.yaml", "metrics.jsonl"):
        assert (folder / file).is_file()
    assert len(list((folder / "samples").glob("step-*.png"))) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_released_adapter_tells_the_runs_and_the_releases_before_it(name):
    document = certificate.read(gallery.ADAPTERS / name)
    assert document["tuning"] != "undeclared" and document["key_source"] == "os"
    images = gallery.folders()[name]["images"]
    same = [other for other in NAMES if gallery.folders()[other]["images"] == images]
    listed = {release["source"] for release in document["other_releases"]}
    for other in same[: same.index(name)]:
        digest = hashlib.sha256((gallery.ADAPTERS / other / "privacy.json").read_bytes()).hexdigest()
        assert f"certificate {digest}" in listed, f"{name} does not list {other}, which is older"


def test_the_joint_epsilon_of_a_data_set_is_at_least_that_of_each_of_its_files():
    for images in {measured["images"] for measured in gallery.folders().values()}:
        names = [name for name in NAMES if gallery.folders()[name]["images"] == images]
        joint, _ = gallery.joint_epsilon(names)
        priced = [certificate.read(gallery.ADAPTERS / name)["accounting"]["epsilon_priced"] for name in names]
        assert joint >= max(priced) * (1 - 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_released_adapter_loads_with_stock_tools_and_moves_the_base(name):
    folder = gallery.ADAPTERS / name
    place = BUILTIN_BASES / certificate.read(folder)["base"]["name"].removeprefix("builtin:")
    if (place / "model_index.json").is_file():
        unet = StableDiffusionPipeline.from_pretrained(place, safety_checker=None).unet
        told = {"encoder_hidden_states": torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))}
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    else:
        unet = UNet2DModel.from_pretrained(place, subfolder="unet")
        told = {"class_labels": torch.arange(1937, 1947)}
        x = torch.randn(10, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before = unet(x, torch.full((len(x),), 500), **told).sample
    after = PeftModel.from_pretrained(unet, folder).eval()(x, torch.full((len(x),), 500), **told).sample
    assert (after - before).abs().max() > 1e-3


def test_the_worked_example_of_the_page_draws_other_digits_than_the_base(monkeypatch):
    (block,) = (content for language, content in fenced(gallery.PAGE.read_text()) if language == "python")
    block = block.replace("num_inference_steps=25", "num_inference_steps=4")
    monkeypatch.chdir(ROOT)
    drawn = []
    for program in (block, "\n".join(line for line in block.splitlines() if "load_lora_weights" not in line)):
        scope: dict = {}
        exec(program, scope)
        drawn.append(np.stack([np.asarray(image, np.float32) for image in scope["images"]]))
    assert drawn[0].shape == (10, 32, 32) and np.abs(drawn[0] - drawn[1]).mean() > 5
