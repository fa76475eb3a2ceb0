"""Private images, decoded once and held in memory; and public data sets as `datasets` opens them.

A record is a row as listed: a file of an image folder (sorted paths), a row of parquet files (sorted files). Its id is
its position in that listing, never a name or a hash of its content, and N counts rows before anything is decoded. A row
that cannot be decoded, has no valid label or group, or is over its group's cap, is the null record: black image, label
0, weight 0 (invariants 1 and 17).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from dp_peft_diffusion.diffusion.decoding import MODES, decode, image_extensions, silence
from dp_peft_diffusion.diffusion.listing import HUB_NAME, Listing, Row, hub_error, list_rows, parquet_files
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Data

MAX_REASON = 200  # characters; a broken label may have millions


class Problem(NamedTuple):
    """A row that is the null record, and why. For the private folder only (invariant 13)."""

    id: int
    name: str
    reason: str


class PrivateImages:
    """Every row of a data set, decoded once and held as bytes; `len` is N, the number of rows as listed.

    Attributes: `class_names` (tuple, or None when unlabelled), `problems` (rows that are null records), `source_digest`
    (SHA-256 over the images as stored, in any order; the same for every base, resolution, label column and class list).
    Problems and digests identify the data: for the private folder only (invariant 13).
    """

    def __init__(
        self,
        pixels: torch.Tensor,  # (N + 1, c, s, s) uint8; the last row is the null record, so that id -1 reads it
        labels: torch.Tensor,  # (N + 1,) int64
        weights: torch.Tensor,  # (N + 1,) float32
        class_names: tuple[str, ...] | None,
        problems: list[Problem],
        source_digest: bytes,
    ):
        self._pixels, self._labels, self._weights = pixels, labels, weights
        self.class_names = class_names
        self.problems = problems
        self.source_digest = source_digest

    def __len__(self) -> int:
        return len(self._pixels) - 1

    @property
    def content_digest(self) -> bytes:
        """SHA-256 over all that can shape an update: pixels, labels, weights and class names."""
        digest = hashlib.sha256(json.dumps([self.class_names, self._pixels.shape]).encode())
        for tensor in (self._pixels, self._labels, self._weights):
            digest.update(tensor.numpy().data.cast("B"))
        return digest.digest()

    def read(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (b, c, s, s) float32 in [-1, 1], labels (b,) int64, weights (b,) float32: 0 for a null record.

        Id -1 is the null record, for padding the last micro-batch.

        Raises:
            IndexError: an id outside -1 .. N - 1.
        """
        index = torch.as_tensor(ids, dtype=torch.int64)
        if len(index) and not -1 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"ids run from -1 to {len(self) - 1}")
        return self._pixels[index].float() / 127.5 - 1, self._labels[index], self._weights[index]

    def valid_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, c, s, s) uint8 and labels (n,) of the rows that are no null records, for evaluation."""
        valid = self._weights > 0
        return self._pixels[valid].numpy(), self._labels[valid].numpy()


def open_examples(data: Data, resolution: int, channels: int, cache_dir: Path | None = None) -> PrivateImages:
    """List and decode the rows of `builtin:digits`, an image folder, parquet files, or a Hub data set of parquet files.

    resolution: pixels per side; `center_crop` takes the central square first, else the image is squeezed to a square.
    channels: 1 (grey) or 3 (RGB). Transparency is laid on white; 16-bit grey is scaled from 0..65535; of an animation
    the first frame counts; EXIF orientation is applied; resizing is PIL's antialiased bilinear.
    cache_dir: where `datasets` keeps what it resolves of a Hub name; a temporary folder when None.

    In an image folder every regular file counts as a row that is not hidden and has an extension of `FORMATS`. Its
    class is its first-level sub-folder, so a file beside the sub-folders has no label; a folder without sub-folders is
    unlabelled. Class names come from `data.class_names`, or the names of sub-folders or of a ClassLabel column, which
    declares them public; never from the rows.

    With `data.group_column`, which parquet files and Hub data sets have, the first `max_examples_per_group` readable
    rows of a group are used. A row that cannot be read takes no place of its group. Missing values, empty text and NaN
    are no group. So what a row is depends on the rows of its group alone.

    Raises:
        UserError: no such data set, split or column; no rows; too many for memory; class names that must be given.
    """
    if channels not in MODES:
        raise UserError(
            f"the base asks for images of {channels} channels, not 1 or 3. Choose a base on grey or RGB pixels."
        )
    listing = list_rows(data, cache_dir)
    if listing.num_rows == 0:
        kinds = ", ".join(sorted(image_extensions()))
        raise UserError(f"{data.dataset_name!r}, split {data.split!r}, holds no images. Files that count: {kinds}.")
    class_names = _class_names(data, listing)
    n = listing.num_rows
    try:
        pixels = np.zeros((n + 1, channels, resolution, resolution), np.uint8)
    except MemoryError:  # whose own message tells N, which may be private
        raise UserError(f"{data.dataset_name!r} does not fit into memory. Choose a base of smaller images.") from None
    labels, weights = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.float32)
    problems, digests, used = [], list[bytes](), Counter[Hashable]()
    with silence():
        for index, row in enumerate(listing.rows):
            digests.append(_image_digest(row.image))
            try:
                label = _label(_plain(row.label), listing.label_names, class_names)
                group = _group(row, data, used)
                if row.image is None:
                    raise ValueError("no image")
                pixels[index] = decode(row.image, resolution, channels, data.center_crop)
                labels[index], weights[index] = label, 1
                used[group] += 1
            except Exception as error:  # whatever is wrong with a record must not stop the run (invariant 17)
                name = row.name.encode("utf-8", "backslashreplace").decode()  # file names may be no UTF-8
                problems.append(Problem(index, name, f"{type(error).__name__}: {error}"[:MAX_REASON]))
    arrays = torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(weights)
    return PrivateImages(*arrays, class_names, problems, _unordered(digests))


def source_digest(data: Data, cache_dir: Path | None = None) -> bytes:
    """The `source_digest` that `open_examples` gives, without decoding.

    Raises:
        UserError: no such data set, split or column.
    """
    return _unordered([_image_digest(row.image) for row in list_rows(data, cache_dir).rows])


def _unordered(digests: list[bytes]) -> bytes:
    """One digest of many, the same in every order: renamed files are the same images."""
    return hashlib.sha256(b"".join(sorted(digests))).digest()


def open_dataset(name: str, split: str = "train") -> datasets.Dataset:
    """Open public images, decoded by `datasets` and cached where it likes: not for images that must not leak.

    Raises:
        UserError: no such folder, file or Hub data set.
    """
    path = Path(name).expanduser()
    if files := parquet_files(path, split):
        return datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r}: no such file or folder. Check --dataset_name.")
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise hub_error(name, error) from error


def _class_names(data: Data, listing: Listing) -> tuple[str, ...] | None:
    given, own = data.class_names, listing.label_names
    if data.label_column is None:
        return None
    if not listing.labelled:
        if given is not None:
            raise UserError(f"--class_names, but {data.dataset_name!r} has no sub-folders to take labels from.")
        return None
    if given is None and own is None:
        raise UserError(
            f"column {data.label_column!r} has values but no names. Class names are a public input, and reading them "
            "off private rows would leak: give all of them in order, as in --class_names 0,1,2."
        )
    if given is None:
        return own
    if len(set(given)) != len(given):
        raise UserError(f"--class_names {','.join(given)}: a name occurs twice. Give each class one name.")
    if own is not None and (unknown := [name for name in given if name not in own]):
        raise UserError(f"--class_names: {data.dataset_name!r} has no {', '.join(unknown)}; it has {', '.join(own)}.")
    return tuple(given)


def _image_digest(image: Path | bytes | Image.Image | None) -> bytes:
    """SHA-256 of an image as stored; zeros where there is none, or it cannot be read."""
    if isinstance(image, Path):
        try:
            with open(image, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return bytes(32)
    if isinstance(image, Image.Image):
        image = image.tobytes()
    return bytes(32) if image is None else hashlib.sha256(image).digest()


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _group(row: Row, data: Data, used: Counter[Hashable]) -> Hashable:
    """Whose image it is; None without groups. Its value is private and in no message.

    Raises:
        ValueError: it is nobody's, or `used` says that its owner has no place left.
    """
    if data.group_column is None:
        return None
    group = _plain(row.group)
    if group is None or group == "" or group != group:
        raise ValueError("no group")
    if used[group] == data.max_examples_per_group:
        raise ValueError(f"its group has {data.max_examples_per_group} images before it")
    return group


def _label(value: Any, own_names: tuple[str, ...] | None, class_names: tuple[str, ...] | None) -> int:
    """Position in `class_names` of a name, of an index into the source's own names, or of a bare index."""
    if class_names is None:
        return 0
    if isinstance(value, float) and value.is_integer():  # integers beside missing values become floats in pandas
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(own_names or class_names):
        value = (own_names or class_names)[value]
    if value not in class_names:
        raise ValueError(f"label {value!r} is none of the {len(class_names)} classes")
    return class_names.index(value)
