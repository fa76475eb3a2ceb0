import dataclasses

import pytest
import torch
from PIL import Image, ImageDraw

from dp_peft_diffusion import pretraining
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.glyphs import CANVAS, DIHEDRAL, augment, crop_glyph
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining import initial_codes, pretrain
from dp_peft_diffusion.recipe import PretrainRecipe


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


@pytest.fixture
def recipe(tmp_path):
    for kind in (0, 1):
        (tmp_path / "letters" / str(kind)).mkdir(parents=True)
        for copy in range(3):
            glyph(kind).save(tmp_path / "letters" / str(kind) / f"{copy}.png")
    return PretrainRecipe(
        dataset_name=str(tmp_path / "letters"), block_out_channels=(8, 16), class_code_rank=4, spare_classes=5,
        train_batch_size=8, max_train_steps=4, lr_warmup_steps=1,
    )  # fmt: skip


def test_a_pretrained_base_loads_and_its_spare_rows_equal_the_null_row(recipe, tmp_path):
    base = load_base(str(pretrain(recipe, tmp_path / "out")))
    null = 2 * DIHEDRAL
    assert base.layout.null_class == null and base.layout.spare_classes == (null + 1, null + 6)
    table = base.unet.class_embedding.weight
    assert all(torch.equal(table[row], table[null]) for row in range(null + 1, null + 6))
    assert base.resolution == 32 and base.image_channels == 1
    assert (tmp_path / "out" / "samples.png").is_file()


def test_an_interrupted_pretraining_resumes_to_the_same_weights(recipe, tmp_path, monkeypatch):
    whole = load_base(str(pretrain(recipe, tmp_path / "whole"))).sha256
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    original = pretraining._checkpoint

    def stop(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "halves")
    monkeypatch.setattr(pretraining, "_checkpoint", original)
    assert load_base(str(pretrain(recipe, tmp_path / "halves"))).sha256 == whole
    assert load_base(str(pretrain(dataclasses.replace(recipe, seed=1), tmp_path / "other"))).sha256 != whole


def test_a_folder_resumes_its_own_recipe_only(recipe, tmp_path):
    pretrain(recipe, tmp_path / "out")
    with pytest.raises(UserError, match="other options"):
        pretrain(dataclasses.replace(recipe, block_out_channels=(8, 24)), tmp_path / "out")


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
