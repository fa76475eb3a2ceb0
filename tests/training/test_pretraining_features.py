"""`--kind features`: what is trained, what it leaves behind, and the net that ships."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.features import open_features
from dp_peft_diffusion.pretraining import loop, pretrain
from dp_peft_diffusion.pretraining.checkpoints import write_checkpoint
from dp_peft_diffusion.pretraining.features import Recognition
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES
from dp_peft_diffusion.recipe import PretrainRecipe, load_pretrain_recipe, recipe_path, validate


@pytest.fixture
def recipe(tmp_path):
    """Stripes that lie or stand, in colour and noise."""
    generator = np.random.default_rng(0)
    for kind in (0, 1):
        (tmp_path / "stripes" / str(kind)).mkdir(parents=True)
        for copy in range(8):
            pixels = generator.integers(0, 100, (16, 16, 3))
            pixels[2 * generator.integers(0, 2) :: 4] += 100
            pixels = pixels.transpose(1, 0, 2) if kind else pixels
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "stripes" / str(kind) / f"{copy}.png")
    return PretrainRecipe(
        kind="features", dataset_name=str(tmp_path / "stripes"), resolution=16, block_out_channels=(8, 12),
        layers_per_block=1, norm_num_groups=4, train_batch_size=16, max_train_steps=30, lr_warmup_steps=2,
        learning_rate=0.01, ema_decay=0.5,
    )  # fmt: skip


def test_the_features_of_classes_come_to_differ(recipe, tmp_path):
    features = open_features(str(pretrain(validate(recipe), tmp_path / "out")))
    files = sorted((tmp_path / "stripes").rglob("*.png"))
    found = features(np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]))
    lying, standing = found[:8], found[8:]
    between = np.linalg.norm(lying.mean(axis=0) - standing.mean(axis=0))
    assert features.name.startswith("stripes-") and between > 2 * np.linalg.norm(lying.std(axis=0))


def test_the_folder_says_that_it_is_not_private_and_not_where_the_images_lay(recipe, tmp_path):
    folder = pretrain(dataclasses.replace(recipe, max_train_steps=1), tmp_path / "out")
    assert folder == tmp_path / "out" / "features"
    text = (folder / "README.md").read_text()
    assert "NOT private" in text and "none of them is an FID" in text
    assert not any(str(tmp_path) in path.read_text() for path in (folder / "README.md", folder / "config.json"))


def test_the_last_layer_that_knows_the_classes_is_left_out(recipe, tmp_path):
    task = Recognition(recipe, torch.device("cpu"))
    weights = {name: value.clone() for name, value in task.trained.state_dict().items()}
    task.export(weights, tmp_path)
    kept = FeatureNet.from_pretrained(tmp_path / "features").state_dict()
    assert {f"net.{name}" for name in kept} | {"head.weight", "head.bias"} == set(weights)
    assert all(torch.equal(value, weights[f"net.{name}"]) for name, value in kept.items())


def test_an_interrupted_pretraining_of_features_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, max_train_steps=4, checkpointing_steps=2)
    whole = next(pretrain(recipe, tmp_path / "whole").glob("*.safetensors")).read_bytes()

    def stop(*arguments):
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "halves")
    assert next((tmp_path / "halves" / "features").glob("*.safetensors")).read_bytes() != whole
    assert next(pretrain(recipe, tmp_path / "halves").glob("*.safetensors")).read_bytes() == whole


def test_features_need_classes(recipe):
    with pytest.raises(UserError, match="--label_column"):
        validate(dataclasses.replace(recipe, label_column=None))


@pytest.mark.parametrize("name", ["handwriting-features", "handwriting-features-wide"])
def test_a_recipe_of_features_describes_the_net_that_ships(name):
    recipe = load_pretrain_recipe(recipe_path(name), {"dataset_name": "x"})
    folder = BUILTIN_BASES / name.replace("-", "_")
    settings = json.loads((folder / "config.json").read_text())
    for option in ("resolution", "image_channels", "pixel_packing", "layers_per_block", "norm_num_groups"):
        assert settings[option] == getattr(recipe, option)
    assert tuple(settings["block_out_channels"]) == recipe.block_out_channels and recipe.characters and recipe.invert
    net = FeatureNet.from_pretrained(folder)
    assert f"{sum(p.numel() for p in net.parameters()):,}\n# weights" in recipe_path(name).read_text()
