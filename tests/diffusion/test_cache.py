"""Records as a base sees them: made once, each by itself, kept in the private folder."""

import errno
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_bases import latent, stable_diffusion_1, stable_diffusion_xl

from dp_peft_diffusion.diffusion import records
from dp_peft_diffusion.diffusion.augmentation import augment
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples, source_digest
from dp_peft_diffusion.diffusion.decoding import decode
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.randomness import hkdf_sha256
from dp_peft_diffusion.recipe import Data
from dp_peft_diffusion.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SIDE = 16  # of the tiny bases


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 18, 3), dtype=np.uint8)
    file = pa.BufferOutputStream()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue().to_pybytes()


PNGS = [png(seed) for seed in range(6)]


def table(path: Path, images: list, **columns) -> Data:
    """Rows in one parquet file; `caption` is the column of captions if there is one."""
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), **columns}), path)
    return Data(dataset_name=str(path), label_column=None, caption_column="caption" if "caption" in columns else None)


@pytest.fixture(scope="module")
def latent_base(tmp_path_factory) -> BaseModel:
    return load_base(str(latent(tmp_path_factory.mktemp("latent") / "base")))


@pytest.fixture(scope="module")
def text_base(tmp_path_factory) -> BaseModel:
    return load_base(str(stable_diffusion_1(tmp_path_factory.mktemp("text") / "base")))


class FakeText:
    """The length of a prompt, whatever it is."""

    null = {"encoder_hidden_states": torch.zeros(1, 2, 3)}  # noqa: RUF012

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.tensor([len(str(prompts[0]))]).expand(1, 2, 3)}


@dataclass(frozen=True)
class FakeBase:
    """Latents that are every second pixel; infinite where an image is all white."""

    digest: str = "fake"
    resolution: int = SIDE
    image_channels: int = 3
    is_latent: bool = True
    input_shape: tuple[int, ...] = (3, SIDE // 2, SIDE // 2)
    text: FakeText | None = FakeText()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        white = (images == 1).all(dim=(1, 2, 3), keepdim=True)
        return torch.where(white, torch.inf, images[:, :, ::2, ::2])


def same(one: PrivateImages, other: PrivateImages) -> bool:
    ids = range(-1, len(one))
    pairs = zip(_flat(one, ids), _flat(other, ids), strict=True)
    facts = [(x.class_names, x.problems, x.source_digest, x.content_digest) for x in (one, other)]
    return facts[0] == facts[1] and all(torch.equal(*pair) for pair in pairs)


def _flat(images: PrivateImages, ids) -> list[torch.Tensor]:
    clean, labels, weights, text = images.read(ids)
    return [clean, labels, weights, *text.values()]


def is_null(images: PrivateImages, i: int) -> bool:
    return all(torch.equal(*pair) for pair in zip(_flat(images, [i]), _flat(images, [-1]), strict=True))


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The sizes of what was decoded."""
    seen = []

    def spy(image, *arguments):
        seen.append(len(image))
        return decode(image, *arguments)

    monkeypatch.setattr(records, "decode", spy)
    return seen


# What is kept


def test_a_latent_base_keeps_what_it_makes_of_each_image_alone(tmp_path, latent_base):
    examples = open_examples(table(tmp_path / "x.parquet", PNGS), latent_base, None).read(range(6))
    pixels = [torch.tensor(decode(image, SIDE, 3, False).copy())[None].float() / 127.5 - 1 for image in PNGS]
    expected = torch.stack([latent_base.encode(image) for image in pixels])
    assert torch.equal(examples.clean, expected) and examples.clean.dtype == torch.float32
    assert examples.weights.tolist() == [1] * 6 and examples.text == {}


def test_a_latent_base_keeps_as_many_changed_versions_as_asked_for(tmp_path, latent_base):
    data = replace(table(tmp_path / "x.parquet", PNGS[:2]), augmentations=("flip", "shift"), augmentation_variants=3)
    clean = open_examples(data, latent_base, None, seed=7).read(range(2)).clean
    key = hkdf_sha256((7).to_bytes(8, "little"), b"", b"dp-peft/1/variants", 16)
    for i, image in enumerate(PNGS[:2]):
        pixels = torch.tensor(decode(image, SIDE, 3, False).copy())[None].float() / 127.5 - 1
        for v in range(3):
            changed = augment(pixels, data.augmentations, key, v, np.array([i]), 1)[:, 0]
            assert torch.equal(clean[i, v], latent_base.encode(changed)[0])
    assert len({clean[i, v].numpy().tobytes() for i in range(2) for v in range(3)}) == 6
    assert not torch.equal(clean, open_examples(data, latent_base, None, seed=8).read(range(2)).clean)


def test_a_pixel_base_keeps_the_pixels_and_changes_nothing(tmp_path):
    data = table(tmp_path / "x.parquet", PNGS)
    plain = open_examples(data, PixelEncoder(SIDE, 3), None)
    changed = open_examples(replace(data, augmentations=("flip",)), PixelEncoder(SIDE, 3), None)
    assert same(plain, changed)
    assert plain.read([2]).clean.shape == (1, 1, 3, SIDE, SIDE)


@pytest.mark.parametrize("make", [stable_diffusion_1, stable_diffusion_xl])
def test_captions_are_kept_as_the_text_encoders_give_them(tmp_path, make):
    base, captions = load_base(str(make(tmp_path / "base"))), ["a cat", "", "cat dog cat dog " * 9]
    images = open_examples(table(tmp_path / "x.parquet", PNGS[:3], caption=pa.array(captions)), base, None)
    examples = images.read([0, 1, 2, -1])
    assert set(examples.text) == set(base.text.null)
    for name, kept in examples.text.items():
        for i, caption in enumerate(captions):
            assert torch.equal(kept[i], base.text.encode([caption])[name][0].half().float())
        assert not kept[3].any()
    assert examples.weights.tolist() == [1, 1, 1, 0] and images.class_names is None


def test_captions_of_an_image_folder_come_from_its_metadata_file(tmp_path):
    for name in ("a.png", "deep/b.png", "c.png", "d.png", "e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNGS[0])
    lines = [
        b'{"file_name": "deep/b.png", "says": "four"}',
        b"no json\xff",
        b"[" * 100_000,
        b'["file_name"]',
        b'{"file_name": ["a.png"], "says": "x"}',
        b'{"file_name": "c.png"}',
        b'{"file_name": "d.png", "says": ["x", "y"]}',
        b'{"file_name": "a.png", "says": "seventy"}',
        b'{"file_name": "c.png", "says": "of several lines the first counts"}',
        b'{"file_name": "a.png", "says": "so it does here"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    images = open_examples(Data(dataset_name=str(tmp_path), caption_column="says"), FakeBase(), None)
    examples = images.read(range(5))  # a, c, d, deep/b, e
    assert examples.weights.tolist() == [1, 0, 0, 1, 0] and images.class_names is None
    assert examples.text["encoder_hidden_states"][:, 0, 0].tolist() == [7, 0, 0, 4, 0]


def test_captions_that_no_line_of_a_metadata_file_has_are_null_records_and_no_error(tmp_path):
    (tmp_path / "1.png").write_bytes(PNGS[0])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "secret"}\n')
    images = open_examples(Data(dataset_name=str(tmp_path), caption_column="says"), FakeBase(), None)
    assert is_null(images, 0) and "secret" not in str(images.problems)


# Null records


def test_what_cannot_be_encoded_has_exactly_the_bytes_of_the_null_record(tmp_path):
    white = pa.BufferOutputStream()
    Image.new("RGB", (4, 4), "white").save(white, "PNG")
    images = [PNGS[0], b"broken", None, white.getvalue().to_pybytes(), PNGS[1], PNGS[2]]
    captions = pa.array(["a"] * 4 + [None, "b" * 70_000])  # the last would overflow float16, and is cut before
    opened = open_examples(table(tmp_path / "x.parquet", images, caption=captions), FakeBase(), tmp_path / "cache")
    assert opened.read(range(6)).weights.tolist() == [1, 0, 0, 0, 0, 1]
    assert all(is_null(opened, i) for i in range(1, 5))
    assert [problem.id for problem in opened.problems] == [1, 2, 3, 4]
    assert "infinite" in opened.problems[2].reason
    for file in (tmp_path / "cache").glob("*.npy"):
        rows = np.load(file)
        assert not rows[[1, 2, 3, 4, 6]].any() and (file.stem == "labels" or rows[[0, 5]].any())


ODD = [
    "nul \0 nul",
    "\u202eterces",
    "\U0001f600" * 30,
    "x" * 10**6,
    "cat " * 250_000,
    "<|endoftext|>",
    "\n\t",
    "a\u0301",
]
NO_TEXT = ["half \ud800 of a pair", 7, None, ["a", "b"], {"a": 1}, True]


def test_no_caption_however_odd_stops_a_run_or_is_told(tmp_path, text_base, capfd, caplog, recwarn):
    captions = [*ODD, *NO_TEXT, "secret \udc80"]
    for i, caption in enumerate(captions):
        Image.new("RGB", (4, 4), (9 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
        with open(tmp_path / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"{i:02d}.png", "caption": caption}) + "\n")
    images = open_examples(Data(dataset_name=str(tmp_path), caption_column="caption"), text_base, None)
    examples = images.read(range(len(captions)))
    assert examples.weights.tolist() == [1] * len(ODD) + [0] * 7
    assert all(is_null(images, i) for i in range(len(ODD), len(captions)))
    assert {problem.reason for problem in images.problems} == {"ValueError: its caption cannot be encoded"}
    cut = text_base.text.encode(["x" * records.MAX_CAPTION])["encoder_hidden_states"]
    assert torch.equal(examples.text["encoder_hidden_states"][[3]], cut.half().float())
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.text, len(recwarn)) == ("", "", "", 0)


def test_captions_that_are_no_utf_8_are_null_records(tmp_path):
    column = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"\xff\xfeok"))
    images = open_examples(table(tmp_path / "x.parquet", PNGS[:2], caption=column), FakeBase(), None)
    assert images.read([0, 1]).weights.tolist() == [0, 1]


def test_a_machine_without_memory_is_told_and_not_taken_for_a_broken_record(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    for kind in (FakeBase, FakeText):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(kind, "encode", full)
            open_examples(table(tmp_path / "x.parquet", PNGS, caption=pa.array(["a"] * 6)), FakeBase(), None)


def test_a_record_is_kept_with_the_same_bytes_whatever_the_others_are(tmp_path, text_base):
    captions = ["a cat", "dog", "", "cat cat", "do", "ca"]
    options = dict(augmentations=("crop", "color"), augmentation_variants=2)
    data = table(tmp_path / "x.parquet", PNGS, caption=pa.array(captions))
    alone = table(tmp_path / "y.parquet", [None, None, PNGS[2], None], caption=pa.array([None, None, "", None]))
    both = [open_examples(replace(each, **options), text_base, None) for each in (data, alone)]
    for one, other in zip(*(_flat(images, [2]) for images in both), strict=True):
        assert torch.equal(one, other)
    moved = table(tmp_path / "z.parquet", PNGS[3:], caption=pa.array(captions[3:]))
    both = [open_examples(data, text_base, None), open_examples(moved, text_base, None)]
    for one, other in zip(_flat(both[0], [3, 4, 5]), _flat(both[1], [0, 1, 2]), strict=True):
        assert torch.equal(one, other)


# Kept between runs


def rows(path: Path, images=PNGS, captions=("a", "b", "c", None, "e", "f"), owners="uuvvww") -> Data:
    data = table(path, images, caption=pa.array(captions), owner=pa.array(list(owners)))
    return replace(data, group_column="owner", max_examples_per_group=2)


def test_a_cache_that_fits_is_read_again_bit_for_bit_and_nothing_is_decoded(tmp_path, decoded):
    data, cache = rows(tmp_path / "x.parquet"), tmp_path / "private" / "cache"
    first = open_examples(data, FakeBase(), cache)
    assert len(decoded) == 6 and first.problems
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    second = open_examples(data, FakeBase(), cache)
    assert same(first, second) and len(decoded) == 6
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    shutil.copy(tmp_path / "x.parquet", tmp_path / "elsewhere.parquet")
    os.rename(tmp_path / "elsewhere.parquet", tmp_path / "x.parquet")  # the same rows, written later
    assert same(first, open_examples(data, FakeBase(), cache)) and len(decoded) == 6


CHANGES = {
    "an image": lambda path: (rows(path, [*PNGS[:5], PNGS[0]]), FakeBase(), 0),
    "an image that is gone": lambda path: (rows(path, [*PNGS[:5], None]), FakeBase(), 0),
    "the order of images": lambda path: (rows(path, PNGS[::-1]), FakeBase(), 0),
    "a caption": lambda path: (rows(path, captions=("a", "b", "c", None, "e", "g")), FakeBase(), 0),
    "a caption that comes": lambda path: (rows(path, captions=("a", "b", "c", "d", "e", "f")), FakeBase(), 0),
    "a group": lambda path: (rows(path, owners="uuuvww"), FakeBase(), 0),
    "a row less": lambda path: (rows(path, PNGS[:5], ("a", "b", "c", None, "e"), "uuvvw"), FakeBase(), 0),
    "the cap": lambda path: (replace(rows(path), max_examples_per_group=1), FakeBase(), 0),
    "the crop": lambda path: (replace(rows(path), center_crop=True), FakeBase(), 0),
    "augmentations": lambda path: (replace(rows(path), augmentations=("flip",)), FakeBase(), 0),
    "no captions": lambda path: (replace(rows(path), caption_column=None), FakeBase(), 0),
    "the base": lambda path: (rows(path), FakeBase(digest="another"), 0),
    "the resolution": lambda path: (rows(path), FakeBase(resolution=8, input_shape=(3, 4, 4)), 0),
    "the seed": lambda path: (rows(path), FakeBase(), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_does_not_fit_is_made_anew(tmp_path, decoded, change):
    open_examples(rows(tmp_path / "x.parquet"), FakeBase(), tmp_path / "cache")
    data, base, seed = CHANGES[change](tmp_path / "x.parquet")
    before = len(decoded)
    again = open_examples(data, base, tmp_path / "cache", seed)
    assert len(decoded) > before
    assert same(again, open_examples(data, base, None, seed))
    after = len(decoded)
    assert same(again, open_examples(data, base, tmp_path / "cache", seed)) and len(decoded) == after


@pytest.mark.parametrize("changed", ["diffusers", "numpy", "pillow", "torch", "transformers", "the package"])
def test_a_cache_that_other_code_made_is_made_anew(tmp_path, monkeypatch, decoded, changed):
    data, cache, version = rows(tmp_path / "x.parquet"), tmp_path / "cache", importlib.metadata.version
    first = open_examples(data, FakeBase(), cache)
    if changed == "the package":
        monkeypatch.setattr(records, "code_digest", lambda: "other")
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9" if name == changed else version(name))
    assert same(first, open_examples(data, FakeBase(), cache)) and len(decoded) == 12
    assert same(first, open_examples(data, FakeBase(), cache)) and len(decoded) == 12


def test_labels_and_class_names_belong_to_what_a_cache_was_made_from(tmp_path, decoded):
    def opened(labels, names=("a", "b")):
        data = replace(table(tmp_path / "x.parquet", PNGS[:2], label=pa.array(labels)), label_column="label")
        return open_examples(replace(data, class_names=names), PixelEncoder(SIDE, 3), tmp_path / "cache")

    assert opened([0, 1]).read([0, 1]).labels.tolist() == [0, 1]
    assert opened([0, 0]).read([0, 1]).labels.tolist() == [0, 0]
    assert opened([0, 0], ("b", "a")).class_names == ("b", "a")
    assert opened(["a", "a"], ("b", "a")).read([0, 1]).labels.tolist() == [1, 1]
    assert len(decoded) == 8


def test_what_the_source_calls_its_classes_belongs_to_what_a_cache_was_made_from(tmp_path):
    for own, labels in ((("a", "b"), [0, 1]), (("b", "a"), [1, 0])):  # the same numbers, of other classes
        data = table(tmp_path / "x.parquet", PNGS[:2], label=pa.array([0, 1]))
        stored, kind = pq.read_table(tmp_path / "x.parquet"), datasets.ClassLabel(names=list(own))
        features = datasets.Features({"image": datasets.Value("binary"), "label": kind})
        pq.write_table(stored.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "x.parquet")
        named = replace(data, label_column="label", class_names=("a", "b"))
        images = open_examples(named, PixelEncoder(SIDE, 3), tmp_path / "cache")
        assert images.read([0, 1]).labels.tolist() == labels


def _cut(cache: Path) -> None:
    os.truncate(cache / "clean.npy", (cache / "clean.npy").stat().st_size - 5)


def _flipped(cache: Path) -> None:
    content = bytearray((cache / "encoder_hidden_states.npy").read_bytes())
    content[-20] ^= 1
    (cache / "encoder_hidden_states.npy").write_bytes(content)


DAMAGE = {
    "a file cut": _cut,
    "a file empty": lambda cache: os.truncate(cache / "weights.npy", 0),
    "a file gone": lambda cache: (cache / "labels.npy").unlink(),
    "one bit": _flipped,
    "no description": lambda cache: (cache / "cache.json").unlink(),
    "half a description": lambda cache: os.truncate(cache / "cache.json", 40),
    "another description": lambda cache: (cache / "cache.json").write_text("[]"),
    "the folder gone": lambda cache: shutil.rmtree(cache),
    "pickles": lambda cache: np.save(cache / "labels.npy", np.array([{}], object)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path, decoded, damage):
    data, cache = rows(tmp_path / "x.parquet"), tmp_path / "cache"
    first = open_examples(data, FakeBase(), None)
    open_examples(data, FakeBase(), cache)
    DAMAGE[damage](cache)
    assert same(first, open_examples(data, FakeBase(), cache)) and len(decoded) == 18


def test_a_run_killed_while_it_writes_leaves_nothing_that_is_taken_for_whole(tmp_path):
    data, partial = rows(tmp_path / "x.parquet"), tmp_path / "cache.partial"
    partial.mkdir()
    (partial / "clean.npy").write_bytes(b"half")
    (partial / "more").mkdir()
    images = open_examples(data, FakeBase(), tmp_path / "cache")
    assert same(images, open_examples(data, FakeBase(), None)) and not partial.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_stopped_while_it_decodes_leaves_no_files(tmp_path, monkeypatch, stop):
    def stopped(*arguments):
        raise stop

    open_examples(rows(tmp_path / "x.parquet"), FakeBase(), tmp_path / "cache")
    monkeypatch.setattr(records, "decode", stopped)
    with pytest.raises(stop):
        open_examples(rows(tmp_path / "x.parquet"), FakeBase(), tmp_path / "cache", seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.parquet"]


def test_a_disk_that_fills_up_is_told_as_it_is_and_freed(tmp_path):
    data, limits = table(tmp_path / "x.parquet", PNGS), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a file may not grow further: the nearest to it
    try:
        with pytest.raises(OSError) as caught:
            open_examples(data, PixelEncoder(SIDE, 3), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.parquet"]


def test_nobody_else_may_read_a_cache(tmp_path):
    before = os.umask(0)
    try:
        open_examples(rows(tmp_path / "x.parquet"), FakeBase(), tmp_path / "run.private" / "cache")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run.private").rglob("*")}
    modes["run.private"] = (tmp_path / "run.private").stat().st_mode & 0o777
    files = ["cache.json", "clean.npy", "labels.npy", "weights.npy", "encoder_hidden_states.npy"]
    assert modes == {"run.private": 0o700, "cache": 0o700} | dict.fromkeys(files, 0o600)


@pytest.mark.parametrize("system_has_unnamed_files", [True, False])
def test_without_a_folder_no_named_file_ever_holds_a_record(tmp_path, monkeypatch, system_has_unnamed_files):
    scratch, seen, mapped, memmap = tmp_path / "scratch", [], [], np.memmap
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if not system_has_unnamed_files:
        monkeypatch.setattr("tempfile._O_TMPFILE_WORKS", False)

    def spy_on_decoding(*arguments):
        seen.extend(scratch.rglob("*"))
        return decode(*arguments)

    def spy_on_mapping(file, *arguments, **options):
        mapped.append(os.stat(file.fileno()))
        return memmap(file, *arguments, **options)

    monkeypatch.setattr(records, "decode", spy_on_decoding)
    monkeypatch.setattr(np, "memmap", spy_on_mapping)
    images = open_examples(table(tmp_path / "x.parquet", PNGS), PixelEncoder(64, 3), None)
    assert seen == list(scratch.iterdir()) == []
    assert [(stat.st_nlink, stat.st_mode & 0o777) for stat in mapped] == [(0, 0o600)] * 3
    expected = torch.tensor(decode(PNGS[5], 64, 3, False).copy()).float() / 127.5 - 1
    assert torch.equal(images.read([5]).clean[0, 0], expected)


def test_the_cache_of_a_run_that_stopped_before_it_began_is_its_own_and_goes_when_it_is_done(tmp_path):
    run = RunFolder(tmp_path / "run")
    for folder in (run.cache, run.cache.with_name("cache.partial")):
        folder.mkdir(parents=True)
    assert run.check_usable("recipe") is False
    run.close()
    assert not run.cache.exists()


# Digests


def test_captions_belong_to_the_content_and_not_to_the_source(tmp_path):
    def opened(captions):
        return open_examples(table(tmp_path / "x.parquet", PNGS[:2], caption=pa.array(captions)), FakeBase(), None)

    one, other = opened(["a", "b"]), opened(["a", "bb"])
    assert one.content_digest != other.content_digest
    plain = Data(dataset_name=str(tmp_path / "x.parquet"), label_column=None)
    assert one.source_digest == other.source_digest == source_digest(plain)


# Faults of the data set


def test_captions_that_cannot_be_had_are_refused_with_the_way_out(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    files, folder = tmp_path / "files", Data(dataset_name=str(tmp_path), caption_column="says")
    files.mkdir()
    numbers = table(files / "1.parquet", PNGS[:1], caption=pa.array([7]))
    lists = table(files / "2.parquet", PNGS[:1], caption=pa.array([["a"]]))
    text = table(files / "3.parquet", PNGS[:1], caption=pa.array(["a"]))
    faults = [
        (text, PixelEncoder(SIDE, 3), "--caption_column caption: the base takes no prompts"),
        (Data(caption_column="says"), FakeBase(image_channels=1), "builtin:digits has no captions"),
        (folder, FakeBase(), "has no metadata.jsonl. Write one line for each image"),
        (numbers, FakeBase(), "'caption' holds int64, not text. Set --caption_column"),
        (lists, FakeBase(), "Set --caption_column"),
        (replace(text, caption_column="says"), FakeBase(), "no column 'says'; it has image, caption. Set --caption"),
    ]
    for data, base, message in faults:
        with pytest.raises(UserError) as caught:
            open_examples(data, base, None)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "captions",
    [
        pytest.param(pa.array(["a", "bb"], pa.large_string()), id="long text"),
        pytest.param(pa.array(["a", "bb"]).dictionary_encode(), id="categories"),
    ],
)
def test_captions_may_be_text_of_any_kind(tmp_path, captions):
    images = open_examples(table(tmp_path / "x.parquet", PNGS[:2], caption=captions), FakeBase(), None)
    assert images.read([0, 1]).text["encoder_hidden_states"][:, 0, 0].tolist() == [1, 2]


# Memory


@pytest.mark.slow
def test_opening_and_reading_20_000_images_takes_no_more_memory_than_a_few():
    """RLIMIT_DATA counts what a process allocates, and not the files it maps."""
    code = """
import io, resource, tempfile
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from PIL import Image
from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.recipe import Data

N, SIDE = 20_000, 64
with tempfile.TemporaryDirectory() as folder:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "BMP")
    data = Data(dataset_name=folder + "/x.parquet", label_column=None)
    for rows in (10, N):
        pq.write_table(pa.table({"image": [file.getvalue()] * rows}), data.dataset_name, row_group_size=500)
        if rows == N:
            used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
            limit = 1024 * used + 60_000_000  # the pixels alone would be 246 MB
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        images = open_examples(data, PixelEncoder(SIDE, 3), Path(folder) / "cache")
        images.read(np.arange(10)), images.content_digest
    assert len(images) == N and images.read([N - 1]).weights.item() == 1 and not images.problems
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
