import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_base_folder

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.generation import (
    class_indices,
    image_grid,
    make_scheduler,
    sample_images,
    to_pil,
    write_images,
)
from dp_peft_diffusion.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny_base_folder(tmp_path_factory.mktemp("bases") / "tiny")))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "EulerDiscreteScheduler"])
def test_an_image_depends_on_its_seed_and_place_not_on_the_batch(base, scheduler):
    labels = torch.arange(5)
    together = sample_images(base, labels, seed=3, scheduler=scheduler, num_inference_steps=3)
    in_parts = sample_images(base, labels, seed=3, scheduler=scheduler, num_inference_steps=3, batch_size=2)
    assert together.shape == (5, 1, 16, 16) and together.dtype == torch.uint8
    assert (together.int() - in_parts.int()).abs().max() <= 1  # rounding of a sum in another order
    assert not torch.equal(together, sample_images(base, labels, seed=4, num_inference_steps=3))


def test_guidance_one_is_no_guidance_and_guidance_follows_the_formula(base):
    class Affine(torch.nn.Module):
        """Predicts its label, so that guidance can be read off."""

        config, device = base.unet.config, torch.device("cpu")

        def forward(self, x, t, class_labels):
            return type("Output", (), {"sample": class_labels.view(-1, 1, 1, 1).float().expand_as(x)})()

    from dataclasses import replace

    from dp_peft_diffusion.diffusion.generation import _denoise

    seen = []

    class Spy:
        timesteps = [torch.tensor(1)]

        def scale_model_input(self, x, t):
            return x

        def step(self, prediction, t, x):
            seen.append(prediction)
            return type("Output", (), {"prev_sample": x})()

    fake = replace(base, unet=Affine())
    for scale in (1.0, 3.0):
        _denoise(fake, Spy(), torch.zeros(1, 4, 8, 8), torch.tensor([4]), scale, [])
    null = base.layout.null_class
    assert seen[0].unique().item() == 4.0
    assert seen[1].unique().item() == null + 3.0 * (4 - null)


def test_an_unknown_scheduler_is_refused(base):
    with pytest.raises(UserError, match="ddim"):
        make_scheduler(base, "fastest")


def test_labels_are_taken_in_turn_and_unknown_ones_refused():
    assert class_indices(["a", "b", "c"], None, 5) == [0, 1, 2, 0, 1]
    assert class_indices(["a", "b", "c"], ["c", "a"], 3) == [2, 0, 2]
    with pytest.raises(UserError, match="'d'"):
        class_indices(["a", "b", "c"], ["d"], 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_load_with_datasets_as_they_were(tmp_path, channels):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, channels, 8, 8), dtype=np.uint8))
    write_images(tmp_path / "out", to_pil(pixels), list("ababab"), parquet=True)
    for rows in (
        datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out" / "images"), split="train"),
        datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "images.parquet"), split="train"),
    ):
        assert rows["label"] == list("ababab") or list(rows["label"]) == list("ababab")
        first = np.atleast_3d(np.array(rows[0]["image"])).transpose(2, 0, 1)
        assert np.array_equal(first, pixels[0].numpy())
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 8


def test_a_grid_holds_every_image_once():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2) * 50
    grid = np.array(image_grid(images, columns=3, zoom=1))
    assert grid.shape == (7, 10)
    assert [grid[1, 1], grid[1, 4], grid[1, 7], grid[4, 1], grid[4, 4]] == [0, 50, 100, 150, 200]
