"""Synthetic images read from files, and brought to another size."""

import csv

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.synthetic_images import load_synthetic, to_side

NAMES = ("zero", "one", "two")


@settings(max_examples=40)
@given(height=st.integers(1, 12), width=st.integers(1, 12), side=st.integers(1, 12), seed=st.integers(0, 99))
def test_to_side_is_the_mean_over_the_area_of_each_new_pixel(height, width, side, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    # Oracle: blow every pixel up to side x side, then average whole blocks.
    blown = images.repeat(side, axis=2).repeat(side, axis=3).astype(float)
    means = blown.reshape(2, 3, side, height, side, width).mean(axis=(3, 5))
    assert np.abs(to_side(images, side) - means).max() <= 0.5 + 1e-9


def write_samples(folder, labels, size=(5, 4)):
    (folder / "images").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *size), dtype=np.uint8)
    with open(folder / "images" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        for index, label in enumerate(labels):
            Image.fromarray(images[index]).save(folder / "images" / f"{index:06d}.png")
            writer.writerow([f"{index:06d}.png", label])
    return images


def test_a_sampled_folder_loads_with_its_labels_by_name_or_index(tmp_path):
    images = write_samples(tmp_path, ["two", "zero", "1"])
    loaded, labels = load_synthetic(tmp_path, NAMES)
    assert np.array_equal(loaded[:, 0], images)
    assert labels.tolist() == [2, 0, 1]


def test_a_sampled_parquet_file_loads_like_the_folder(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [Image.fromarray(array) for array in arrays], "label": ["two", "zero", "one"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    loaded, labels = load_synthetic(tmp_path / "images.parquet", NAMES)
    assert np.array_equal(loaded.transpose(0, 2, 3, 1), arrays)
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("parquet", [False, True])
def test_images_without_labels_are_refused_with_how_to_sample_labelled_ones(tmp_path, parquet):
    if parquet:
        columns = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [Image.new("L", (4, 4))], "text": ["a cat"]}
        (tmp_path / "images").mkdir()
        datasets.Dataset.from_dict(rows, features=columns).to_parquet(tmp_path / "images" / "images-00000.parquet")
    else:
        Image.new("L", (4, 4)).save(tmp_path / "0.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    with pytest.raises(UserError, match="no 'label'.*--class_labels"):
        load_synthetic(tmp_path, NAMES)


def test_unusable_synthetic_images_get_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="Run dp-peft sample"):
        load_synthetic(tmp_path, NAMES)
    write_samples(tmp_path, ["two", "seven"])
    with pytest.raises(UserError, match="'seven' is none of the classes zero, one, two"):
        load_synthetic(tmp_path, NAMES)
    Image.new("L", (9, 9)).save(tmp_path / "images" / "000001.png")
    with pytest.raises(UserError, match="differ in size"):
        load_synthetic(tmp_path, NAMES)
    (tmp_path / "images" / "000001.png").write_bytes(b"")
    with pytest.raises(UserError, match="Run dp-peft sample"):
        load_synthetic(tmp_path, NAMES)
