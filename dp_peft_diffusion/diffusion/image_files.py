"""Images as PNG files or parquet shards, in a folder that can be gone on with after a stop."""

import csv
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from dp_peft_diffusion.diffusion.base_model import fingerprint
from dp_peft_diffusion.diffusion.generation import ImageSource
from dp_peft_diffusion.diffusion.grids import image_grid, to_pil
from dp_peft_diffusion.durable import fsync, move_durably, partial_of, write_durably
from dp_peft_diffusion.errors import UserError

RECORD = "sampling.json"  # what the images of a folder were asked for
SHARD_IMAGES, SHARD_BYTES = 1000, 2**28  # most images, and bytes of pixels, that are made before they are written
GRID_IMAGES, GRID_SIDE = 400, 2048  # most images of a grid, and most pixels of its side


def write_images(
    folder: Path, source: ImageSource, num_images: int, first_image: int = 0, parquet: bool = False
) -> None:
    """Write images/NNNNNN.png with a metadata.csv, or images/images-NNNNN.parquet, and grid.png of the first ones.

    `datasets` reads either from images/. At most one shard of images is in memory, and as many are lost when the
    process is killed: the same call goes on after the last whole shard. A file gets its name when it is complete;
    metadata.csv comes last.

    Raises:
        UserError: the folder holds something else, or images that were asked for otherwise.
    """
    check_folder(folder)
    record = describe(source) | {"num_images": num_images, "first_image": first_image, "parquet": parquet}
    _begin(folder, record)
    images, stop, size = folder / "images", first_image + num_images, shard_size(source)
    images.mkdir(exist_ok=True)
    with tqdm(total=num_images, desc="sample", unit=" images") as bar:
        for shard, start in enumerate(range(first_image, stop, size)):
            ids = range(start, min(stop, start + size))
            files = [images / f"images-{shard:05d}.parquet"] if parquet else [images / _png_name(i) for i in ids]
            if all(path.is_file() for path in files):
                bar.update(len(ids))
            else:
                _write_shard(files, source, ids, parquet, bar)
            if shard == 0:
                _write_grid(folder / "grid.png", files)
    if not parquet:
        _write_metadata(images / "metadata.csv", source, range(first_image, stop))


def check_folder(folder: Path) -> None:
    """Images go into a folder that is new, empty, or holds images of this tool.

    Raises:
        UserError: it holds something else.
    """
    record = folder / RECORD
    if not folder.exists() or record.is_file():
        return
    if not folder.is_dir() or any(path != partial_of(record) for path in folder.iterdir()):
        raise UserError(f"--output_dir {folder} is not empty. Choose another --output_dir, or remove that folder.")


def describe(source: ImageSource) -> dict[str, object]:
    """All that decides how image i comes out, up to the rounding that batch size and device bring."""
    sample = source.sample
    return {
        "adapter": fingerprint(source.base.unet),
        "base": source.base.digest,
        "class_labels": source.labels and list(source.labels),
        "prompts": source.prompts and list(source.prompts),
        "scheduler": sample.scheduler,
        "num_inference_steps": sample.num_inference_steps,
        "guidance_scale": sample.guidance_scale,
        "seed": sample.seed,
        "dtype": str(source.dtype).removeprefix("torch."),
        "relabel": source.shown is not None,
    }


def _begin(folder: Path, record: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).is_file():
        write_durably(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        return
    try:
        before = {"relabel": False} | dict(json.loads((folder / RECORD).read_bytes()))  # once there was no relabel
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}. Choose another --output_dir.") from error
    differences = [
        f"{key}: {str(before.get(key))[:60]} before, {str(value)[:60]} now"
        for key, value in record.items()
        if before.get(key) != value
    ]
    if differences:
        raise UserError(
            f"the images in {folder} were asked for otherwise: {'; '.join(differences)}. Type the command as it was to "
            "go on, or choose another --output_dir."
        )


def shard_size(source: ImageSource) -> int:
    """Images in a shard, the same for every batch size."""
    return max(1, min(SHARD_IMAGES, SHARD_BYTES // (source.base.image_channels * source.base.resolution**2)))


def _png_name(i: int) -> str:
    return f"{i:06d}.png"


def _write_shard(files: list[Path], source: ImageSource, ids: range, parquet: bool, bar: tqdm) -> None:
    encoded: list[bytes] = []
    described: list[dict[str, str]] = []
    for batch, images in source.batches(ids):
        encoded += [_png(image) for image in to_pil(images)]
        described += source.described(batch, images) if parquet else []
        bar.update(len(batch))
    if parquet:
        write_durably(files[0], _as_parquet(encoded, described, ids))
        return
    for path, content in zip(files, encoded, strict=True):
        partial_of(path).write_bytes(content)
        os.replace(partial_of(path), path)
    fsync(files[0].parent)


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _as_parquet(encoded: list[bytes], described: list[dict[str, str]], ids: range) -> bytes:
    """A shard with the columns image, label, text (those there are), typed as `datasets` has images."""
    columns: dict = {"image": [{"bytes": c, "path": _png_name(i)} for i, c in zip(ids, encoded, strict=True)]}
    columns |= {name: [row[name] for row in described] for name in described[0]}
    texts = {name: datasets.Value("string") for name in described[0]}
    features = datasets.Features({"image": datasets.Image()} | texts)
    buffer = BytesIO()
    pq.write_table(pa.table(columns, schema=features.arrow_schema), buffer)
    return buffer.getvalue()


def _write_metadata(path: Path, source: ImageSource, ids: range) -> None:
    """One line for each image. What an image shows is found from its file, which an earlier call may have written."""
    with open(partial_of(path), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *source.told(ids.start)])
        for start in range(ids.start, ids.stop, source.batch_size):
            batch = range(start, min(ids.stop, start + source.batch_size))
            if source.shown is None:
                described = [source.told(i) for i in batch]
            else:
                described = source.described(batch, _pixels([path.parent / _png_name(i) for i in batch]))
            writer.writerows([_png_name(i), *row.values()] for i, row in zip(batch, described, strict=True))
    move_durably(partial_of(path), path)


def _pixels(files: Sequence[Path | BytesIO]) -> torch.Tensor:
    """(n, c, side, side) uint8 of PNG files.

    Raises:
        UserError: one cannot be read.
    """
    arrays = []
    for file in files:
        try:
            arrays.append(np.atleast_3d(np.array(Image.open(file))))
        except OSError as error:
            raise UserError(f"{file} is no image ({error}). Remove it, and type the command again.") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _write_grid(path: Path, files: list[Path]) -> None:
    """A grid of the first images of a shard that is written."""
    opened: Sequence[Path | BytesIO] = files[:GRID_IMAGES]
    if files[0].suffix == ".parquet":
        rows = pq.ParquetFile(files[0]).iter_batches(GRID_IMAGES, columns=["image"])
        opened = [BytesIO(row["image"]["bytes"]) for row in next(rows).to_pylist()]
    side = _pixels(opened[:1]).shape[3]
    images = _pixels(opened[: max(1, GRID_SIDE // side) ** 2])
    grid = image_grid(images, columns=min(20, int(len(images) ** 0.5)), zoom=2 if side <= 64 else 1)
    write_durably(path, _png(grid))
