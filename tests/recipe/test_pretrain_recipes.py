"""The shipped recipes of `dp-peft pretrain`: the nets of the papers, and one update of a tiny stand-in for each."""

import dataclasses
import json

import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.pretraining import codes, folder, image_codes, pretrain
from dp_peft_diffusion.pretraining.characters import TURNS
from dp_peft_diffusion.pretraining.networks import (
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_text_unet,
    build_unet,
)
from dp_peft_diffusion.pretraining.vocabulary import make_tokenizer
from dp_peft_diffusion.recipe import load_pretrain_recipe, recipe_path
from dp_peft_diffusion.strict_yaml import read_table
from dp_peft_diffusion.typed_fields import options

AUTOENCODERS = {
    "emnist-letters-vae": 102_548_925,
    "handwriting-captions-vae": 173_421,
    "imagenet32-vae": 14_639_807,
    "imagenet64-vae": 29_935_359,
}
# name -> (input side, input channels, rows of the class table, weights)
UNETS = {
    "handwriting": (16, 4, 8 * 242 + 1 + 64, 1_950_660),
    "emnist-letters": (4, 3, 26 + 1 + 64, 3_366_723),
    "imagenet32": (16, 3, 1000 + 1 + 64, 70_988_291),
    "imagenet64": (32, 3, None, 72_171_779),
    "imagenet32-pixel": (32, 3, 1000 + 1 + 64, 86_958_147),
}
# Alphabet -> characters, of the data that the recipes of handwriting name.
OMNIGLOT = {
    "Balinese": 24, "Early Aramaic": 22, "Greek": 24, "Japanese katakana": 47, "Korean": 40, "Latin": 26,
    "Sanskrit": 42, "Tagalog": 17,
}  # fmt: skip
OF_A_FILE = {"_name_or_path": None, "_diffusers_version": None}  # says nothing of the net
CODES = ("handwriting-codes", "handwriting-codes-features", "handwriting-features-wide")
NAMES = sorted([*AUTOENCODERS, *UNETS, *CODES, "handwriting-captions", "handwriting-features"])


def shipped(name, **changes):
    return load_pretrain_recipe(recipe_path(name), {"dataset_name": "x", **changes})


def meta_unet(name):
    side, channels, rows, _ = UNETS[name]
    with torch.device("meta"):
        return build_unet(shipped(name), side, channels, rows)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def in_attention(net):
    return count(value for name, value in net.named_parameters() if ".attentions." in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_its_command_warns_and_names_every_key(name):
    path = recipe_path(name)
    text = path.read_text()
    assert text.startswith(f"# dp-peft pretrain --recipe {name} --dataset_name PATH_TO_")
    assert "# NOT private" in text and "\n# Status: " in text and "\n# Cost: " in text
    table, recipe = read_table(path), shipped(name)
    assert set(table) == {spec.name for _, spec, _ in options(recipe)} - {"dataset_name"}
    for _, spec, _ in options(recipe):
        assert spec.name == "dataset_name" or f"  # {spec.metadata['help']}\n" in text


@pytest.mark.parametrize("name", sorted(UNETS))
def test_the_unet_has_the_size_that_its_recipe_says(name):
    assert count(meta_unet(name).parameters()) == UNETS[name][3]
    assert name == "handwriting" or f"{UNETS[name][3]:,} weights" in recipe_path(name).read_text()


def test_the_recipe_of_handwriting_describes_the_shipped_base():
    base = load_base("builtin:handwriting")
    pairs = (meta_unet("handwriting"), base.unet), (build_scheduler(shipped("handwriting")), base.scheduler)
    for made, there in pairs:
        assert {**json.loads(there.to_json_string()), **OF_A_FILE} == {**json.loads(made.to_json_string()), **OF_A_FILE}


def test_the_nets_of_captions_have_the_sizes_that_their_recipe_says():
    recipe, text = shipped("handwriting-captions"), recipe_path("handwriting-captions").read_text()
    upright = [f"{name} character{n:02}" for name, last in OMNIGLOT.items() for n in range(1, last + 1)]
    captions = [caption + mirror + turn for caption in upright for mirror in ("", ", mirrored") for turn in TURNS]
    tokenizer = make_tokenizer(captions, recipe.spare_words, recipe.text_tokens)
    with torch.device("meta"):
        unet = build_text_unet(recipe, 8, shipped("handwriting-captions-vae").latent_channels)
        encoder = build_text_encoder(recipe, tokenizer)
    assert f"{count(unet.parameters()):,} weights of the UNet" in text
    assert f"{count(encoder.parameters()):,} of the text encoder" in text
    weights = count(unet.parameters()) + count(encoder.parameters()) + AUTOENCODERS["handwriting-captions-vae"]
    assert 4 * weights < 12e6  # bytes


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_the_autoencoder_has_the_size_that_its_recipe_says(name):
    with torch.device("meta"):
        net = build_autoencoder(shipped(name))
    assert count(net.parameters()) == AUTOENCODERS[name]
    assert f"{AUTOENCODERS[name]:,} weights" in recipe_path(name).read_text()


def test_the_unet_of_celeba_64_is_that_of_the_released_code():
    """72.2M weights, of which DP-LDM trains 7.96M; DP-LoRA's 0.47M are 479,232 on fused projections of rank 16."""
    net = meta_unet("imagenet64")
    assert round(count(net.parameters()) / 1e6, 1) == 72.2 and round(in_attention(net) / 1e6, 2) == 7.96
    widths = [layer.inner_dim for layer in net.modules() if isinstance(layer, Attention)]
    assert sum(widths) == 4992
    fused_qkv_and_proj_out, separate = 16 * (1 + 3) + 16 * (1 + 1), 12 * 4 * (1 + 1)
    assert fused_qkv_and_proj_out * sum(widths) == separate * sum(widths) == 479_232


def test_the_unets_of_classes_are_smaller_than_the_released_ones_by_their_transformer_blocks():
    """Released: 90.3M and 4.61M, whose attention blocks have a feed-forward net and cross-attention to the class."""
    for name, released in {"imagenet32": 90.3, "emnist-letters": 4.61}.items():
        net = meta_unet(name)
        layers = [layer for layer in net.modules() if isinstance(layer, Attention)]
        context = 512 if name == "imagenet32" else 5
        # GEGLU to 4 widths and back; q and out, k and v of the class; three layer norms; two 1x1 convolutions around.
        more = sum(
            (8 * c * c + 8 * c) + (4 * c * c + c) + (2 * c * c + c) + 2 * c * context + 6 * c + 2 * (c * c + c)
            for c in (layer.inner_dim for layer in layers)
        )
        classes = net.class_embedding.weight.numel()
        digits = len(str(released).partition(".")[2])
        assert round((count(net.parameters()) + more - classes) / 1e6, digits) == released


def test_the_pixel_unet_has_more_than_80_million_weights():
    assert count(meta_unet("imagenet32-pixel").parameters()) > 80e6


@pytest.fixture
def images(tmp_path):
    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for copy in range(2):
            picture = Image.new("L", (16, 16), 255)
            picture.paste(40 * copy, (2, 3, 9 + copy, 9))
            picture.save(tmp_path / "images" / kind / f"{copy}.png")
    return str(tmp_path / "images")


def stand_in(name, images, **changes):
    """The recipe with narrow levels on tiny images, for one update."""
    recipe = shipped(name)
    widths = tuple(2 * width // recipe.block_out_channels[0] * 4 for width in recipe.block_out_channels)
    return dataclasses.replace(
        recipe, dataset_name=images, resolution=16, block_out_channels=widths, layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, train_batch_size=2, max_train_steps=1, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "handwriting", "handwriting-captions", "handwriting-codes", "imagenet32-pixel", "emnist-letters", "imagenet32",
        "imagenet64",
    ],
)  # fmt: skip
def test_one_update_of_a_tiny_stand_in_makes_a_base(name, images, tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "IMAGES_FOR_CODES", 64)
    monkeypatch.setattr(image_codes, "BATCHES_FOR_CODES", 4)
    for module in (folder, image_codes):
        monkeypatch.setattr(
            module, "sample_images", lambda *_, num_images, **__: torch.zeros(num_images, 1, 16, 16).byte()
        )
    changes = {"class_code_rank": 4} if name.startswith("handwriting") else {}
    if shipped(name).vae is not None:  # its autoencoder first, in the folder that the recipe names
        monkeypatch.chdir(tmp_path)
        pretrain(stand_in(f"{name}-vae", images), tmp_path / "runs" / f"{name}-vae")
    if shipped(name).features is not None:  # its feature net first, of smaller images
        FeatureNet(resolution=16, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "features")
        changes["features"] = str(tmp_path / "features")
    base = load_base(str(pretrain(stand_in(name, images, **changes), tmp_path / "out")))
    assert base.resolution == 16 and base.is_latent == (shipped(name).vae is not None)
    assert (base.num_class_embeds is None) == (name in ("imagenet64", "handwriting-captions"))
    grey = ("handwriting", "handwriting-captions", "handwriting-codes", "emnist-letters")
    assert base.image_channels == (1 if name in grey else 3) and (base.codes is None) == (name != "handwriting-codes")
