"""Codes of images: unit vectors, each of its own image alone; and bases that are told them."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_bases import latent, pixel_classes, pixel_codes, public_images, tiny_encoder, write

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.image_codes import CANVAS, SKETCHED, CodeEncoder, on_canvas
from dp_peft_diffusion.errors import UserError

ENCODER = tiny_encoder()
PIXELS = arrays(np.float32, (3, 1, 16, 16), elements=st.floats(-1, 1, width=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pixel_codes(tmp_path_factory.mktemp("base") / "codes")


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "base")


@torch.no_grad()
def codes_of(images, encoder=ENCODER):
    return encoder(images)


@given(PIXELS)
def test_a_code_is_a_unit_vector_whatever_the_image(pixels):
    norms = codes_of(torch.from_numpy(pixels)).norm(dim=1)
    assert (norms - 1).abs().max() < 1e-6


@given(PIXELS, st.sampled_from([-1.0, 1.0, float("nan")]))
def test_a_code_does_not_depend_on_the_images_beside_it(pixels, beside):
    images = torch.from_numpy(pixels)
    alone = codes_of(images[:1])
    images[1:] = beside
    assert torch.allclose(codes_of(images)[:1], alone, atol=1e-6)


@given(PIXELS)
def test_the_sketch_has_its_own_share_of_the_length_of_a_code(pixels):
    codes = codes_of(torch.from_numpy(pixels))
    assert (codes[:, 2:].norm(dim=1) - SKETCHED).abs().max() < 1e-6


def test_codes_tell_images_apart():
    codes = codes_of(public_images(40, seed=1))
    assert (codes @ codes.T).min() < 0 and codes.std(dim=0).min() > 0.05


def test_the_directions_of_codes_are_principal_components_over_the_root_of_their_spread():
    encoder, images = tiny_encoder(code_size=5), public_images(64)
    with torch.no_grad():
        small = torch.nn.functional.avg_pool2d(images, images.shape[2] // CANVAS).flatten(1)
        given = {encoder.shown: encoder.features(images), encoder.sketch: small}
    for layer, vectors in given.items():
        check_principal(layer, vectors.double().numpy())


@torch.no_grad()
def check_principal(layer, features):
    values, vectors = np.linalg.eigh(np.cov(features.T))
    values, vectors = values[::-1], vectors[:, ::-1].T  # largest first
    for found, direction, value in zip(layer.weight.double().numpy(), vectors, values, strict=False):
        wanted = direction * np.sign(direction[np.abs(direction).argmax()]) / (value / values[0]) ** 0.25
        assert np.allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    centre = layer(torch.from_numpy(features).float()).mean(dim=0)
    assert centre.abs().max() < 1e-4, "the mean image is in the middle"


def test_the_sketch_sees_16x16_pixels_of_any_image():
    large = public_images(5).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # 32x32
    assert torch.allclose(on_canvas(large), on_canvas(public_images(5)), atol=1e-6)


def test_no_chance_decides_the_signs_of_directions():
    weight = ENCODER.shown.weight
    assert (weight.gather(1, weight.abs().argmax(dim=1, keepdim=True)) > 0).all()
    turned = copy.deepcopy(ENCODER)
    images = public_images(64)
    turned.fit([images[32:], images[:32]])  # rows of the SVD in another order may flip its signs
    assert torch.allclose(turned.shown.weight, weight, atol=1e-3 * weight.abs().max())


def test_a_direction_in_which_images_do_not_differ_is_not_blown_up():
    encoder = tiny_encoder(code_size=6)
    with torch.no_grad():
        encoder.features.layers[1].weight[2:] = 0.0  # of 8 features, the last 6 are those of nothing
        encoder.features.layers[1].bias[2:] = 0.0
    encoder.fit([public_images(64)])
    assert encoder.shown.weight.norm(dim=1).max() <= 1e-3**-0.5 * (1 + 1e-4)


def test_rows_are_linear_in_codes_and_zero_of_no_code():
    x, y = codes_of(public_images(2, seed=2))[:, None]
    with torch.no_grad():
        together = ENCODER.rows(2 * x - 3 * y)
        assert torch.allclose(together, 2 * ENCODER.rows(x) - 3 * ENCODER.rows(y), atol=1e-5)
        assert torch.equal(ENCODER.rows(0 * x), torch.zeros(1, 32))
        one = ENCODER.rows(x)
    wanted = ENCODER.directions.weight.double() @ (x[0].double() * 4**0.5)  # d = 4: root mean square 1
    assert torch.allclose(one[0].double(), wanted, atol=1e-6)


def test_a_base_with_an_encoder_opens_with_it_frozen_and_one_without_has_none(base, tmp_path):
    assert load_base(str(pixel_classes(tmp_path / "other"))).codes is None
    images = public_images(5, seed=3)
    assert torch.equal(codes_of(images, base.codes), codes_of(images))
    assert not base.codes.training and not any(p.requires_grad for p in base.codes.parameters())


@pytest.mark.parametrize("weight", ["features.layers.1.bias", "shown.weight", "sketch.weight", "directions.weight"])
def test_a_base_has_other_digests_if_a_weight_of_its_encoder_differs(base, weight):
    other = dataclasses.replace(base, codes=copy.deepcopy(base.codes))
    other.codes.get_parameter(weight).data.view(-1)[0] += 1e-6
    assert other.digest != base.digest and other.parts_digest != base.parts_digest
    same = dataclasses.replace(base, codes=copy.deepcopy(base.codes))
    assert (same.digest, same.parts_digest) == (base.digest, base.parts_digest)
    none = dataclasses.replace(base, codes=None)
    assert none.digest != base.digest and none.parts_digest is None


@pytest.mark.parametrize("config", [{"resolution": 8}, {"row_size": 16}, {"image_channels": 3}])
def test_an_encoder_that_does_not_fit_the_unet_is_refused(copied, config):
    shutil.rmtree(copied / "encoder")
    tiny_encoder(**config).save_pretrained(copied / "encoder")
    with pytest.raises(UserError, match="encoder takes other images than its UNet draws, or gives rows"):
        load_base(str(copied))


def test_an_encoder_beside_a_net_on_latents_or_without_classes_is_refused(tmp_path):
    write(latent(tmp_path / "latent"), encoder=tiny_encoder(image_channels=3))
    with pytest.raises(UserError, match="its encoder takes other images"):
        load_base(str(tmp_path / "latent"))
    place = write(pixel_classes(tmp_path / "classes"), encoder=tiny_encoder())
    assert load_base(str(place)).codes is not None
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((place / "unet" / "config.json").read_text()) | {"num_class_embeds": None}
    (place / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its encoder takes other images"):
        load_base(str(place), from_scratch=True)


def test_an_encoder_of_another_class_or_without_its_weights_is_refused(copied):
    path = copied / "encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="its encoder is AutoencoderKL, and this version knows CodeEncoder alone"):
        load_base(str(copied))
    path.write_text(json.dumps(config | {"code_size": 3}))
    with pytest.raises(UserError, match="could not be opened as a diffusers CodeEncoder"):
        load_base(str(copied))
    path.write_text(json.dumps(config))
    (copied / "encoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be opened as a diffusers CodeEncoder"):
        load_base(str(copied))


def test_an_encoder_is_written_and_read_by_stock_diffusers(tmp_path):
    ENCODER.save_pretrained(tmp_path)
    again = CodeEncoder.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, ENCODER.state_dict()[name]) for name, value in again.state_dict().items())
