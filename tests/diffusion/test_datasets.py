import gzip
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_dataset, source_digest
from dp_peft_diffusion.diffusion.datasets import open_examples as open_encoded
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.diffusion.listing import _resolve_hub
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Data

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, shape=(10, 12, 3)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb_png(side: int) -> bytes:
    """A valid PNG of a few hundred bytes to kilobytes that claims side x side pixels."""
    pixels = zlib.compressobj(9)
    body = b"".join(pixels.compress(bytes(1 + side // 8)) for _ in range(side)) + pixels.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PNG = encoded(noise(0))
BROKEN = {
    "zero bytes": b"",
    "text": b"this is no image",
    "truncated png": PNG[: len(PNG) // 2],
    "truncated jpeg": encoded(noise(0, (64, 64, 3)), "JPEG")[:700],
    "flipped bits": PNG[:60] + bytes(255 - byte for byte in PNG[60:]),
    "bomb": bomb_png(8200),  # 67.2 million pixels, below the limit where PIL itself raises
    "large bomb": bomb_png(16),  # patched below to claim 10 billion pixels
    "float tiff": encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "32-bit tiff": encoded(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"),
    "broken lzw tiff": encoded(noise(0), "TIFF", compression="tiff_lzw")[:200] + bytes(300),
}
BROKEN["large bomb"] = BROKEN["large bomb"].replace(struct.pack(">II", 16, 16), struct.pack(">II", 100_000, 100_000))


def cut(image: Image.Image, kind: str, share: float, **options) -> bytes:
    content = encoded(image, kind, **options)
    return content[: int(share * len(content))]


MORE_BROKEN = {
    "signature only": PNG[:8],
    "no pixels": PNG[:33] + chunk(b"IEND", b""),
    "pixels that do not unpack": PNG[:33] + chunk(b"IDAT", bytes(40)) + chunk(b"IEND", b""),
    "wrong checksum": PNG[:29] + bytes(4) + PNG[33:],
    "0 x 0": PNG[:16] + bytes(8) + PNG[24:],
    "20,000 x 20,000": bomb_png(16)[:16] + struct.pack(">II", 20_000, 20_000) + bomb_png(16)[24:],
    "colour type 9": PNG[:25] + bytes([9]) + PNG[26:],
    "png of 16 bits cut": cut(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG", 0.5),
    "animated png cut": cut(noise(1), "PNG", 0.4, save_all=True, append_images=[noise(2)]),
    "gif cut": cut(noise(1, (64, 64)), "GIF", 0.5),
    "animated gif cut": cut(noise(1, (64, 64)), "GIF", 0.2, save_all=True, append_images=[noise(2, (64, 64))]),
    "gif without a frame": encoded(noise(1), "GIF")[:13] + b";",
    "jpeg start only": b"\xff\xd8",
    "jpeg without a scan": encoded(noise(1), "JPEG")[:100] + b"\xff\xd9",
    "cmyk jpeg cut": cut(Image.new("CMYK", (64, 64), (9, 8, 7, 6)), "JPEG", 0.5),
    "webp cut": cut(noise(1, (64, 64, 3)), "WEBP", 0.5, lossless=True),
    "webp box only": b"RIFF\x00\x00\x00\x00WEBP",
    "bmp cut": cut(noise(1), "BMP", 0.5),
    "bmp too wide": b"".join((encoded(noise(1), "BMP")[:18], struct.pack("<i", 2**30), encoded(noise(1), "BMP")[22:])),
    "tiff cut": cut(noise(1, (64, 64, 3)), "TIFF", 0.5),
    "tiff without tags": b"II*\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    "tiff that points outside": b"II*\x00" + struct.pack("<I", 2**31),
    "infinite tiff": encoded(Image.fromarray(np.full((4, 4), np.inf, np.float32)), "TIFF"),
    "negative tiff": encoded(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"),
    "ppm of words": b"P6 wide high 255\n" + bytes(30),
    "ppm cut": cut(noise(1), "PPM", 0.5),
    "ppm without levels": b"P6 2 2 0\n" + bytes(12),
    "jpeg 2000 cut": cut(noise(1, (64, 64, 3)), "JPEG2000", 0.3),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!doctype html><title>404</title>",
    "pdf": encoded(noise(1), "PDF"),
    "icon": encoded(noise(1, (16, 16, 3)), "ICO"),
    "pickle": pickle.dumps(noise(1)),
    "gzip": gzip.compress(PNG, mtime=0),
    "a million zeros": bytes(10**6),
    "random bytes": np.random.default_rng(3).bytes(500),
    "no image": None,
}


def open_examples(data: Data, side: int, channels: int) -> PrivateImages:
    return open_encoded(data, PixelEncoder(side, channels), None)


def batch(images: PrivateImages, ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (b, c, s, s), labels (b,) and weights (b,)."""
    clean, labels, weights, text = images.read(ids)
    assert clean.shape[1] == 1 and text == {}
    return clean[:, 0], labels, weights


def image_folder(root: Path, files: dict[str, bytes]) -> Data:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return Data(dataset_name=str(root))


def parquet(path: Path, images: list, labels=None, names: tuple[str, ...] | None = None, **columns) -> Data:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns["image"] = pa.array([None if image is None else {"bytes": image, "path": None} for image in images], kind)
    if labels is not None:
        columns["label"] = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table(columns)
    if names is not None:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return Data(dataset_name=str(path), label_column=None if labels is None else "label")


# Digits


def test_digits_are_the_1797_scans_split_by_a_public_shuffle():
    parts = {split: open_examples(Data(split=split), SIDE, 1) for split in ("train", "test", "choose", "report")}
    assert {split: len(part) for split, part in parts.items()} == dict(train=1437, test=360, choose=180, report=180)
    images, labels, weights = (
        torch.cat(pair)
        for pair in zip(*(batch(parts[s], range(len(parts[s]))) for s in ("train", "test")), strict=True)
    )
    assert parts["train"].class_names == tuple("0123456789")
    assert bool((weights == 1).all())
    stored = sorted(
        (label, *scan.astype(int).ravel()) for label, scan in zip(*reversed(load_digits(return_X_y=True)), strict=True)
    )
    read = (images * 0.5 + 0.5) * 16
    assert (
        sorted((int(y), *np.rint(x).astype(int)) for y, x in zip(labels, read.flatten(1).numpy(), strict=True))
        == stored
    )
    halves = torch.cat([parts[split].read(range(180)).clean for split in ("choose", "report")])
    assert torch.equal(halves, parts["test"].read(range(360)).clean)


def test_an_unknown_split_of_digits_is_refused_with_the_splits_there_are():
    with pytest.raises(UserError, match="'validation'.*train, test, choose, report"):
        open_examples(Data(split="validation"), SIDE, 1)


# What a record is


def test_the_id_is_the_position_among_sorted_paths_whatever_order_they_were_written(tmp_path):
    names = ["b/2.png", "a/10.png", "b/1.PNG", "a/deep/3.jpeg", "a/9.gif"]
    order = sorted(names, key=lambda name: tuple(name.split("/")))
    contents = {name: encoded(Image.new("L", (3, 3), 20 * order.index(name))) for name in names}
    images = open_examples(image_folder(tmp_path, contents), 1, 1)
    values, labels, _ = batch(images, range(5))
    assert ((values.flatten() + 1) * 127.5).round().int().tolist() == [0, 20, 40, 60, 80]
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert images.class_names == ("a", "b")


def test_only_visible_regular_files_with_an_image_extension_are_rows(tmp_path):
    files = {
        "a/1.png": PNG,
        "a/notes.txt": PNG,
        "a/.2.png": PNG,
        ".cache/3.png": PNG,
        "a/.thumbs/4.png": PNG,
        "a/5.eps": PNG,
    }
    data = image_folder(tmp_path, files)
    (tmp_path / "a" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert len(open_examples(data, SIDE, 3)) == 1


def test_class_folders_may_be_links(tmp_path):
    image_folder(tmp_path / "elsewhere", {"1.png": PNG})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    images = open_examples(Data(dataset_name=str(tmp_path / "data")), SIDE, 3)
    assert (len(images), images.class_names, images.problems) == (1, ("cat",), [])


records = st.lists(st.one_of(st.integers(0, 50), st.sampled_from(sorted(BROKEN))), min_size=1, max_size=12)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=records, as_folder=st.booleans())
def test_broken_records_among_good_ones_change_neither_n_nor_any_good_tensor(tmp_path_factory, records, as_folder):
    root = tmp_path_factory.mktemp("mix")
    contents = [BROKEN[record] if isinstance(record, str) else encoded(noise(record)) for record in records]
    if as_folder:
        data = image_folder(root, {f"{index % 2}/{index:03d}.png": content for index, content in enumerate(contents)})
        order = [index for rest in (0, 1) for index in range(rest, len(records), 2)]
    else:
        labels = [index % 2 for index in range(len(records))]
        data = parquet(root / "rows.parquet", contents, labels, ("0", "1"))
        order = list(range(len(records)))
    images = open_examples(data, SIDE, 3)
    assert len(images) == len(records)
    for position, index in enumerate(order):
        if isinstance(records[index], str):
            expected = batch(images, [-1])
        else:
            square = np.asarray(noise(records[index]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            expected = (
                torch.tensor(square / 127.5 - 1).permute(2, 0, 1)[None].float(),
                torch.tensor([index % 2]),
                torch.ones(1),
            )
        for read, wanted in zip(batch(images, [position]), expected, strict=True):
            assert read.dtype == wanted.dtype
            assert torch.allclose(read, wanted, atol=1e-6)
    assert [problem.id for problem in images.problems] == [
        p for p, i in enumerate(order) if isinstance(records[i], str)
    ]


def test_the_null_record_is_black_with_label_and_weight_zero():
    pixels, labels, weights = batch(open_examples(Data(), SIDE, 1), [-1, 3, -1])
    assert torch.equal(pixels[0], torch.full((1, SIDE, SIDE), -1.0))
    assert torch.equal(pixels[2], pixels[0])
    assert labels[0] == labels[2] == 0
    assert weights.tolist() == [0, 1, 0]


@pytest.mark.parametrize("wrong", [-2, 1437])
def test_an_id_outside_the_rows_is_an_error(wrong):
    with pytest.raises(IndexError, match="-1 to 1436"):
        open_examples(Data(), SIDE, 1).read([0, wrong])


def test_an_empty_batch_reads_as_no_rows():
    images, labels, weights = batch(open_examples(Data(), SIDE, 1), np.zeros(0, np.int64))
    assert (images.shape, labels.shape, weights.shape) == ((0, 1, SIDE, SIDE), (0,), (0,))


def test_valid_arrays_leave_null_records_out(tmp_path):
    images = open_examples(image_folder(tmp_path, {"a/0.png": b"", "a/1.png": PNG, "b/2.png": PNG}), SIDE, 3)
    pixels, labels = images.valid_arrays()
    assert (pixels.shape, pixels.dtype, labels.tolist()) == ((2, 3, SIDE, SIDE), np.uint8, [0, 1])


def test_problems_name_row_file_and_reason(tmp_path):
    bad_name = os.fsdecode(b"a/\xff.png")
    images = open_examples(
        image_folder(tmp_path, {"a/1.png": b"", "a/2.png": PNG, bad_name: b"", "3.png": PNG}), SIDE, 3
    )
    by_name = {problem.name: problem for problem in images.problems}
    assert set(by_name) == {"3.png", "a/1.png", "a/\\udcff.png"}
    assert by_name["a/1.png"].id == 1
    assert "UnidentifiedImageError" in by_name["a/1.png"].reason
    assert "label None" in by_name["3.png"].reason


def test_broken_records_write_nothing_to_terminal_or_log(tmp_path, capfd, caplog, recwarn):
    strips = {
        f"{position}.tif": bytearray(encoded(noise(0), "TIFF", compression="tiff_lzw")) for position in range(8, 60)
    }
    for name, content in strips.items():  # libtiff complains about some of these on the bare file descriptor
        content[int(name[:-4])] ^= 255
    files = {name: bytes(content) for name, content in strips.items()}
    images = open_examples(image_folder(tmp_path, files | {f"{name}.png": BROKEN[name] for name in BROKEN}), SIDE, 3)
    assert images.problems
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.text, len(recwarn)) == ("", "", "", 0)


def test_a_bomb_is_refused_before_it_takes_memory():
    code = """
import sys
from dp_peft_diffusion.diffusion.decoding import decode

def peak():  # in kB; ru_maxrss would count what the parent had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

bomb = sys.stdin.buffer.read()
before = peak()
try:
    decode(bomb, 8, 3, False)
except ValueError as error:
    assert "13000 x 13000 pixels" in str(error)
assert peak() - before < 20_000, "more than 20 MB"
"""
    bomb = bomb_png(13_000)  # 169 million pixels, of which PIL only warns
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=bomb, check=True, cwd=ROOT)


# Decoding


def only(tmp_path: Path, content: bytes, channels: int, side: int = 1, name: str = "x.png", **options) -> np.ndarray:
    """The one image of a folder, as (c, s, s) in 0..255."""
    data = image_folder(tmp_path, {name: content})
    images = open_examples(Data(dataset_name=data.dataset_name, **options), side, channels)
    assert images.problems == []
    return np.rint((images.read([0]).clean[0, 0].numpy() + 1) * 127.5).astype(int)


GREY16 = np.array([[0, 128, 129, 65535]], np.uint16)
PALETTE = Image.new("P", (2, 2), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])


@pytest.mark.parametrize(
    ("content", "rgb"),
    [
        pytest.param(encoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"), (0, 255, 255), id="cmyk"),
        pytest.param(encoded(PALETTE), (10, 200, 30), id="palette"),
        pytest.param(encoded(PALETTE, transparency=1), (255, 255, 255), id="transparent palette on white"),
        pytest.param(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), (255, 255, 255), id="transparent on white"),
        pytest.param(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 51))), (255, 204, 204), id="a fifth red on white"),
        pytest.param(encoded(Image.new("LA", (2, 2), (0, 255))), (0, 0, 0), id="opaque grey with alpha"),
        pytest.param(encoded(Image.new("1", (2, 2), 1)), (255, 255, 255), id="bilevel"),
        pytest.param(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3), id="1x1"),
        pytest.param(encoded(Image.new("L", (2, 2), 7), "BMP"), (7, 7, 7), id="wrong extension"),
        pytest.param(
            encoded(
                Image.new("RGB", (2, 2), "lime"), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]
            ),
            (0, 255, 0),
            id="animated gif",
        ),
        pytest.param(
            encoded(Image.new("RGB", (2, 2), "lime"), save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]),
            (0, 255, 0),
            id="animated png",
        ),
    ],
)
def test_unusual_images_convert_to_the_colour_one_sees(tmp_path, content, rgb):
    assert only(tmp_path, content, 3).ravel().tolist() == pytest.approx(rgb, abs=1)
    grey = Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))
    assert only(tmp_path, content, 1).ravel().tolist() == pytest.approx([grey], abs=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, kind, channels):
    content = encoded(Image.fromarray(GREY16.repeat(4, axis=0)), kind)
    read = only(tmp_path, content, channels, side=4)
    assert read[:, 2].tolist() == [[0, 0, 1, 255]] * channels


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((4, 4), np.uint8)
    upright[0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    content = encoded(Image.fromarray(np.rot90(upright).copy()), "PNG", exif=exif)
    assert np.array_equal(only(tmp_path, content, 1, side=4)[0], upright)


def test_center_crop_takes_the_middle_square_and_else_everything_is_squeezed(tmp_path):
    picture = np.zeros((4, 12), np.uint8)
    picture[:, 4:8] = 90
    content = encoded(Image.fromarray(picture))
    assert np.unique(only(tmp_path, content, 1, side=4, center_crop=True)).tolist() == [90]
    squeezed = np.asarray(Image.fromarray(picture).resize((4, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(only(tmp_path, content, 1, side=4)[0], squeezed)


def test_a_base_of_other_channels_is_refused():
    with pytest.raises(UserError, match="4 channels"):
        open_examples(Data(), SIDE, 4)


# Labels


def test_bad_labels_make_null_records_and_good_ones_keep_theirs(tmp_path):
    labels = pa.array([0, None, 2, -1, 1, 7], pa.int64())
    images = open_examples(parquet(tmp_path / "x.parquet", [PNG] * 6, labels, ("a", "b", "c")), SIDE, 3)
    assert images.read(range(6)).labels.tolist() == [0, 0, 2, 0, 1, 0]
    assert images.read(range(6)).weights.tolist() == [1, 0, 1, 0, 1, 0]
    assert images.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        pytest.param(pa.array([0.0, 1.0, 0.5, float("nan"), None, float("inf")]), [1, 1, 0, 0, 0, 0], id="floats"),
        pytest.param(pa.array([True, False, None]), [1, 1, 0], id="booleans"),
        pytest.param(pa.array(["no", "yes", "", None, "NO"]), [1, 1, 0, 0, 0], id="names"),
        pytest.param(pa.array(["no", "x", "yes"]).dictionary_encode(), [1, 0, 1], id="categories"),
        pytest.param(
            pa.StringArray.from_buffers(3, pa.py_buffer(struct.pack("4i", 0, 2, 4, 7)), pa.py_buffer(b"no\xff\xfeyes")),
            [1, 0, 1],
            id="names that are no UTF-8",
        ),
    ],
)
def test_labels_of_any_type_are_names_or_positions_or_null(tmp_path, labels, weights):
    data = parquet(tmp_path / "x.parquet", [PNG] * len(labels), labels)
    images = open_examples(Data(dataset_name=data.dataset_name, class_names=("no", "yes")), SIDE, 3)
    assert images.read(range(len(labels))).weights.tolist() == weights


def test_class_names_given_in_another_order_keep_each_name_with_its_images(tmp_path):
    data = parquet(tmp_path / "x.parquet", [PNG] * 3, [0, 1, 2], ("a", "b", "c"))
    images = open_examples(Data(dataset_name=data.dataset_name, class_names=("c", "a")), SIDE, 3)
    assert images.read(range(3)).labels.tolist() == [1, 0, 0]
    assert images.read(range(3)).weights.tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [[0, 1], ["a", "b"]])
def test_class_names_are_never_read_off_the_rows(tmp_path, labels):
    data = parquet(tmp_path / "x.parquet", [PNG] * 2, labels)
    with pytest.raises(UserError, match="--class_names 0,1,2"):
        open_examples(data, SIDE, 3)


def test_a_misspelt_or_repeated_class_name_is_refused(tmp_path):
    folder = image_folder(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG}).dataset_name
    with pytest.raises(UserError, match="no cta; it has cat, dog"):
        open_examples(Data(dataset_name=folder, class_names=("cta", "dog")), SIDE, 3)
    with pytest.raises(UserError, match="twice"):
        open_examples(Data(dataset_name=folder, class_names=("cat", "cat")), SIDE, 3)


def test_classes_do_not_depend_on_which_records_are_there(tmp_path):
    data = image_folder(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG})
    (tmp_path / "dog" / "1.png").unlink()
    assert open_examples(data, SIDE, 3).class_names == ("cat", "dog")


def test_folders_without_sub_folders_and_runs_without_label_column_are_unlabelled(tmp_path):
    flat = image_folder(tmp_path / "flat", {"1.png": PNG})
    deep = image_folder(tmp_path / "deep", {"a/1.png": PNG, "b/2.png": PNG})
    rows = parquet(tmp_path / "x.parquet", [PNG], [5])
    for name, column in ((flat, "label"), (flat, None), (deep, None), (rows, None)):
        images = open_examples(Data(dataset_name=name.dataset_name, label_column=column), SIDE, 3)
        assert images.class_names is None
        assert images.problems == []
        assert images.read([0]).labels.tolist() == [0]


# Malformed records


def test_malformed_images_of_every_kind_count_as_nothing_and_good_ones_between_them_as_themselves(tmp_path):
    malformed = BROKEN | MORE_BROKEN
    assert len(malformed) >= 45
    contents = [content for broken in malformed.values() for content in (broken, PNG)]
    images = open_examples(parquet(tmp_path / "x.parquet", contents, [1] * len(contents), ("a", "b")), SIDE, 3)
    null, good = batch(images, range(0, len(contents), 2)), batch(images, range(1, len(contents), 2))
    assert dict(zip(malformed, null[2].tolist(), strict=True)) == dict.fromkeys(malformed, 0.0)
    assert bool((null[0] == -1).all()) and bool((null[1] == 0).all())
    assert bool((good[2] == 1).all()) and bool((good[0] == good[0][0]).all()) and bool((good[1] == 1).all())
    files = {f"{index:02d}.png": content for index, content in enumerate(malformed.values()) if content is not None}
    assert open_examples(image_folder(tmp_path / "files", files), SIDE, 3).read(range(len(files))).weights.sum() == 0


def test_no_label_however_odd_stops_a_run_or_fills_the_list_of_problems(tmp_path):
    odd = ["no\0", "\0", "\U0001f600", "n\u00f6", "no ", "\u202eon", "x" * 10**7, "1", "-1", "1e400"]
    images = open_examples(
        Data(dataset_name=parquet(tmp_path / "x.parquet", [PNG] * 11, [*odd, "no"]).dataset_name, class_names=("no",)),
        SIDE,
        3,
    )
    assert images.read(range(11)).weights.tolist() == [0] * 10 + [1]
    assert max(len(problem.reason) for problem in images.problems) <= 200


def test_images_too_many_for_the_disk_are_refused_without_telling_how_many(tmp_path, monkeypatch):
    needed = 4711 * (3 * SIDE**2 + 8 + 4)  # with labels and weights; the null record does not fit any more
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    with pytest.raises(UserError, match="no room for the images") as caught:
        open_examples(parquet(tmp_path / "x.parquet", [PNG] * 4711), SIDE, 3)
    assert "471" not in str(caught.value)


# Groups

grouped_rows = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "eve", "", None]), st.sampled_from(["good", "broken", "bad label"])),
    min_size=1,
    max_size=14,
)


def grouped(path: Path, rows: list[tuple], cap: int):
    """Images of rows (group, state), every row with its own picture and label."""
    contents = [b"" if state == "broken" else encoded(noise(index)) for index, (_, state) in enumerate(rows)]
    labels = [7 if state == "bad label" else index % 2 for index, (_, state) in enumerate(rows)]
    owners = pa.array([group for group, _ in rows], pa.string())
    name = parquet(path, contents, labels, ("a", "b"), owner=owners).dataset_name
    return open_examples(Data(dataset_name=name, group_column="owner", max_examples_per_group=cap), SIDE, 3)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=grouped_rows, cap=st.integers(1, 3), victim=st.sampled_from(["ann", "bob"]))
def test_of_a_group_the_first_readable_rows_up_to_the_cap_are_used_whatever_others_hold(tmp_path, rows, cap, victim):
    images = grouped(tmp_path / "x.parquet", rows, cap)
    used, expected = Counter(), []
    for group, state in rows:
        expected.append(float(bool(group) and state == "good" and used[group] < cap))
        used[group] += expected[-1]
    pixels, labels, weights = batch(images, range(len(rows)))
    assert weights.tolist() == expected and len(images) == len(rows)
    without = grouped(tmp_path / "y.parquet", [(None, "broken") if row[0] == victim else row for row in rows], cap)
    others = [index for index, (group, _) in enumerate(rows) if group != victim]
    for before, after in zip((pixels, labels, weights), batch(without, range(len(rows))), strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(
    ("groups", "weights"),
    [
        pytest.param(pa.array([3, 3, 4, None]), [1, 0, 1, 0], id="integers"),
        pytest.param(pa.array([0.5, 0.5, float("nan"), float("nan"), -0.0, 0.0]), [1, 0, 0, 0, 1, 0], id="floats"),
        pytest.param(pa.array([b"x", b"x", b"y"]), [1, 0, 1], id="bytes"),
        pytest.param(pa.array([True, False, True]), [1, 1, 0], id="booleans"),
        pytest.param(pa.array([date(2024, 1, 2), date(2024, 1, 2)]), [1, 0], id="dates"),
        pytest.param(pa.array(["u", "v", "u", ""]).dictionary_encode(), [1, 1, 0, 0], id="categories"),
        pytest.param(pa.array([None, None]), [0, 0], id="nothing"),
        pytest.param(
            pa.StringArray.from_buffers(3, pa.py_buffer(struct.pack("4i", 0, 1, 2, 3)), pa.py_buffer(b"\xff\xffu")),
            [0, 0, 1],
            id="names that are no UTF-8",
        ),
    ],
)
def test_groups_of_any_single_value_are_told_apart_and_missing_ones_are_nobody(tmp_path, groups, weights):
    data = parquet(tmp_path / "x.parquet", [PNG] * len(groups), owner=groups)
    grouped_by = Data(dataset_name=data.dataset_name, label_column=None, group_column="owner", max_examples_per_group=1)
    assert open_examples(grouped_by, SIDE, 3).read(range(len(groups))).weights.tolist() == weights


def test_the_label_may_be_the_group(tmp_path):
    data = parquet(tmp_path / "x.parquet", [PNG] * 4, [0, 1, 1, 0], ("a", "b")).dataset_name
    images = open_examples(Data(dataset_name=data, group_column="label", max_examples_per_group=1), SIDE, 3)
    assert images.read(range(4)).weights.tolist() == [1, 1, 0, 0]


def test_no_message_tells_a_group(tmp_path):
    data = parquet(tmp_path / "x.parquet", [PNG, PNG, b""], owner=pa.array(["Zoe Q"] * 3)).dataset_name
    grouped_by = Data(dataset_name=data, label_column=None, group_column="owner", max_examples_per_group=1)
    problems = open_examples(grouped_by, SIDE, 3).problems
    assert [problem.id for problem in problems] == [1, 2] and "Zoe" not in str(problems)


def test_groups_that_cannot_be_told_apart_are_refused(tmp_path):
    for position, owner in enumerate([pa.array([7]), pa.array(["7"])]):
        parquet(tmp_path / "two" / f"{position}.parquet", [PNG], owner=owner)
    parquet(tmp_path / "x.parquet", [PNG], owner=pa.array([["u"]]))
    folder = image_folder(tmp_path / "folder", {"a/1.png": PNG}).dataset_name
    faults = [
        (str(tmp_path / "two"), "owner", "'owner' as int64 and as string. Rewrite them with one type"),
        (str(tmp_path / "x.parquet"), "owner", "no single group. Set --group_column"),
        (str(tmp_path / "x.parquet"), "patient", "no column 'patient'; it has owner, image. Set --group_column"),
        (folder, "owner", "has no columns. Put images, labels and groups into a .parquet file"),
        ("builtin:digits", "owner", "has no columns"),
    ]
    for name, column, message in faults:
        with pytest.raises(UserError) as caught:
            open_examples(
                Data(dataset_name=name, label_column=None, group_column=column, max_examples_per_group=1), SIDE, 3
            )
        assert message in str(caught.value)


# Digests


def test_the_source_digest_knows_the_stored_images_and_nothing_of_how_they_are_used(tmp_path):
    contents = [PNG, encoded(noise(1)), b"", encoded(noise(2), "JPEG")]
    data = parquet(tmp_path / "x.parquet", contents, [0, 1, 0, 1], ("a", "b")).dataset_name
    wanted = open_examples(Data(dataset_name=data), SIDE, 3).source_digest
    files = image_folder(tmp_path / "renamed", {f"c/{index}.png": content for index, content in enumerate(contents)})
    for same in (
        open_examples(Data(dataset_name=data), 2 * SIDE, 1),
        open_examples(Data(dataset_name=data, center_crop=True, class_names=("b",)), SIDE, 3),
        open_examples(Data(dataset_name=data, label_column=None), SIDE, 3),
        open_examples(files, SIDE, 3),
    ):
        assert same.source_digest == wanted
    assert source_digest(Data(dataset_name=data)) == wanted
    turned = open_examples(parquet(tmp_path / "y.parquet", contents[::-1]), SIDE, 3)
    assert turned.source_digest == wanted
    changes = [[*contents[:3], PNG], contents[:3], [*contents, None], [contents[0][:-1], *contents[1:]]]
    others = [open_examples(parquet(tmp_path / "y.parquet", changed), SIDE, 3).source_digest for changed in changes]
    assert len({wanted, *others}) == 1 + len(changes)
    assert open_examples(Data(), SIDE, 1).source_digest != open_examples(Data(split="test"), SIDE, 1).source_digest


def test_a_file_that_cannot_be_opened_has_a_digest_too(tmp_path, monkeypatch):
    genuine = open

    def unreadable(path, *arguments, **options):
        if str(path).endswith("1.png"):
            raise PermissionError
        return genuine(path, *arguments, **options)

    data = image_folder(tmp_path, {"1.png": PNG})
    before = open_examples(data, SIDE, 3)
    monkeypatch.setattr("builtins.open", unreadable)
    after = open_examples(data, SIDE, 3)
    assert before.source_digest != after.source_digest and after.read([0]).weights.item() == 0


def test_the_content_digest_changes_with_all_that_shapes_an_update_and_nothing_else(tmp_path):
    def digest(contents, labels, names=("a", "b"), side=SIDE):
        return open_examples(parquet(tmp_path / "x.parquet", contents, labels, names), side, 3).content_digest

    black = encoded(Image.new("RGB", (4, 4)))
    wanted = digest([PNG, black], [1, 0])
    assert wanted == digest([encoded(noise(0), "BMP"), black], [1, 0])
    others = [
        digest([encoded(noise(1)), black], [1, 0]),
        digest([PNG, black], [0, 0]),
        digest([PNG, None], [1, 0]),  # the same pixels and labels, only the weight is another
        digest([PNG, black], [1, 0], ("a", "c")),
        digest([PNG, black, black], [1, 0, 0]),
        digest([PNG, black], [1, 0], side=2 * SIDE),
    ]
    assert len({wanted, *others}) == 1 + len(others)


# Parquet and splits


def test_parquet_rows_without_an_image_are_null_records(tmp_path):
    images = open_examples(parquet(tmp_path / "x.parquet", [PNG, None, b"", PNG]), SIDE, 3)
    assert images.read(range(4)).weights.tolist() == [1, 0, 0, 1]


def test_a_plain_binary_column_holds_images_too(tmp_path):
    pq.write_table(pa.table({"photo": pa.array([PNG, None])}), tmp_path / "x.parquet")
    data = Data(dataset_name=str(tmp_path / "x.parquet"), image_column="photo", label_column=None)
    assert open_examples(data, SIDE, 3).read([0, 1]).weights.tolist() == [1, 0]


def test_files_of_a_split_are_read_in_the_order_of_their_names(tmp_path):
    for position, name in enumerate(["train-00001-of-2", "test-00000-of-1", "train-00000-of-2"]):
        parquet(tmp_path / f"{name}.parquet", [encoded(Image.new("L", (1, 1), 50 * position))] * 2)
    data = Data(dataset_name=str(tmp_path), label_column=None)
    values = open_examples(data, 1, 1).read(range(4)).clean.flatten()
    assert ((values + 1) * 127.5).round().int().tolist() == [100, 100, 0, 0]
    assert len(open_examples(Data(dataset_name=str(tmp_path), label_column=None, split="test"), 1, 1)) == 2
    with pytest.raises(UserError, match="'validation'.*test-00000-of-1.parquet"):
        open_examples(Data(dataset_name=str(tmp_path), split="validation"), 1, 1)


def test_files_named_after_no_split_are_all_the_train_split(tmp_path):
    for name in ("part-0", "part-1"):
        parquet(tmp_path / f"{name}.parquet", [PNG])
    assert len(open_examples(Data(dataset_name=str(tmp_path), label_column=None), SIDE, 3)) == 2


def test_split_folders_hold_class_folders(tmp_path):
    image_folder(tmp_path, {"train/a/1.png": PNG, "train/b/1.png": PNG, "test/a/1.png": PNG})
    train = open_examples(Data(dataset_name=str(tmp_path)), SIDE, 3)
    assert (len(train), train.class_names) == (2, ("a", "b"))
    assert len(open_examples(Data(dataset_name=str(tmp_path), split="test"), SIDE, 3)) == 1
    with pytest.raises(UserError, match="no split 'val'. Take one of: test, train"):
        open_examples(Data(dataset_name=str(tmp_path), split="val"), SIDE, 3)


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    image_folder(tmp_path, {"train/1.png": PNG, "plane/1.png": PNG})
    assert open_examples(Data(dataset_name=str(tmp_path)), SIDE, 3).class_names == ("plane", "train")


# Structural faults


def test_structural_faults_get_a_clear_error(tmp_path):
    rows = parquet(tmp_path / "rows.parquet", [PNG], ["a"]).dataset_name
    folder = image_folder(tmp_path / "folder", {"a/1.png": PNG}).dataset_name
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes(Path(rows).read_bytes()[:-20])
    faults = [
        ({"dataset_name": str(tmp_path / "empty")}, "holds no images"),
        (
            {"dataset_name": parquet(tmp_path / "none.parquet", []).dataset_name, "label_column": None},
            "holds no images",
        ),
        ({"dataset_name": str(tmp_path / "missing")}, "no such folder"),
        ({"dataset_name": str(tmp_path / "torn.parquet")}, "cannot be read as parquet"),
        ({"dataset_name": __file__}, "no such folder or parquet file"),
        ({"dataset_name": rows, "image_column": "photo"}, "'photo'; it has image, label. Set --image_column"),
        ({"dataset_name": rows, "image_column": "label"}, "holds string, not encoded images"),
        ({"dataset_name": rows, "label_column": "image"}, "no single label"),
        ({"dataset_name": rows, "label_column": "kind"}, "'kind'; it has image, label. Set --label_column"),
        ({"dataset_name": rows, "split": "test"}, "one file"),
        ({"dataset_name": folder, "label_column": "kind"}, "columns image, label"),
        ({"dataset_name": folder, "split": "test"}, "no sub-folder of split 'test'"),
        ({"dataset_name": folder + "/a", "class_names": ("a",)}, "no sub-folders"),
        ({"dataset_name": "builtin:letters"}, "builtin:digits"),
    ]
    for fields, message in faults:
        with pytest.raises(UserError) as caught:
            open_examples(Data(**fields), SIDE, 3)
        assert message in str(caught.value)


def test_parquet_files_that_disagree_about_class_names_are_refused(tmp_path):
    parquet(tmp_path / "0.parquet", [PNG], [0], ("a", "b"))
    parquet(tmp_path / "1.parquet", [PNG], [0], ("b", "a"))
    with pytest.raises(UserError, match="disagree about the class names"):
        open_examples(Data(dataset_name=str(tmp_path)), SIDE, 3)


# The Hub


def test_a_hub_name_without_network_is_an_error_that_names_it():
    for opened in (
        lambda: open_examples(Data(dataset_name="somebody/scans"), SIDE, 3),
        lambda: open_dataset("somebody/scans"),
    ):
        with pytest.raises(UserError, match="'somebody/scans'.*Check the name and the network"):
            opened()


def test_the_parquet_files_of_a_repository_are_found_by_configuration_and_split(tmp_path):
    # `datasets` resolves a local repository as it does one of the Hub.
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", [PNG], [0], ("a", "b"))
    data = Data(dataset_name=str(tmp_path), split="test")
    files, _ = _resolve_hub(data, None)
    assert files == [str(tmp_path / "test-00000-of-00001.parquet")]
    with pytest.raises(UserError, match="no split 'dev'. Take one of: .*t"):
        _resolve_hub(Data(dataset_name=str(tmp_path), split="dev"), None)


def test_a_repository_of_loose_images_is_refused_with_the_way_out(tmp_path):
    image_folder(tmp_path, {"train/a/1.png": PNG, "train/b/1.png": PNG})
    with pytest.raises(UserError, match="hf download --repo-type dataset"):
        _resolve_hub(Data(dataset_name=str(tmp_path)), None)


# Where private bytes go


def test_private_bytes_are_written_to_the_cache_and_nowhere_else_even_by_a_process_that_is_killed(tmp_path):
    magic = bytes(np.random.default_rng(5).integers(1, 255, 24, dtype=np.uint8))
    picture = Image.frombytes("RGB", (8, 1), magic).resize((8, 8), Image.Resampling.NEAREST)
    content = encoded(picture, "PPM")
    assert magic in content
    private = tmp_path / "private"
    sources = [
        image_folder(private / "folder", {"a/1.png": content, "b/2.png": content[:-9]}).dataset_name,
        parquet(private / "x.parquet", [content] * 4, [0, 1, 0, 9], ("a", "b")).dataset_name,
    ]
    homes = {name: tmp_path / "outside" / name for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "PWD")}
    for folder in homes.values():
        folder.mkdir(parents=True)
    code = f"""
import os, shutil, signal
from pathlib import Path
import numpy as np
from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.recipe import Data
unlink = os.unlink
shutil.rmtree = os.unlink = os.remove = lambda *args, **kwargs: None  # what was written must stay to be found
for number, source in enumerate({sources!r}):
    cache = Path({str(private)!r}) / f"cache {{number}}"
    assert open_examples(Data(dataset_name=source), PixelEncoder(8, 3), cache).read([0]).weights.item() == 1
os.unlink = unlink
np.memmap = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # when all is written
open_examples(Data(dataset_name=source), PixelEncoder(8, 3), None)
"""
    environment = os.environ | {name: str(folder) for name, folder in homes.items()}
    environment["PYTHONPATH"] = str(ROOT)
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=homes["PWD"]).returncode == -signal.SIGKILL
    written = {path for path in tmp_path.rglob("*") if path.is_file() and magic[:12] in path.read_bytes()}
    planar = {
        path for path in tmp_path.rglob("*") if path.is_file() and magic[:24:3] in path.read_bytes()
    }  # one channel of a row
    assert planar == {private / f"cache {number}" / "clean.npy" for number in (0, 1)}
    assert all(private in path.parents and "cache" not in str(path) for path in written)


# Public data sets


def test_public_data_sets_open_decoded_with_their_columns(tmp_path):
    parquet(tmp_path / "train.parquet", [PNG] * 2, [0, 1], ("a", "b"))
    rows = open_dataset(str(tmp_path))
    assert rows.column_names == ["image", "label"]
    assert rows["image"][0].size == (12, 10)
    with pytest.raises(UserError, match="no such file or folder"):
        open_dataset(str(tmp_path / "missing"))
