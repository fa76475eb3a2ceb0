"""Features by name: what each net sees, against stock code, and what is said where weights cannot be had."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cleanfid import features as stock
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torchvision.transforms.functional import normalize, to_tensor
from transformers import CLIPConfig, CLIPModel

from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import features as module
from dp_peft_diffusion.evaluation import fidelity
from dp_peft_diffusion.evaluation.features import HANDWRITING, open_features
from dp_peft_diffusion.evaluation.fidelity import frechet_distance, kernel_distance


def random_images(n, seed=0, channels=1, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side)).astype(np.uint8)


@pytest.fixture(scope="module")
def digits():
    """(images, classes) of scikit-learn's digits, 32 x 32, light on dark."""
    found = load_digits()
    side = [np.asarray(Image.fromarray(np.uint8(15 * image)).resize((32, 32), 2)) for image in found.images[:800]]
    return np.stack(side)[:, None], found.target[:800]


@pytest.fixture(scope="module")
def handwriting():
    return open_features("handwriting")


# ---- our own nets


def test_the_net_for_handwriting_ships_and_is_small(handwriting):
    found = handwriting(random_images(3))
    assert found.shape == (3, 80) and found.dtype == np.float64
    assert (handwriting.name, handwriting.is_inception) == ("handwriting", False)
    assert sum(path.stat().st_size for path in HANDWRITING.iterdir()) < 800_000


def test_distances_of_handwriting_grow_with_what_is_done_to_the_images(handwriting, digits, monkeypatch):
    monkeypatch.setattr(fidelity, "SUBSETS", 3)
    images, classes = digits
    generator = np.random.default_rng(0)
    halves = generator.permutation(len(images)).reshape(2, -1)
    real, half = (handwriting(images[part]) for part in halves)
    noise = generator.normal(size=images[halves[1]].shape)

    def noisy(stddev):
        return handwriting((images[halves[1]] + stddev * noise).clip(0, 255).astype(np.uint8))

    few, sets = real[classes[halves[0]] < 5], [half, noisy(20), noisy(40), noisy(80)]
    for distance in (frechet_distance, lambda x, y: kernel_distance(x, y, seed=0)[0]):
        found = [distance(real, other) for other in sets]
        assert found == sorted(found) and found[1] > 2 * abs(found[0])
        assert distance(real, few) > 5 * abs(found[0])


def test_the_features_of_an_image_do_not_depend_on_the_others(handwriting, monkeypatch):
    images = random_images(7)
    together = handwriting(images)
    monkeypatch.setattr(module, "BATCH", 2)
    assert np.allclose(handwriting(images[::-1]), together[::-1], atol=1e-5)


def test_grey_images_in_colour_have_the_same_features(handwriting):
    images = random_images(4)
    assert np.allclose(handwriting(np.repeat(images, 3, axis=1)), handwriting(images), atol=1e-5)
    assert not np.allclose(handwriting(images[::-1]), handwriting(images), atol=0.1)


@pytest.mark.parametrize("side", [28, 100])
def test_images_of_other_sizes_are_resized_as_pillow_does_it(handwriting, side):
    images = random_images(3, side=side)
    expected = [
        Image.fromarray(image[0].astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR) for image in images
    ]
    found = module._to_side(torch.from_numpy(images).float(), 32)
    assert np.allclose(found[:, 0], np.stack(expected), atol=1e-3)
    resized = np.stack(expected).round().astype(np.uint8)[:, None]
    assert np.allclose(handwriting(images), handwriting(resized), atol=0.1)


@pytest.fixture
def own_net(tmp_path):
    torch.manual_seed(0)
    net = FeatureNet(16, 3, 2, (8, 12), 1, 4, trained_on="our birds\n")
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net", net.eval()


def test_a_net_of_ones_own_is_named_after_its_images_and_its_file(own_net):
    folder, net = own_net
    found, images = open_features(str(folder)), random_images(3, channels=3, side=16)
    with torch.no_grad():
        expected = net(torch.from_numpy(images).float() / 127.5 - 1)
    assert np.allclose(found(images), expected, atol=1e-6)
    digest = hashlib.sha256(next(folder.glob("*.safetensors")).read_bytes()).hexdigest()
    assert (found.name, found.is_inception) == (f"our-birds-{digest[:8]}", False)


def test_folders_that_hold_no_such_net_are_refused(own_net, tmp_path):
    folder, net = own_net
    (tmp_path / "empty").mkdir()
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "_class_name": "UNet2DModel"}))
    for name, message in (("nowhere", "no such folder"), ("empty", "holds no net"), ("other", "holds no net")):
        with pytest.raises(UserError, match=message):
            open_features(str(tmp_path / name))
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: weights[name] for name in list(weights)[1:]}, path, {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        open_features(str(folder))
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="could not be opened"):
        open_features(str(folder))


def test_features_that_are_no_numbers_are_refused(own_net):
    folder, net = own_net
    net.layers[1].weight.data[0] = torch.nan
    net.save_pretrained(folder)
    with pytest.raises(UserError, match="no finite numbers"):
        open_features(str(folder))(random_images(2, channels=3))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 4, 8, 8)])
def test_images_that_have_no_features_are_refused(handwriting, shape):
    with pytest.raises(UserError, match="grey or colour"):
        handwriting(np.zeros(shape, np.uint8))


# ---- Inception


class Layers(torch.nn.Module):
    """Where Inception's layers are: 2048 numbers of images (b, 3, 299, 299)."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, (26, 27)).flatten(1)[:, :2048]


class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the form of the published one."""
    path = tmp_path_factory.mktemp("published") / "stand-in.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 deprecates TorchScript
        torch.jit.save(torch.jit.script(StandIn()), path)
    return path


@pytest.fixture
def inception_cache(published, tmp_path, monkeypatch):
    """Where the file belongs; the download brings the stand-in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "inception_url", published.as_uri())
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(published.read_bytes()).hexdigest())
    return tmp_path / "cache" / "dp-peft" / "inception-2015-12-05.pt"


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_what_clean_fid_shows_it(inception_cache, published, tmp_path, channels):
    images = random_images(3, channels=channels, side=20)
    files = [str(tmp_path / f"{index}.png") for index in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(file)
    found = open_features("inception")
    got = found(images)
    assert (found.name, found.is_inception) == ("inception", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = InceptionV3W(str(inception_cache.parent), download=False)
    expected = fid.get_files_features(files, net, num_workers=0, device=torch.device("cpu"), verbose=False)
    assert got.shape == (3, 2048) and np.allclose(got, expected, atol=1e-6)


def test_inception_lies_in_a_folder_of_this_user_alone_and_is_fetched_once(inception_cache, published):
    open_features("inception")
    assert inception_cache.read_bytes() == published.read_bytes()
    assert inception_cache.parent.stat().st_mode & 0o777 == 0o700
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", None)
        open_features("inception")


@pytest.mark.parametrize("lies_there", [False, True])
def test_another_file_than_the_published_one_is_never_run(inception_cache, published, monkeypatch, lies_there):
    """Fetched, or put there by somebody."""
    monkeypatch.setattr(module, "INCEPTION_SHA256", 64 * "0")
    monkeypatch.setattr(torch.jit, "load", None)
    if lies_there:
        inception_cache.parent.mkdir(parents=True)
        shutil.copy(published, inception_cache)
    with pytest.raises(UserError, match="is not the published file" if lies_there else "invalid hash value"):
        open_features("inception")
    assert inception_cache.exists() == lies_there


def test_inception_that_cannot_be_fetched_is_told_with_where_from_where_to_and_what_works(inception_cache, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        open_features("inception")
    for said in ("no network", module.inception_url, str(inception_cache), "--features handwriting"):
        assert said in str(error.value)
    assert not inception_cache.exists()


def test_clean_fid_0_1_35_reads_a_file_that_anybody_may_have_put_there(monkeypatch):
    """The reason for a folder of this user alone."""
    asked = []
    monkeypatch.setattr(stock, "InceptionV3W", lambda folder, **_: asked.append(folder) or torch.nn.Identity())
    stock.feature_extractor(device="cpu", use_dataparallel=False)
    assert asked == ["/tmp"]


def test_the_pinned_file_is_the_one_that_clean_fid_fetches():
    assert module.inception_url.endswith(f"/{module.INCEPTION_FILE}") and module.inception_url.startswith("https://")


# ---- CLIP


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A tiny CLIP in place of the one on the Hub."""
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**part, "patch_size": 56, "projection_dim": 6}
    torch.manual_seed(0)
    net = CLIPModel(CLIPConfig(text_config={**part, "vocab_size": 9}, vision_config=vision, projection_dim=6)).eval()
    net.save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(module, "CLIP", str(tmp_path / "clip"))
    return net


@pytest.mark.parametrize(("channels", "shape"), [(1, (20, 20)), (3, (40, 30))])
def test_clip_sees_what_clean_fid_shows_it(clip, channels, shape):
    images = np.random.default_rng(0).integers(0, 256, (3, channels, *shape)).astype(np.uint8)
    found = open_features("clip")
    got = found(images)
    assert (found.name, found.is_inception, got.shape) == ("clip", False, (3, 6))
    for image, features in zip(images, got, strict=True):
        picture = Image.fromarray(image.transpose(1, 2, 0).squeeze()).convert("RGB")
        width, height = picture.size
        scale = 224 / min(width, height)
        picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        top = round((picture.height - 224) / 2)
        pixels = to_tensor(picture.crop((0, top, 224, top + 224)))
        pixels = normalize(pixels, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        with torch.no_grad():
            expected = clip.visual_projection(clip.vision_model(pixels[None]).pooler_output)
        assert np.allclose(features, expected[0], atol=1e-5)


def test_clip_that_cannot_be_fetched_is_told_with_what_works(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(module.CLIPVisionModelWithProjection, "from_pretrained", offline)
    with pytest.raises(UserError) as error:
        open_features("clip")
    for said in ("no network", module.CLIP, module.CLIP_REVISION, "hf download", "--features handwriting"):
        assert said in str(error.value)


def test_a_clip_without_some_weights_is_refused(clip):
    path = next(Path(module.CLIP).glob("*.safetensors"))
    weights = {name: value for name, value in load_file(path).items() if "visual_projection" not in name}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights: .*visual_projection"):
        open_features("clip")
