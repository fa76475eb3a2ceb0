"""Pretraining on public images: what it leaves behind, how it resumes, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_documentation import check_command, command_lines

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.glyphs import CANVAS, DIHEDRAL, augment, crop_glyph
from dp_peft_diffusion.diffusion.objectives import Discrete, Edm
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining import folder, loop, pretrain
from dp_peft_diffusion.pretraining.autoencoder import scaling_factor
from dp_peft_diffusion.pretraining.checkpoints import write_checkpoint
from dp_peft_diffusion.pretraining.denoising import P_MEAN, P_STD, draw_levels
from dp_peft_diffusion.pretraining.handwriting import initial_codes
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import encode
from dp_peft_diffusion.recipe import PretrainRecipe, validate


def glyph(kind):
    """A black character on white, off centre."""
    image = Image.new("L", (60, 60), 255)
    draw = ImageDraw.Draw(image)
    if kind == 0:
        draw.line((10, 10, 10, 40), width=3)
        draw.line((10, 40, 30, 40), width=3)
    else:
        draw.ellipse((20, 20, 50, 45), outline=0, width=3)
    return image


def photograph(kind, copy):
    """A colour gradient, redder in class 0 and bluer in class 1, darker to the left."""
    ramp = np.linspace(40, 160 + 10 * copy, 24, dtype=np.uint8)
    pixels = np.zeros((20, 24, 3), np.uint8)
    pixels[:, :, 2 * kind] = ramp
    return Image.fromarray(pixels)


@pytest.fixture
def handwriting(tmp_path):
    for kind in (0, 1):
        (tmp_path / "letters" / str(kind)).mkdir(parents=True)
        for copy in range(3):
            glyph(kind).save(tmp_path / "letters" / str(kind) / f"{copy}.png")
    return PretrainRecipe(
        kind="handwriting", dataset_name=str(tmp_path / "letters"), image_channels=1, pixel_packing=2, invert=True,
        block_out_channels=(8, 16), class_code_rank=4, spare_classes=5,
        train_batch_size=8, max_train_steps=4, lr_warmup_steps=1,
    )  # fmt: skip


@pytest.fixture
def pixel(tmp_path):
    for kind in (0, 1):
        (tmp_path / "photographs" / f"class-{kind}").mkdir(parents=True)
        for copy in range(4):
            photograph(kind, copy).save(tmp_path / "photographs" / f"class-{kind}" / f"{copy}.png")
    return PretrainRecipe(
        kind="pixel", dataset_name=str(tmp_path / "photographs"), resolution=16, block_out_channels=(8, 16),
        attention_levels=(1,), norm_num_groups=4, random_flip=True, spare_classes=3,
        train_batch_size=4, max_train_steps=4, lr_warmup_steps=1,
    )  # fmt: skip


@pytest.fixture
def autoencoder(pixel):
    return dataclasses.replace(
        pixel, kind="autoencoder", label_column=None, attention_levels=None, block_out_channels=(4, 8)
    )


@pytest.fixture
def no_grid(monkeypatch):
    """Bases are written without 64 samples of each, which take most of the time."""
    blank = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(folder, "sample_images", lambda *_, **__: blank)


def interrupted(monkeypatch):
    """A pretraining that is stopped when it has written a checkpoint."""

    def stop(*arguments):
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_checkpoint", stop)


def weights(made):
    return load_file(next(made.rglob("diffusion_pytorch_model.safetensors")))


def test_a_handwriting_base_loads_and_its_spare_rows_equal_the_null_row(handwriting, tmp_path):
    base = load_base(str(pretrain(handwriting, tmp_path / "out")))
    null = 2 * DIHEDRAL
    assert base.layout.null_class == null and base.layout.spare_classes == (null + 1, null + 6)
    table = base.unet.class_embedding.weight
    assert all(torch.equal(table[row], table[null]) for row in range(null + 1, null + 6))
    assert base.resolution == 32 and base.image_channels == 1
    assert Image.open(tmp_path / "out" / "samples.png").size == (2 * (8 * 33 + 1),) * 2


@pytest.mark.parametrize("kind", ["handwriting", "pixel", "autoencoder"])
def test_an_interrupted_pretraining_resumes_to_the_same_bits(kind, request, tmp_path, monkeypatch, no_grid):
    recipe = dataclasses.replace(request.getfixturevalue(kind), checkpointing_steps=2)
    if kind == "pixel":
        recipe = dataclasses.replace(recipe, dropout=0.2)  # draws of its own, which must be those of the step
    whole = weights(pretrain(recipe, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupted(patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "halves")
    halfway = weights(tmp_path / "halves")
    torch.rand(3)  # what happens in between is no matter
    resumed = weights(pretrain(recipe, tmp_path / "halves"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], halfway[name]) for name in whole)


def test_a_folder_resumes_its_own_recipe_only(pixel, tmp_path):
    loop.claim_folder(tmp_path / "out", pixel)
    loop.claim_folder(tmp_path / "out", pixel)
    with pytest.raises(UserError, match="other options"):
        loop.claim_folder(tmp_path / "out", dataclasses.replace(pixel, block_out_channels=(8, 24)))


def test_the_average_is_that_of_its_formula():
    model, ema = torch.nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[4.0]])}
    for value in (0.0, 8.0):
        torch.nn.init.constant_(model.weight, value)
        loop.average(ema, model, 0.75)
    assert ema["weight"].item() == 0.75 * (0.75 * 4.0) + 0.25 * 8.0


def test_a_base_has_the_averaged_weights_not_the_last(pixel, tmp_path, no_grid):
    made = weights(pretrain(dataclasses.replace(pixel, ema_decay=0.9), tmp_path / "out"))
    kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
    assert torch.equal(made["conv_in.weight"], kept["ema.conv_in.weight"])
    assert not torch.equal(made["conv_in.weight"], kept["model.conv_in.weight"])


def test_a_pixel_base_of_colour_loads_with_stock_diffusers_and_its_spare_rows_equal_the_null_row(pixel, tmp_path):
    pixel = dataclasses.replace(pixel, pixel_packing=2)
    made = pretrain(pixel, tmp_path / "out")
    unet = UNet2DModel.from_pretrained(made, subfolder="unet")
    table = unet.class_embedding.weight
    assert (unet.config.in_channels, unet.config.sample_size, len(table)) == (12, 8, 2 + 1 + 3)
    assert all(torch.equal(table[row], table[2]) for row in (3, 4, 5)) and not torch.equal(table[1], table[2])
    base = load_base(str(made))
    assert (base.layout.null_class, base.layout.spare_classes, base.image_channels) == (2, (3, 6), 3)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loop.make_task(pixel, torch.device("cpu")).encode(images), base.encode(images))
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"


def test_without_labels_there_is_no_class_table(pixel, tmp_path, no_grid):
    made = pretrain(dataclasses.replace(pixel, label_column=None, image_channels=1, max_train_steps=1), tmp_path / "o")
    base = load_base(str(made))
    assert base.num_class_embeds is None and base.layout.null_class is None and base.image_channels == 1


@pytest.mark.parametrize(
    ("prediction_type", "scheduler"),
    [("epsilon", DDPMScheduler), ("v_prediction", DDPMScheduler), ("edm", EDMEulerScheduler)],
)
def test_each_prediction_type_trains_and_is_read_back(prediction_type, scheduler, pixel, tmp_path, no_grid):
    made = pretrain(dataclasses.replace(pixel, prediction_type=prediction_type, max_train_steps=1), tmp_path / "out")
    read = load_base(str(made)).scheduler
    assert isinstance(read, scheduler)
    assert prediction_type == "edm" or read.config.prediction_type == prediction_type


def test_noise_levels_follow_the_schedule():
    generator, n = torch.Generator().manual_seed(0), 40_000
    logs = draw_levels(Edm(0.5), n, generator).log()
    assert logs.shape == (n, 1)
    assert abs(logs.mean() - P_MEAN) < 5 * P_STD / n**0.5 and abs(logs.std() - P_STD) < 5 * P_STD / (2 * n) ** 0.5
    counts = draw_levels(Discrete(torch.ones(10), "epsilon"), n, generator).flatten().bincount()
    assert len(counts) == 10 and ((counts - n / 10) ** 2 / (n / 10)).sum() < 48  # chi-square of 9, p about 3e-7


def test_bf16_trains_to_nearly_the_same_weights(pixel, tmp_path, no_grid):
    recipe = dataclasses.replace(pixel, max_train_steps=2)
    exact = weights(pretrain(recipe, tmp_path / "exact"))
    rounded = weights(pretrain(dataclasses.replace(recipe, mixed_precision="bf16"), tmp_path / "rounded"))
    assert all(value.dtype == torch.float32 for value in rounded.values())
    far = max((exact[name] - rounded[name]).abs().max().item() for name in exact)
    assert 0 < far < 0.02


def test_an_autoencoder_then_a_latent_base_end_in_a_base_that_decodes_to_images(autoencoder, pixel, tmp_path):
    made = pretrain(autoencoder, tmp_path / "first")
    vae = AutoencoderKL.from_pretrained(made).eval()
    scaled = vae.config.scaling_factor * encode(vae, PublicImages(autoencoder).read(torch.arange(8)))
    assert abs(scaled.std().item() - 1) < 1e-4  # of the public images that there are
    grid = Image.open(tmp_path / "first" / "samples.png")
    assert grid.size == (2 * (8 * 17 + 1), 2 * (8 * 17 + 1))  # 32 originals, each above its reconstruction

    latent = dataclasses.replace(pixel, kind="latent", vae=str(tmp_path / "first"), resblock_updown=True)
    base = load_base(str(pretrain(latent, tmp_path / "second")))
    assert base.is_latent and base.input_shape == (3, 8, 8) and base.resolution == 16
    images = PublicImages(pixel).read(torch.tensor([0, 5]))
    assert torch.allclose(base.encode(images), scaled[[0, 5]], atol=1e-5)
    trained_on = loop.make_task(latent, torch.device("cpu")).encode(images)
    assert torch.allclose(base.encode(images), trained_on, atol=1e-5)
    assert base.decode(base.encode(images)).shape == images.shape
    assert Image.open(tmp_path / "second" / "samples.png").size == (2 * (8 * 17 + 1),) * 2
    with pytest.raises(UserError, match="--image_channels 3"):
        pretrain(dataclasses.replace(latent, image_channels=1), tmp_path / "third")
    with pytest.raises(UserError, match="multiple of 4"):
        pretrain(dataclasses.replace(latent, resolution=18), tmp_path / "fourth")


def test_the_loss_of_an_autoencoder_is_the_summed_error_and_the_weighted_kl_per_number(autoencoder):
    task = loop.make_task(dataclasses.replace(autoencoder, kl_weight=0.5), torch.device("cpu"))
    generator, expected = torch.Generator().manual_seed(5), []
    images, _ = task.images.draw(generator)
    noise = torch.randn(4, 3, 8, 8, generator=generator)
    for image, draw in zip(images, noise, strict=True):
        mean, log_variance = task.trained.quant_conv(task.trained.encoder(image[None])).chunk(2, dim=1)
        rebuilt = task.trained.decode(mean + (log_variance / 2).exp() * draw).sample[0]
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()  # of N(mean, variance) from N(0, 1)
        expected.append(((image - rebuilt).abs().sum() + 0.5 * kl) / image.numel())
    loss = task.loss(torch.Generator().manual_seed(5))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_an_autoencoder_learns_to_rebuild_its_images(autoencoder, tmp_path):
    recipe = dataclasses.replace(autoencoder, max_train_steps=400, block_out_channels=(8, 8), learning_rate=3e-3)
    vae = AutoencoderKL.from_pretrained(pretrain(recipe, tmp_path / "out")).eval()
    images = PublicImages(recipe).read(torch.arange(8))
    with torch.no_grad():
        error = (vae.decode(encode(vae, images)).sample - images).abs().mean()
    assert error < 0.25 * (images - images.mean()).abs().mean()


def test_the_scaling_factor_is_that_of_images_spread_over_the_whole_set(autoencoder, tmp_path, monkeypatch):
    vae = loop.make_task(autoencoder, torch.device("cpu")).trained.eval()
    monkeypatch.setattr("dp_peft_diffusion.pretraining.autoencoder.IMAGES_FOR_SCALE", 2)
    images = PublicImages(autoencoder)
    first_of_each = encode(vae, images.read(torch.tensor([0, 4])))  # classes lie one behind the other
    assert scaling_factor(vae, images) == pytest.approx(1 / first_of_each.std().item())


@pytest.mark.parametrize("kind", ["handwriting", "pixel", "autoencoder"])
def test_what_is_left_behind_says_that_it_is_not_private(kind, request, tmp_path, no_grid):
    recipe = dataclasses.replace(request.getfixturevalue(kind), max_train_steps=1)
    text = (pretrain(recipe, tmp_path / "out") / "README.md").read_text()
    assert "NOT private" in text and "No epsilon" in text
    assert "--dataset_name PATH_TO_" in text
    for line in command_lines(text):
        check_command(line)
    assert str(tmp_path) not in text  # nor where the images lay


def test_the_log_has_a_line_for_every_fifty_updates(pixel, tmp_path, monkeypatch, no_grid):
    monkeypatch.setattr(loop, "update", lambda recipe, task, optimizer, step: torch.tensor(step / 8))
    pretrain(dataclasses.replace(pixel, max_train_steps=120), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "pretraining.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(50, 49 / 8), (100, 99 / 8)]


def test_a_batch_is_drawn_by_its_generator_alone_and_half_of_it_is_mirrored(pixel):
    recipe = dataclasses.replace(pixel, train_batch_size=400)
    images = PublicImages(recipe)
    batch, labels = images.draw(torch.Generator().manual_seed(3))
    again, _ = images.draw(torch.Generator().manual_seed(3))
    assert batch.shape == (400, 3, 16, 16) and batch.min() >= -1 and batch.max() <= 1 and torch.equal(batch, again)
    shade = batch.amax(dim=1).mean(dim=1)  # (400, 16): darker to the left where it is not mirrored
    assert 100 < (shade[:, 0] > shade[:, -1]).sum() < 300
    assert all((image[0].max() > image[2].max()) == (label == 0) for image, label in zip(batch, labels, strict=True))
    straight, _ = PublicImages(dataclasses.replace(recipe, random_flip=False)).draw(torch.Generator().manual_seed(3))
    assert (straight.amax(dim=1).mean(dim=1)[:, 0] < straight.amax(dim=1).mean(dim=1)[:, -1]).all()


def test_a_broken_image_a_missing_column_and_a_missing_split_are_told(pixel, tmp_path):
    with pytest.raises(UserError, match="no column 'kind'; there is: image, label"):
        PublicImages(dataclasses.replace(pixel, label_column="kind"))
    with pytest.raises(UserError, match="column 'label' holds no images"):
        PublicImages(dataclasses.replace(pixel, image_column="label", label_column=None))
    with pytest.raises(UserError, match="--split test"):
        PublicImages(dataclasses.replace(pixel, split="test"))
    (tmp_path / "photographs" / "class-1" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="image 6 of .* cannot be decoded"):
        PublicImages(pixel).read(torch.arange(8))


def test_a_missing_autoencoder_is_told_without_asking_the_hub(pixel):
    with pytest.raises(UserError, match="no such folder"):
        loop.make_task(dataclasses.replace(pixel, kind="latent", vae="runs/imagenet32-vae"), torch.device("cpu"))
    with pytest.raises(UserError, match="AutoencoderKL"):
        loop.make_task(dataclasses.replace(pixel, kind="latent", vae=pixel.dataset_name), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "latent"}, "--vae PATH"),
        ({"vae": "somewhere"}, "--vae .* belongs to --kind latent"),
        ({"invert": True}, "--invert .* belongs to --kind handwriting"),
        ({"kind": "autoencoder", "pixel_packing": 2}, "--pixel_packing .* belongs to --kind handwriting or pixel"),
        ({"kind": "handwriting"}, "--image_channels 1"),
        ({"image_channels": 2}, "Type 1 or 3"),
        ({"attention_levels": (2,)}, "levels 0 to 1"),
        ({"norm_num_groups": 3}, "--norm_num_groups 3"),
        ({"attention_head_dim": 6}, "--attention_head_dim 6"),
        ({"resolution": 15}, "multiple of 2.*--resolution 16"),
        ({"kind": "gan"}, "handwriting or pixel or autoencoder or latent"),
        ({"prediction_type": "sample"}, "epsilon or v_prediction or edm"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, told):
    recipe = PretrainRecipe(dataset_name="x", block_out_channels=(8, 16))
    with pytest.raises(UserError, match=told):
        validate(dataclasses.replace(recipe, **changes))


def test_a_cropped_glyph_is_white_on_black_and_fills_the_canvas():
    cropped = crop_glyph(glyph(1), invert=True)
    assert cropped.shape == (1, CANVAS, CANVAS) and cropped.dtype == torch.uint8
    columns = (cropped[0] > 64).any(dim=0).nonzero().flatten()
    assert columns[0] == 0 and columns[-1] == CANVAS - 1
    assert cropped[0, CANVAS // 2, CANVAS // 2] == 0


def test_a_class_code_belongs_to_the_turn_that_augmentation_gives_the_class():
    """The mean augmented image of every turn is nearest to the turned glyph that its initial code was made of."""
    cropped = crop_glyph(glyph(0), invert=True)
    turned = torch.stack([torch.rot90(m, k, (1, 2)) for m in (cropped, cropped.flip(2)) for k in range(4)])
    for turn in range(DIHEDRAL):
        batch = augment(
            cropped.expand(64, -1, -1, -1), torch.full((64,), turn), CANVAS, torch.Generator().manual_seed(0)
        )
        mean = batch.mean(dim=0)[0]
        likeness = [(mean * (t[0].float() - t.float().mean())).sum().item() for t in turned]
        assert likeness.index(max(likeness)) == turn


def test_codes_of_like_characters_are_alike():
    same, other = crop_glyph(glyph(0), True), crop_glyph(glyph(1), True)
    codes = initial_codes(torch.stack([same, same, other]), torch.tensor([0, 1, 2]), 4).view(3, DIHEDRAL, 4)
    assert torch.allclose(codes[0], codes[1], atol=1e-4)
    assert (codes[0] - codes[2]).norm() > 1
