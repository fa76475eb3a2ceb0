"""`--kind codes`: what trains, what stays as it was, and the base that it leaves behind."""

import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_bases import public_images

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.diffusion.image_codes import ENCODER
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining import folder, image_codes, loop, pretrain
from dp_peft_diffusion.pretraining.checkpoints import write_checkpoint
from dp_peft_diffusion.pretraining.image_codes import Codes, make_encoder
from dp_peft_diffusion.recipe import PretrainRecipe, load_pretrain_recipe, recipe_path, validate

UNET = "unet/diffusion_pytorch_model.safetensors"
RECIPES = ("handwriting-codes", "handwriting-codes-features")
CODES = f"{ENCODER}/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Public images and a net of 8 features, as `--kind features` leaves it."""
    place = tmp_path_factory.mktemp("public")
    (place / "images").mkdir()
    for number, pixels in enumerate(public_images(12)):
        picture = pixels[0].add(1).mul(127.5).byte().numpy()
        Image.fromarray(picture).save(place / "images" / f"{number}.png")
    torch.manual_seed(0)
    shape = dict(resolution=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, trained_on="stripes")
    FeatureNet(**shape).save_pretrained(place / "features")
    return place


@pytest.fixture
def recipe(place, monkeypatch):
    """Three updates. Grids are tested elsewhere, and so are the many images that codes are taken from."""
    monkeypatch.setattr(image_codes, "BATCHES_FOR_CODES", 10)
    for module in (folder, image_codes):
        monkeypatch.setattr(
            module, "sample_images", lambda *_, num_images, **__: torch.zeros(num_images, 1, 16, 16).byte()
        )
    return PretrainRecipe(
        kind="codes", dataset_name=str(place / "images"), label_column=None, features=str(place / "features"),
        resolution=16, image_channels=1, pixel_packing=2, block_out_channels=(8, 16), layers_per_block=1,
        attention_head_dim=8, norm_num_groups=4, class_code_rank=4, spare_classes=7, train_batch_size=6,
        max_train_steps=3, lr_warmup_steps=1, learning_rate=0.01, ema_decay=0.5, checkpointing_steps=2,
    )  # fmt: skip


def test_it_leaves_a_base_that_is_told_codes(recipe, place, tmp_path):
    written = pretrain(validate(recipe), tmp_path / "out")
    base = load_base(str(written))
    assert base.codes is not None and base.codes.config.code_size == 4
    assert base.layout.null_class == 0 and base.layout.spare_classes == (1, 8) and base.num_class_embeds == 8
    assert not base.unet.class_embedding.weight.any(), "rows are told by codes, and stand in no table"
    codes = base.codes(public_images(5, seed=1))
    assert (codes.norm(dim=1) - 1).abs().max() < 1e-6
    assert base.codes.rows(codes).shape == (5, base.unet.class_embedding.embedding_dim)
    assert "NOT private" in (written / "README.md").read_text() and (tmp_path / "out" / "samples.png").is_file()
    files = [path for path in written.rglob("*.json")]
    assert len(files) >= 4 and not any(str(place) in path.read_text() for path in files)


def test_the_features_stay_and_directions_and_unet_learn(recipe, place, tmp_path):
    task = Codes(recipe, torch.device("cpu"))
    start = {name: value.clone() for name, value in task.trained.state_dict().items()}
    written = pretrain(recipe, tmp_path / "out")
    encoder, features = load_file(written / CODES), FeatureNet.from_pretrained(place / "features").state_dict()
    assert all(torch.equal(encoder[f"features.{name}"], value) for name, value in features.items())
    frozen = {name for name in encoder if torch.equal(encoder[name], start[f"encoder.{name}"])}
    assert frozen == {name for name in encoder if not name.startswith("directions.")}
    unet = load_file(written / UNET)
    moved = {name for name in unet if f"unet.{name}" in start and not torch.equal(unet[name], start[f"unet.{name}"])}
    assert len(moved) > 0.9 * len(unet)


def test_the_averaged_weights_are_those_that_are_written(recipe, tmp_path):
    task = Codes(recipe, torch.device("cpu"))
    averaged = {name: value + 0.01 for name, value in task.trained.state_dict().items()}
    task.export(averaged, tmp_path)
    unet, encoder = load_file(tmp_path / "base" / UNET), load_file(tmp_path / "base" / CODES)
    table = unet.pop("class_embedding.weight")
    assert {f"unet.{name}" for name in unet} | {f"encoder.{name}" for name in encoder} == set(averaged)
    assert all(torch.equal(value, averaged[f"unet.{name}"]) for name, value in unet.items())
    assert all(torch.equal(value, averaged[f"encoder.{name}"]) for name, value in encoder.items())
    assert table.shape[0] == 8 and not table.any()


def test_the_directions_of_codes_are_those_of_many_public_images(recipe, monkeypatch):
    monkeypatch.setattr(image_codes, "BATCHES_FOR_CODES", 3)
    task = Codes(recipe, torch.device("cpu"))
    generator = torch.Generator().manual_seed(recipe.seed)
    images = [task.images.draw(generator)[0] for _ in range(3)]
    again = make_encoder(recipe, task.encoder.config.row_size)
    again.fit(images)
    assert torch.equal(task.encoder.shown.weight, again.shown.weight)
    assert torch.equal(task.encoder.sketch.weight, again.sketch.weight)
    assert (again.shown.out_features, again.sketch.out_features) == (3, 1)


def test_the_unet_is_told_the_code_of_each_image_or_nothing(recipe, monkeypatch):
    """Without noise on codes: the rows that the loss hands over are those of the batch, less those dropped."""
    monkeypatch.setattr(image_codes, "CODE_NOISE", 0.0)
    told = []
    monkeypatch.setattr(
        image_codes, "denoising_loss", lambda *_, class_labels: told.append(class_labels) or class_labels.sum()
    )
    for dropout in (0.0, 0.5):
        task = Codes(dataclasses.replace(recipe, label_dropout=dropout, train_batch_size=40), torch.device("cpu"))
        task.loss(torch.Generator().manual_seed(3))
        images = task.images.draw(torch.Generator().manual_seed(3))[0]
        with torch.no_grad():
            rows = task.encoder.rows(task.encoder(images))
        own, dropped = (told[-1] == rows).all(dim=1), (told[-1] == 0).all(dim=1)
        assert (own | dropped).all() and (5 < dropped.sum() < 35 if dropout else not dropped.any())


def test_noise_on_codes_is_a_share_of_their_length(recipe, monkeypatch):
    told = []
    monkeypatch.setattr(image_codes, "BATCHES_FOR_CODES", 1)
    monkeypatch.setattr(image_codes, "denoising_loss", lambda *_, class_labels: told.append(class_labels) or 0)
    task = Codes(dataclasses.replace(recipe, label_dropout=0.0, train_batch_size=600), torch.device("cpu"))
    task.encoder.rows = lambda codes: codes
    task.loss(torch.Generator().manual_seed(3))
    with torch.no_grad():
        noise = told[0] - task.encoder(task.images.draw(torch.Generator().manual_seed(3))[0])
    assert noise.std().item() == pytest.approx(image_codes.CODE_NOISE / 4**0.5, rel=0.1)  # 2,400 numbers: 7 sigma


def test_an_interrupted_pretraining_of_codes_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch):
    whole = pretrain(recipe, tmp_path / "whole")

    def stop(*arguments):
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "halves")
    halves = tmp_path / "halves" / "base"
    assert (halves / UNET).read_bytes() != (whole / UNET).read_bytes()
    assert pretrain(recipe, tmp_path / "halves") == halves
    for name in (UNET, CODES):
        assert (halves / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("batch", [5, 40])
def test_the_grid_has_32_images_whatever_the_batch(recipe, tmp_path, batch):
    pretrain(dataclasses.replace(recipe, train_batch_size=batch, max_train_steps=1), tmp_path / "out")
    assert min(Image.open(tmp_path / "out" / "samples.png").size) >= 8 * 16


def test_codes_need_a_feature_net(recipe, tmp_path):
    with pytest.raises(UserError, match="--kind codes needs the net .*--features PATH"):
        validate(dataclasses.replace(recipe, features=None))
    with pytest.raises(UserError, match="--features .* belongs to --kind codes"):
        validate(dataclasses.replace(recipe, kind="pixel", class_code_rank=16))
    for name in (str(tmp_path), "builtin:handwriting", "builtin:nothing"):
        with pytest.raises(UserError, match="holds no net made by dp-peft pretrain --kind features"):
            make_encoder(dataclasses.replace(recipe, features=name), 32)


def test_a_feature_net_of_other_images_or_too_few_features_is_refused(recipe):
    with pytest.raises(UserError, match="takes images of .*16.* and the recipe says .*32.* Make them agree"):
        make_encoder(dataclasses.replace(recipe, resolution=32), 32)
    with pytest.raises(UserError, match="'image_channels': 3"):
        make_encoder(dataclasses.replace(recipe, image_channels=3), 32)
    with pytest.raises(UserError, match="--class_code_rank 12: .* has 8. Take 4 to 10."):
        make_encoder(dataclasses.replace(recipe, class_code_rank=12), 32)
    assert make_encoder(dataclasses.replace(recipe, class_code_rank=8), 32).config.code_size == 8


def test_the_net_that_ships_may_be_named(recipe):
    shipped = dataclasses.replace(recipe, features="builtin:handwriting_features", resolution=32)
    encoder = make_encoder(shipped, 32)
    assert encoder.config.resolution == 32 and not any(p.requires_grad for p in encoder.features.parameters())


def test_the_base_that_ships_is_that_of_its_recipes_and_draws_what_it_is_told():
    recipe, of_features = (load_pretrain_recipe(recipe_path(name), {"dataset_name": "x"}) for name in RECIPES)
    base = load_base("builtin:handwriting_codes")
    assert base.codes is not None and base.layout.spare_classes == (1, 1 + recipe.spare_classes)
    assert (base.codes.config.code_size, base.resolution) == (recipe.class_code_rank, recipe.resolution)
    assert tuple(base.unet.config.block_out_channels) == recipe.block_out_channels
    assert tuple(base.codes.config.block_out_channels) == of_features.block_out_channels
    assert not base.unet.class_embedding.weight.any()
    images = torch.full((2, 1, 32, 32), -1.0)
    images[0, :, 6:26, 14:18] = 1.0  # a stroke that stands, and one that lies
    images[1, :, 14:18, 6:26] = 1.0
    base.unet.class_embedding = torch.nn.Identity()
    with torch.no_grad():
        told = {"class_labels": base.codes.rows(base.codes(images)).repeat(4, 1)}
    drawn = sample_images(base, told, num_images=8, seed=0, num_inference_steps=8).float() / 127.5 - 1
    right = [(drawn[i] * images[i % 2]).mean() > (drawn[i] * images[1 - i % 2]).mean() for i in range(8)]
    assert all(right), "strokes stand and lie as they were told"
