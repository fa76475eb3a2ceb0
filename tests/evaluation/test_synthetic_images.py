"""Synthetic images read from files, and brought to another size."""

import csv
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
    with pytest.raises(UserError, match=r"000001.png cannot be read as an image .*Run dp-peft sample"):
        load_synthetic(tmp_path, NAMES)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def parquet(path, *images):
    pq.write_table(pa.Table.from_pylist([{"image": image, "label": "one"} for image in images]), path)
    return path


def test_palettes_and_bilevel_images_are_seen_as_the_eye_sees_them(tmp_path):
    rng = np.random.default_rng(0)
    colours, indices, black = (
        rng.integers(0, 256, (4, 3), np.uint8),
        rng.integers(0, 4, (5, 6)),
        rng.random((5, 6)) < 0.5,
    )
    palette = Image.fromarray(indices.astype(np.uint8), mode="L").copy()
    palette.putpalette(colours.tobytes())
    deep = Image.fromarray((rng.integers(0, 256, (5, 6)) * 257).astype(np.uint16))
    see_through = Image.new("RGBA", (6, 5), (0, 0, 0, 0))
    expected = [
        (palette, colours[indices].transpose(2, 0, 1)),
        (Image.fromarray(black), 255 * black[None]),
        (deep, np.asarray(deep)[None] // 257),
        (see_through, np.full((3, 5, 6), 255)),
    ]
    for number, (image, pixels) in enumerate(expected):
        path = parquet(tmp_path / f"{number}.parquet", {"bytes": encoded(image), "path": None})
        loaded, _ = load_synthetic(path, NAMES)
        assert loaded.dtype == np.uint8 and np.array_equal(loaded[0], pixels), image.mode


def test_each_image_that_cannot_be_read_is_an_error_of_one_line_that_names_file_and_row(tmp_path, monkeypatch):
    good, path = {"bytes": encoded(Image.new("L", (4, 4))), "path": None}, tmp_path / "a.parquet"
    cut = {"bytes": good["bytes"][:40], "path": None}
    for bad in (None, {"bytes": None, "path": "elsewhere.png"}, cut):
        with pytest.raises(UserError, match=r"a.parquet row 1 cannot be read as an image [^\n]*$"):
            load_synthetic(parquet(path, good, bad), NAMES)
    with pytest.raises(UserError, match="a.parquet row 0 cannot be read"):
        load_synthetic(parquet(path, "a name"), NAMES)
    with pytest.raises(UserError, match="a.parquet row 0: label 'one' is none"):
        load_synthetic(parquet(path, good), ("a", "b"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(UserError, match="a.parquet row 0 .*DecompressionBombError"):
        load_synthetic(parquet(path, good), NAMES)


def test_a_list_that_is_torn_is_an_error_of_one_line_that_names_file_and_line(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    metadata = tmp_path / "metadata.csv"
    for line in ("1.png,one", ",one", "..,one"):
        metadata.write_text(f"file_name,label\n0.png,one\n{line}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"metadata.csv line 3: there is no image"):
            load_synthetic(tmp_path, NAMES)
    metadata.write_text("file_name,label\n" + "x" * 200_000 + ",one\n")
    with pytest.raises(UserError, match="metadata.csv after line 1: field larger"):
        load_synthetic(tmp_path, NAMES)
    metadata.write_bytes(b"file_name,label\n0.png,\xff\n")
    with pytest.raises(UserError, match="metadata.csv after line 0: 'utf-8' codec"):
        load_synthetic(tmp_path, NAMES)
