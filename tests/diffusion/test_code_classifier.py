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
        mean, covariance = moments_of_rows(base, ROWS[::2], "dark")
        assert torch.allclose(mean, codes.mean(dim=0), atol=1e-6)
        plain = torch.cov(codes.T, correction=0)  # Ledoit and Wolf move it towards a multiple of the identity
        moved, target = covariance - plain, torch.eye(4) * plain.trace() / 4 - plain
        share = (moved * target).sum() / target.square().sum()
        assert torch.allclose(moved, share * target, atol=1e-6) and 0 < share < 1


def test_images_get_the_class_whose_gaussian_is_densest_at_their_code(base):
    found = code_classifier(base, LABELS, ROWS)
    images = bytes_of(public_images(300, seed=2))
    codes = base.codes(images / 127.5 - 1).double().numpy()
    densities = [stats.multivariate_normal(*moments_of_rows(base, ROWS[c::2], "any")).logpdf(codes) for c in range(2)]
    wanted = [LABELS[place] for place in np.argmax(densities, axis=0)]
    assert found.classes(images) == wanted and 30 < wanted.count("dark") < 270


def test_a_label_depends_on_its_image_alone(base):
    found, images = code_classifier(base, LABELS, ROWS), bytes_of(public_images(40, seed=3))
    together = found.classes(images)
    assert [found.classes(image[None])[0] for image in images] == together and set(together) == set(LABELS)
    dark, light = groups()
    assert found.classes(bytes_of(dark)) == ["dark"] * 15 and found.classes(bytes_of(light)) == ["light"] * 15


def test_a_class_named_twice_counts_once_with_each_of_its_rows(base):
    """As `class_rows` spreads them: the two places of `light` share its rows, and go round again."""
    light, dark = ROWS[1::2], ROWS[::2]
    spread = tuple(row for i in range(15) for row in (light[2 * i % 15], light[(2 * i + 1) % 15], dark[i]))
    once, twice = code_classifier(base, LABELS, ROWS), code_classifier(base, ("light", "light", "dark"), spread)
    assert twice.labels == ("light", "dark")
    assert torch.equal(twice.mean.flip(0), once.mean) and torch.equal(twice.covariance.flip(0), once.covariance)


def test_too_few_rows_are_refused_and_as_many_as_needed_are_not(base):
    for rows in ((1, 2), (1, 2, 3, 4), (1, 2, 1, 4, 1, 6)):
        with pytest.raises(UserError, match="'dark' has [12] class rows.*too little.*--rows_per_class 3 or more"):
            code_classifier(base, LABELS, rows)
    assert code_classifier(base, LABELS, (1, 2, 3, 4, 5, 6)).covariance.isfinite().all()


def test_without_codes_or_classes_nothing_can_be_relabelled(base, tmp_path):
    other = load_base(str(BASES["pixel_classes"](tmp_path / "other")))
    for given, labels, rows in ((base, None, None), (base, LABELS, None), (base, (), ()), (other, LABELS, ROWS)):
        with pytest.raises(UserError, match="--relabel needs classes, and a base that is told codes"):
            code_classifier(given, labels, rows)


def no_change(base):
    base.unet.class_embedding.weight.zero_()


def of_another_base(base):
    base.unet.class_embedding.weight.normal_(generator=torch.Generator().manual_seed(0))


def narrow(base):
    """Fewer directions than codes have numbers: a row does not tell which code it was."""
    base.codes.directions.weight[:, 3] = base.codes.directions.weight[:, 2]
    base.unet.class_embedding.weight[1:] = base.codes.rows(base.codes(public_images(30)))


@pytest.mark.parametrize("spoil", [no_change, of_another_base, narrow])
def test_rows_that_do_not_tell_their_codes_are_refused(base, spoil):
    with torch.no_grad():
        spoil(base)
    with pytest.raises(UserError, match="rows of class 'dark' stand for no codes of base"):
        code_classifier(base, LABELS, ROWS)


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
    assert labels_in(tmp_path / "asked") == ["dark", "light"] * 5
    shown = tmp_path / "shown"
    write_images(shown, source(base, True), 10, first_image=1, parquet=parquet)
    assert labels_in(shown) == ["dark", "light"] * 5, "number 1 was asked to be light, and is dark"
    files = sorted((shown / "images").iterdir())
    before = [file.read_bytes() for file in files]
    for file in files[1 if parquet else 4 :]:  # after the first shard
        file.unlink()
    made, again = [], source(base, True)
    batches = Shown.batches
    monkeypatch.setattr(Shown, "batches", lambda self, ids: made.append(ids) or batches(self, ids))
    write_images(shown, again, 10, first_image=1, parquet=parquet)
    assert [file.read_bytes() for file in files] == before and made[0] == range(5, 9)


def test_a_folder_goes_on_with_the_labels_that_it_was_begun_with(base, tmp_path):
    out = tmp_path / "out"
    record = out / "sampling.json"
    write_images(out, source(base, False), 4)
    begun = {name: value for name, value in json.loads(record.read_text()).items() if name != "relabel"}
    record.write_text(json.dumps(begun))  # as folders of before were: they knew of no other labels
    write_images(out, source(base, False), 4)
    with pytest.raises(UserError, match="relabel: False before, True now"):
        write_images(out, source(base, True), 4)


def test_a_damaged_file_is_named(base, tmp_path):
    out = tmp_path / "out"
    write_images(out, source(base, True), 4)
    (out / "images" / "000002.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"000002.png is no image .*Remove it"):
        write_images(out, source(base, True), 4)
