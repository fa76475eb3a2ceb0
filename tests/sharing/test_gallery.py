"""The released adapters: each verifies, loads with stock tools, and is paid for together with the others."""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DModel
from peft import PeftModel
from scipy.optimize import brentq
from scipy.stats import norm
from test_documentation import fenced

from dp_peft_diffusion import merge_adapter
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE
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
    assert document["tuning"]["runs"] >= 18 and document["key_source"] == "os"
    images = gallery.folders()[name]["images"]
    same = [other for other in NAMES if gallery.folders()[other]["images"] == images]
    listed = {release["source"] for release in document["other_releases"]}
    for other in same[: same.index(name)]:
        digest = hashlib.sha256((gallery.ADAPTERS / other / "privacy.json").read_bytes()).hexdigest()
        assert f"certificate {digest}" in listed, f"{name} does not list {other}, which is older"


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Of mu-GDP (Dong, Roth and Su 2022, corollary 2.13), to which full-batch Gaussian mechanisms compose."""

    def excess(epsilon):
        return norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2) - delta

    return brentq(excess, 0.0, 100.0)


def test_the_joint_epsilon_of_the_digits_is_that_of_all_their_updates_in_closed_form():
    names = [name for name in NAMES if gallery.folders()[name]["images"] == "digits"]
    mechanisms = [certificate.read(gallery.ADAPTERS / name)["mechanism"] for name in names]
    assert {mechanism["sampling_prob"] for mechanism in mechanisms} == {1.0}
    mu = math.sqrt(sum(mechanism["count"] / mechanism["noise_multiplier"] ** 2 for mechanism in mechanisms))
    joint, delta = gallery.joint_epsilon(names)
    assert gaussian_epsilon(mu, delta) == pytest.approx(joint, rel=2e-3)


def test_releases_that_do_not_know_of_each_other_cost_more_together_than_each():
    pair = ["digits-eps1", "mnist-eps1"]
    joint, _ = gallery.joint_epsilon(pair)
    alone = [certificate.read(gallery.ADAPTERS / name)["guarantee"]["epsilon"] for name in pair]
    assert max(alone) * 1.1 < joint < sum(alone)


def network_of(name):
    """The network of an adapter's base, and made-up inputs of the classes or words that the adapter is for."""
    place = BUILTIN_BASES / certificate.read(gallery.ADAPTERS / name)["base"]["name"].removeprefix("builtin:")
    generator = torch.Generator().manual_seed(0)
    if (place / "model_index.json").is_file():
        told = {"encoder_hidden_states": torch.randn(10, 5, 64, generator=generator)}
        unet = StableDiffusionPipeline.from_pretrained(place, safety_checker=None).unet
    else:
        told = {"class_labels": torch.tensor(read_recipe(gallery.ADAPTERS / name).adapter.class_rows)}
        unet = UNet2DModel.from_pretrained(place, subfolder="unet")
    side, channels = unet.config.sample_size, unet.config.in_channels
    return unet, (torch.randn(10, channels, side, side, generator=generator), torch.full((10,), 500)), told


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_released_adapter_moves_every_class_of_its_base_alike_in_stock_peft_and_merged(name):
    folder = gallery.ADAPTERS / name
    unet, inputs, told = network_of(name)
    before = unet(*inputs, **told).sample
    stock = PeftModel.from_pretrained(unet, folder).eval()(*inputs, **told).sample
    merged = merge_adapter(network_of(name)[0], folder)(*inputs, **told).sample
    assert (stock - merged).abs().max() < 1e-4 * stock.abs().max()
    assert ((stock - before).abs().amax(dim=(1, 2, 3)) > 0.01).all()


@torch.no_grad()
def test_the_captions_adapter_is_the_same_in_the_file_of_diffusers_own_loader():
    unet, inputs, told = network_of("digits-captions-eps3")
    stock = PeftModel.from_pretrained(unet, gallery.ADAPTERS / "digits-captions-eps3").eval()(*inputs, **told).sample
    other, *_ = network_of("digits-captions-eps3")
    other.load_lora_adapter(gallery.ADAPTERS / "digits-captions-eps3", prefix="unet", weight_name=LORA_FILE)
    assert torch.allclose(other.eval()(*inputs, **told).sample, stock, atol=1e-5)


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
