import pytest
import torch
from diffusers import UNet2DModel
from tiny_models import tiny_base_folder, tiny_unet

from dp_peft_diffusion.diffusion import base_model
from dp_peft_diffusion.diffusion.base_model import BUILTIN_BASES, fingerprint, load_base
from dp_peft_diffusion.errors import UserError


def test_decode_undoes_encode(tmp_path):
    base = load_base(str(tiny_base_folder(tmp_path / "base")))
    images = torch.rand(2, 1, 16, 16)
    assert base.resolution == 16 and base.image_channels == 1
    assert base.encode(images).shape == (2, 4, 8, 8)
    assert torch.equal(base.decode(base.encode(images)), images)


def test_a_loaded_base_is_frozen_and_in_eval_mode(tmp_path):
    unet = load_base(str(tiny_base_folder(tmp_path / "base"))).unet
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())


def test_a_plain_diffusers_folder_without_our_layout_file_loads(tmp_path):
    unet = tiny_unet(None)
    unet.save_pretrained(tmp_path / "plain")
    from diffusers import DDPMScheduler

    DDPMScheduler().save_pretrained(tmp_path / "plain")
    base = load_base(str(tmp_path / "plain"))
    assert base.layout.pixel_packing == 1 and base.num_class_embeds is None and base.resolution == 8


def test_the_fingerprint_changes_with_any_weight():
    unet = tiny_unet()
    before = fingerprint(unet)
    unet.conv_out.bias.data[0] += 1e-6
    assert fingerprint(unet) != before


@pytest.mark.parametrize("name", ["builtin:nothing", "./no/such/folder", "/no/such/folder"])
def test_an_unknown_base_is_refused_by_name(name):
    with pytest.raises(UserError, match=name.split("/")[-1]):
        load_base(name)


def test_a_hub_name_without_network_gives_a_clear_error():
    with pytest.raises(UserError, match="nobody/nothing"):
        load_base("nobody/nothing")


@pytest.mark.parametrize("text", ["", "{}", '{"spare_classes": 3}', '{"spare_classes": [0, 0], "colour": 1}'])
def test_a_broken_layout_file_is_told_by_name(tmp_path, text):
    folder = tiny_base_folder(tmp_path / "base")
    (folder / "dp_peft_base.json").write_text(text)
    with pytest.raises(UserError, match="dp_peft_base.json"):
        load_base(str(folder))


def test_the_layout_of_a_hub_base_is_fetched_with_it(tmp_path, monkeypatch):
    folder = tiny_base_folder(tmp_path / "base")
    monkeypatch.setattr(base_model, "hf_hub_download", lambda repo, name, revision: str(folder / name))
    assert base_model._load_layout("somebody/handwriting", None).pixel_packing == 2


def test_the_builtin_base_is_small_loads_with_stock_diffusers_and_has_spare_rows():
    folder = BUILTIN_BASES / "handwriting"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    base = load_base("builtin:handwriting")
    assert unet.config.num_class_embeds == base.layout.spare_classes[1]
    assert base.layout.spare_classes[1] - base.layout.spare_classes[0] == 64
    null = base.unet.class_embedding.weight[base.layout.null_class]
    assert all(torch.equal(base.unet.class_embedding.weight[row], null) for row in range(*base.layout.spare_classes))
