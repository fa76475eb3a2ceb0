"""Images on disk: PNG files and parquet shards, whole or not at all, and the same after a stop."""

import copy
import csv
import dataclasses
import json
import os
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_bases import BASES

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion import image_files
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.generation import ImageSource
from dp_peft_diffusion.diffusion.image_files import shard_size, write_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.utility import load_synthetic

NAMES = ("cat", "dog")
SHARD = 4


@dataclasses.dataclass(frozen=True)
class Painted(ImageSource):
    """A source whose images are numbers: no network."""

    def batches(self, ids):
        for start in range(ids.start, ids.stop, self.batch_size):
            batch = range(start, min(ids.stop, start + self.batch_size))
            shape = (self.base.image_channels, self.base.resolution, self.base.resolution)
            yield batch, torch.stack([torch.full(shape, 7 * i % 256, dtype=torch.uint8) for i in batch])


@pytest.fixture(scope="module", params=["pixel", "pixel_classes"])
def source(request, tmp_path_factory):
    """Of colour images without labels, and of grey ones with them."""
    base = load_base(str(BASES[request.param](tmp_path_factory.mktemp("base") / "base")))
    labels = NAMES if request.param == "pixel_classes" else None
    return Painted(
        base, recipe.Sample(scheduler="fidelity"), labels, labels and (10, 11), None, 3, torch.float32, "cpu"
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(image_files, "SHARD_IMAGES", SHARD)


def level(i):
    return 7 * i % 256


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("parquet", [False, True])
def test_datasets_and_evaluate_read_what_was_written(source, tmp_path, parquet):
    write_images(tmp_path / "out", source, 6, parquet=parquet)
    place = tmp_path / "out" / "images"
    kind = "parquet" if parquet else "imagefolder"
    rows = datasets.load_dataset(kind, data_dir=str(place), split="train", cache_dir=str(tmp_path / "cache"))
    arrays = [np.atleast_3d(np.array(image)) for image in rows["image"]]
    assert [set(array.flatten()) for array in arrays] == [{level(i)} for i in range(6)]
    assert {array.shape for array in arrays} == {(16, 16, source.base.image_channels)}
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 16
    if source.labels is None:
        assert rows.column_names == ["image"]
        return
    assert list(rows["label"]) == list(NAMES) * 3
    images, labels = load_synthetic(tmp_path / "out", NAMES)
    assert images[:, 0, 0, 0].tolist() == [level(i) for i in range(6)] and labels.tolist() == [0, 1] * 3


def test_a_parquet_shard_is_bounded_and_names_its_images(source, tmp_path):
    write_images(tmp_path, source, 10, first_image=5, parquet=True)
    shards = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in shards] == [f"images-0000{i}.parquet" for i in range(3)]
    rows = [pq.read_table(path).to_pylist() for path in shards]
    assert [len(part) for part in rows] == [4, 4, 2]
    assert [row["image"]["path"] for part in rows for row in part] == [f"{i:06d}.png" for i in range(5, 15)]


def test_image_i_has_its_own_number_label_and_content_wherever_it_starts(source, tmp_path):
    write_images(tmp_path / "all", source, 9)
    write_images(tmp_path / "one", source, 1, first_image=7)
    every, one = contents(tmp_path / "all"), contents(tmp_path / "one")
    assert one["images/000007.png"] == every["images/000007.png"]
    rows = [list(csv.reader(part["images/metadata.csv"].decode().splitlines())) for part in (every, one)]
    assert rows[1] == [rows[0][0], rows[0][8]]


def dying(patch, count):
    """Writes and renames work so many times; the next leaves its file cut off and ends all, as a kill does."""
    left = iter(range(count))

    def step(function):
        def run(place, other):
            if next(left, None) is None:
                with open(place, "wb") as file:
                    file.write(b"cut")
                raise KeyboardInterrupt
            return function(place, other)

        return run

    patch.setattr(os, "replace", step(os.replace))
    patch.setattr(Path, "write_bytes", step(Path.write_bytes))


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(0, 24), min_size=1, max_size=3), parquet=st.booleans())
def test_a_killed_command_goes_on_to_the_same_files_and_leaves_none_half_written(
    source, tmp_path_factory, stops, parquet
):
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stopped")
    write_images(whole, source, 10, parquet=parquet)
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, stop)
            try:
                write_images(folder, source, 10, parquet=parquet)
            except KeyboardInterrupt:
                pass
        finished = {name: part for name, part in contents(folder).items() if not name.endswith(".partial")}
        assert finished.items() <= contents(whole).items()
    write_images(folder, source, 10, parquet=parquet)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("parquet", [False, True])
def test_going_on_makes_again_at_most_one_shard(source, tmp_path, parquet):
    made = []

    @dataclasses.dataclass(frozen=True)
    class Stopping(Painted):
        def batches(self, ids):
            for batch, images in super().batches(ids):
                if 9 in batch and 9 not in made:
                    made.append(9)
                    raise KeyboardInterrupt
                made.extend(batch)
                yield batch, images

    stopping = Stopping(**vars(source))
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path, stopping, 10, parquet=parquet)
    assert not (tmp_path / "images" / "metadata.csv").exists()
    before = len(made)
    write_images(tmp_path, stopping, 10, parquet=parquet)
    assert made[before:] == [8, 9]
    write_images(tmp_path, stopping, 10, parquet=parquet)
    assert len(made) == before + 2, "a finished folder is made again"


@pytest.mark.parametrize("parquet", [False, True])
def test_never_more_than_a_shard_is_in_memory(source, tmp_path, parquet, monkeypatch):
    alive, most = [0], []

    class Content(bytes):
        def __del__(self):
            alive[0] -= 1

    def png(image, encode=image_files._png):
        alive[0] += 1
        most.append(alive[0])
        return Content(encode(image))

    monkeypatch.setattr(image_files, "_png", png)
    write_images(tmp_path, source, 40, parquet=parquet)
    assert SHARD <= max(most) <= SHARD + 1  # and the grid


def test_other_options_into_the_same_folder_are_refused_with_the_difference(source, tmp_path):
    write_images(tmp_path, source, 2)
    before = contents(tmp_path)
    other = dataclasses.replace(source, sample=dataclasses.replace(source.sample, seed=5, scheduler="ddpm"))
    with pytest.raises(UserError, match="scheduler: fidelity before, ddpm now; seed: 0 before, 5 now"):
        write_images(tmp_path, other, 2)
    for arguments in ({"num_images": 3}, {"num_images": 2, "first_image": 1}, {"num_images": 2, "parquet": True}):
        with pytest.raises(UserError, match="asked for otherwise"):
            write_images(tmp_path, source, **arguments)
    unet = copy.deepcopy(source.base.unet)
    unet.conv_out.bias.data += 1
    with pytest.raises(UserError, match="adapter: .* before, .* now"):
        write_images(tmp_path, dataclasses.replace(source, base=dataclasses.replace(source.base, unet=unet)), 2)
    assert contents(tmp_path) == before
    write_images(tmp_path, dataclasses.replace(source, batch_size=1), 2)  # memory only


def test_a_folder_with_anything_else_in_it_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_images(tmp_path, source, 2)
    with pytest.raises(UserError, match="not empty"):
        write_images(tmp_path / "notes.txt", source, 2)
    (tmp_path / image_files.RECORD).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        write_images(tmp_path, source, 2)


def test_prompts_are_written_as_text_even_with_commas_and_line_breaks(source, tmp_path):
    prompts = ('a cat, "asleep"', "two\nlines", "été")
    told = dataclasses.replace(source, prompts=prompts)
    write_images(tmp_path / "png", told, 4)
    with open(tmp_path / "png" / "images" / "metadata.csv", newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [*prompts, prompts[0]]
    write_images(tmp_path / "parquet", told, 3, parquet=True)
    table = pq.read_table(tmp_path / "parquet" / "images")
    assert table["text"].to_pylist() == list(prompts)


def test_large_images_make_small_shards_and_small_grids(source, tmp_path, monkeypatch):
    pixels = source.base.image_channels * 16 * 16
    monkeypatch.setattr(image_files, "SHARD_BYTES", 2 * pixels)
    assert shard_size(source) == shard_size(dataclasses.replace(source, batch_size=1)) == 2
    monkeypatch.setattr(image_files, "SHARD_BYTES", pixels - 1)
    assert shard_size(source) == 1
    monkeypatch.setattr(image_files, "SHARD_BYTES", 2**28)
    monkeypatch.setattr(image_files, "GRID_SIDE", 32)
    write_images(tmp_path, source, 9)
    assert Image.open(tmp_path / "grid.png").size == (2 * (2 * 17 + 1),) * 2


def test_the_record_says_what_makes_the_images_again(source, tmp_path):
    write_images(tmp_path, source, 2)
    record = json.loads((tmp_path / image_files.RECORD).read_text())
    assert record["seed"] == 0 and record["scheduler"] == "fidelity" and record["num_images"] == 2
    assert record["class_labels"] == (source.labels and list(source.labels))
    assert Image.open(BytesIO((tmp_path / "images" / "000001.png").read_bytes())).size == (16, 16)
