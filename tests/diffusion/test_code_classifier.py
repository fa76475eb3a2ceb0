"""Labels by what images show: Gaussians of an adapter's rows, and what is written beside images."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from tiny_bases import BASES, pixel_codes, public_images

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion import image_files
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.code_classifier import code_classifier, moments_of_rows
from dp_peft_diffusion.diffusion.generation import ImageSource
from dp_peft_diffusion.diffusion.image_files import write_images
from dp_peft_diffusion.errors import UserError

LABELS, ROWS = ("dark", "light"), tuple(range(1, 31))  # 15 rows of each class


def bytes_of(images):
    """[-1, 1] -> uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def groups():
    """Images (2, 15, 1, 16, 16) in [-1, 1] whose codes lie around two places: dark ones, and their negatives."""
    images = 0.4 * public_images(30, seed=1).unflatten(0, (2, 15)) - 0.5
    return images * torch.tensor([1.0, -1.0])[:, None, None, None, None]


@pytest.fixture
def base(tmp_path):
    """A base whose rows are the codes of `groups`, in turn."""
    loaded = load_base(str(pixel_codes(tmp_path / "base")))
    codes = loaded.codes(groups().transpose(0, 1).flatten(0, 1))  # (30, d)
    with torch.no_grad():
        loaded.unet.class_embedding.weight[1:] = loaded.codes.rows(codes)
    return loaded


def test_rows_give_back_the_codes_they_were_made_of_whatever_the_adapters_weight(base):
    codes = base.codes(groups()[0]).double()
    for weight in (1.0, 0.3, 2.0):
        with torch.no_grad():
            base.unet.class_embedding.weight[1::2] = weight * base.codes.rows(codes.float())
        mean, covariance = moments_of_rows(base, ROWS[::2])
        assert torch.allclose(mean, codes.mean(dim=0), atol=1e-6)
        plain = torch.cov(codes.T, correction=0)  # Ledoit and Wolf move it towards a multiple of the identity
        moved, target = covariance - plain, torch.eye(4) * plain.trace() / 4 - plain
        share = (moved * target).sum() / target.square().sum()
        assert torch.allclose(moved, share * target, atol=1e-6) and 0 < share < 1


def test_images_get_the_class_whose_gaussian_is_densest_at_their_code(base):
    found = code_classifier(base, LABELS, ROWS)
    images = bytes_of(public_images(300, seed=2))
    codes = base.codes(images / 127.5 - 1).double().numpy()
    densities = [stats.multivariate_normal(*moments_of_rows(base, ROWS[c::2])).logpdf(codes) for c in range(2)]
    wanted = [LABELS[place] for place in np.argmax(densities, axis=0)]
    assert found.classes(images) == wanted and 30 < wanted.count("dark") < 270


def test_a_label_depends_on_its_image_alone(base):
    found, images = code_classifier(base, LABELS, ROWS), bytes_of(public_images(40, seed=3))
    together = found.classes(images)
    assert [found.classes(image[None])[0] for image in images] == together and set(together) == set(LABELS)
    dark, light = groups()
    assert found.classes(bytes_of(dark)) == ["dark"] * 15 and found.classes(bytes_of(light)) == ["light"] * 15


def test_few_rows_and_bases_without_codes_are_refused(base, tmp_path):
    for labels, rows in ((None, None), (LABELS, None), (LABELS, (1, 2)), (LABELS, (1, 2, 1, 4)), ((), ())):
        with pytest.raises(UserError, match="--relabel.*none or too few.*--adapter code_moments"):
            code_classifier(base, labels, rows)
    other = load_base(str(BASES["pixel_classes"](tmp_path / "other")))
    with pytest.raises(UserError, match="--relabel.*--adapter code_moments"):
        code_classifier(other, LABELS, (10, 11, 12, 13))


# ---- what is written


class Shown(ImageSource):
    """A source whose images are groups of known classes, in the wrong order: no network."""

    def batches(self, ids):
        images = bytes_of(groups().flip(0).transpose(0, 1).flatten(0, 1))
        for start in range(ids.start, ids.stop, self.batch_size):
            batch = range(start, min(ids.stop, start + self.batch_size))
            yield batch, images[batch.start : batch.stop]


def source(base, relabel):
    shown = code_classifier(base, LABELS, ROWS) if relabel else None
    sample = recipe.Sample(scheduler="fidelity")
    return Shown(base, sample, LABELS, ROWS, None, 3, torch.float32, "cpu", shown)


def labels_in(folder):
    if files := sorted(folder.glob("images/*.parquet")):
        return [label for file in files for label in pq.read_table(file).column("label").to_pylist()]
    with open(folder / "images" / "metadata.csv") as file:
        return [row["label"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("parquet", [False, True])
def test_the_label_beside_an_image_is_the_class_it_shows_also_after_a_stop(base, tmp_path, parquet, monkeypatch):
    monkeypatch.setattr(image_files, "SHARD_IMAGES", 4)
    write_images(tmp_path / "asked", source(base, False), 10, parquet=parquet)
    write_images(tmp_path / "shown", source(base, True), 10, first_image=1, parquet=parquet)
    assert labels_in(tmp_path / "asked") == ["dark", "light"] * 5
    assert labels_in(tmp_path / "shown") == ["dark", "light"] * 5, "number 1 was asked to be light, and is dark"
    assert json.loads((tmp_path / "shown" / "sampling.json").read_text())["relabel"] is True
    files = sorted((tmp_path / "shown" / "images").iterdir())
    before = [file.read_bytes() for file in files]
    for file in files[1:]:
        file.unlink()
    write_images(tmp_path / "shown", source(base, True), 10, first_image=1, parquet=parquet)
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(UserError, match="relabel: True before, False now"):
        write_images(tmp_path / "shown", source(base, False), 10, first_image=1, parquet=parquet)
