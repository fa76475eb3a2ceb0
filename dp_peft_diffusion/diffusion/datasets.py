"""Private images, decoded once and held in memory; and public data sets as `datasets` opens them.

A record is a row as listed: a file of an image folder (sorted paths), a row of parquet files (sorted files). Its id is
its position in that listing, never a name or a hash of its content, and N counts rows before anything is decoded. A row
that cannot be decoded, or has no valid label, is the null record: black image, label 0, weight 0 (invariants 1 and 17).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from dp_peft_diffusion.diffusion.decoding import MODES, decode, image_extensions, silence
from dp_peft_diffusion.diffusion.listing import HUB_NAME, Listing, hub_error, list_rows, parquet_files
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Data


class Problem(NamedTuple):
    """A row that is the null record, and why. For the private folder only (invariant 13)."""

    id: int
    name: str
    reason: str


class PrivateImages:
    """Every row of a data set, decoded once and held as bytes; `len` is N, the number of rows as listed.

    Attributes: `class_names` (tuple, or None when unlabelled), `problems` (rows that are null records).
    """

    def __init__(
        self,
        pixels: torch.Tensor,  # (N + 1, c, s, s) uint8; the last row is the null record, so that id -1 reads it
        labels: torch.Tensor,  # (N + 1,) int64
        weights: torch.Tensor,  # (N + 1,) float32
        class_names: tuple[str, ...] | None,
        problems: list[Problem],
    ):
        self._pixels, self._labels, self._weights = pixels, labels, weights
        self.class_names = class_names
        self.problems = problems

    def __len__(self) -> int:
        return len(self._pixels) - 1

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

    Raises:
        UserError: no such data set, split or column; no rows; class names that must be given.
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
    pixels = np.zeros((n + 1, channels, resolution, resolution), np.uint8)
    labels, weights = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.float32)
    problems = []
    with silence():
        for index, row in enumerate(listing.rows):
            try:
                image, value = row.read()
                label = _label(value, listing.label_names, class_names)
                pixels[index] = decode(image, resolution, channels, data.center_crop)
                labels[index], weights[index] = label, 1
            except Exception as error:  # whatever is wrong with a record must not stop the run (invariant 17)
                name = row.name.encode("utf-8", "backslashreplace").decode()  # file names may be no UTF-8
                problems.append(Problem(index, name, f"{type(error).__name__}: {error}"))
    arrays = torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(weights)
    return PrivateImages(*arrays, class_names, problems)


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
