"""Private images, each decoded and encoded once into memory-mapped files; public ones as `datasets` opens them.

A record is a row as listed: a file of an image folder (sorted paths), a row of parquet files (sorted files). Its id is
its position in that listing, never a name or a hash of its content, and N counts rows before anything is decoded. What
a row counts as is said in `records.py`.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch

from dp_peft_diffusion.diffusion.cache import (
    open_arrays,
    read_description,
    replacing,
    write_arrays,
    write_description,
)
from dp_peft_diffusion.diffusion.decoding import MODES, image_extensions, silence
from dp_peft_diffusion.diffusion.encoder import Encoder
from dp_peft_diffusion.diffusion.listing import HUB_NAME, Listing, hub_error, list_rows, parquet_files
from dp_peft_diffusion.diffusion.records import Fingerprint, Problem, RecordReader
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Data


class Examples(NamedTuple):
    """Some records, as a step reads them.

    clean: (b, V, c, h, w) float32: V changed versions of the network's input for a latent base; else V = 1 and pixels
        in [-1, 1].
    labels: (b,) int64. weights: (b,) float32, 0 for a null record.
    text: embeddings of the records' own captions, as the base names them, (b, ...) float32; empty without captions.
    """

    clean: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    text: dict[str, torch.Tensor]


class PrivateImages:
    """Every row of a data set, decoded once; `len` is N, the number of rows as listed.

    Attributes: `class_names` (tuple, or None when unlabelled), `problems` (rows that are null records), `source_digest`
    (SHA-256 over the images as stored, in any order; the same for every base, resolution, label column and class list).
    Problems and digests identify the data: for the private folder only (invariant 13).
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],  # (N + 1, ...), as RecordReader names them; id -1 reads the null record
        class_names: tuple[str, ...] | None,
        problems: list[Problem],
        source_digest: bytes,
    ):
        self._arrays = dict(arrays)
        self.class_names = class_names
        self.problems = problems
        self.source_digest = source_digest

    def __len__(self) -> int:
        return len(self._arrays["weights"]) - 1

    @cached_property
    def content_digest(self) -> bytes:
        """SHA-256 over all that can shape an update: images, labels, weights, captions and class names."""
        kinds = {name: [array.dtype.str, array.shape] for name, array in self._arrays.items()}
        digest = hashlib.sha256(json.dumps([self.class_names, kinds]).encode())
        for array in self._arrays.values():
            digest.update(array.data.cast("B"))  # page by page, where it is a memory map
        return digest.digest()

    def read(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> Examples:
        """The records of `ids`; id -1 is the null record, for padding the last micro-batch.

        Raises:
            IndexError: an id outside -1 .. N - 1.
        """
        index = torch.as_tensor(ids, dtype=torch.int64).numpy()
        if len(index) and not -1 <= index.min() <= index.max() < len(self):
            raise IndexError(f"ids run from -1 to {len(self) - 1}")
        rows = {name: torch.from_numpy(array[index]) for name, array in self._arrays.items()}
        clean, labels, weights = (rows.pop(name) for name in ("clean", "labels", "weights"))
        clean = clean.float() / 127.5 - 1 if clean.dtype == torch.uint8 else clean
        return Examples(clean, labels, weights, {name: array.float() for name, array in rows.items()})

    def valid_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (n, c, s, s) uint8 and labels (n,) of the rows that are no null records, for evaluation."""
        valid = self._arrays["weights"] > 0
        return self._arrays["clean"][valid, 0], self._arrays["labels"][valid]


def open_examples(
    data: Data, base: Encoder, folder: Path | None, seed: int = 0, cache_dir: Path | None = None
) -> PrivateImages:
    """List, decode and encode the rows of `builtin:digits`, an image folder, parquet files, or a Hub data set of them.

    base: gives the resolution in pixels (`center_crop` takes the central square first, else the image is squeezed to a
    square) and the channels, 1 (grey) or 3 (RGB). Transparency is laid on white; 16-bit grey is scaled from 0..65535;
    of an animation the first frame counts; EXIF orientation is applied; resizing is PIL's antialiased bilinear. What a
    latent base or a caption makes of a record is computed here, each record alone.
    folder: where the records are kept, for this run and its resumption: in a private folder. They are made anew when
    rows, options, base or code have changed since. None: in files without a name in TMPDIR, gone with the process.
    seed: of the changed versions that a latent base keeps.
    cache_dir: where `datasets` keeps what it resolves of a Hub name; a temporary folder when None.

    In an image folder every regular file counts as a row that is not hidden and has an extension of `FORMATS`. Its
    class is its first-level sub-folder, so a file beside the sub-folders has no label; a folder without sub-folders is
    unlabelled. Class names come from `data.class_names`, or the names of sub-folders or of a ClassLabel column, which
    declares them public; never from the rows. With `data.caption_column` there are no labels; an image folder has its
    captions in metadata.jsonl.

    With `data.group_column`, which parquet files and Hub data sets have, the first `max_examples_per_group` readable
    rows of a group are used. A row that cannot be read takes no place of its group. Missing values, empty text and NaN
    are no group. So what a row is depends on the rows of its group alone.

    Raises:
        UserError: no such data set, split or column; no rows; too many for the disk; class names that must be given;
            captions for a base that takes none.
        OSError: the disk is full.
    """
    data, listing, class_names = _listed(data, base, cache_dir)
    reader = RecordReader(data, listing.label_names, class_names, base, seed)
    if folder is None:
        return _written(None, reader, data, class_names, listing)
    if kept := _kept(folder, reader, data, class_names, cache_dir):
        return kept
    with replacing(folder) as partial:
        return _written(partial, reader, data, class_names, listing)


class Survey(NamedTuple):
    """What is known of images before any is decoded: N, and the classes, both as listed."""

    num_examples: int
    class_names: tuple[str, ...] | None


def survey(data: Data, base: Encoder, cache_dir: Path | None = None) -> Survey:
    """How many records `open_examples` will give, and of which classes.

    Raises:
        UserError: what `open_examples` refuses of a data set as a whole, but for its size on the disk.
    """
    _, listing, class_names = _listed(data, base, cache_dir)
    return Survey(listing.num_rows, class_names)


def _listed(data: Data, base: Encoder, cache_dir: Path | None) -> tuple[Data, Listing, tuple[str, ...] | None]:
    """What will be read, its rows, and its classes."""
    data = _checked(data, base)
    listing = list_rows(data, cache_dir)
    if listing.num_rows == 0:
        kinds = ", ".join(sorted(image_extensions()))
        raise UserError(f"{data.dataset_name!r}, split {data.split!r}, holds no images. Files that count: {kinds}.")
    return data, listing, _class_names(data, listing)


def source_digest(data: Data, cache_dir: Path | None = None) -> bytes:
    """The `source_digest` that `open_examples` gives, without decoding.

    Raises:
        UserError: no such data set, split or column.
    """
    return _fingerprint(data, cache_dir).images


def _fingerprint(data: Data, cache_dir: Path | None) -> Fingerprint:
    fingerprint = Fingerprint()
    for _ in fingerprint.of(list_rows(data, cache_dir).rows):
        pass
    return fingerprint


def _kept(
    folder: Path, reader: RecordReader, data: Data, class_names: tuple[str, ...] | None, cache_dir: Path | None
) -> PrivateImages | None:
    """The records in `folder`, if they are whole and what would be made now; nothing is decoded."""
    made = read_description(folder)
    if made is None or json.dumps(made.get("settings")) != json.dumps(reader.settings):
        return None
    fingerprint = _fingerprint(data, cache_dir)
    if made.get("rows") != fingerprint.rows:
        return None
    try:
        arrays = open_arrays(folder, reader.null)
    except (OSError, ValueError, EOFError):  # a file is gone or cut
        return None
    images = PrivateImages(arrays, class_names, [Problem(*p) for p in made["problems"]], fingerprint.images)
    return images if images.content_digest.hex() == made["content"] else None


def _written(
    folder: Path | None,
    reader: RecordReader,
    data: Data,
    class_names: tuple[str, ...] | None,
    listing: Listing,
) -> PrivateImages:
    """Read every row into `folder`; None: into files without a name."""
    fingerprint, size = Fingerprint(), sum(array.nbytes for array in reader.null.values())
    place = Path(tempfile.gettempdir()) if folder is None else folder.parent
    if shutil.disk_usage(place).free < size * (listing.num_rows + 1):  # N may be private: it is not told
        raise UserError(
            f"the disk of {place} has no room for the images of {data.dataset_name!r} as the base sees them. Make "
            "room, or choose a base of smaller images."
        )
    with silence():
        records = (reader.read(index, row) for index, row in enumerate(fingerprint.of(listing.rows)))
        arrays = write_arrays(folder, records, reader.null, listing.num_rows)
    images = PrivateImages(arrays, class_names, reader.problems, fingerprint.images)
    if folder is not None:
        made = {"settings": reader.settings, "rows": fingerprint.rows, "content": images.content_digest.hex()}
        write_description(folder, made | {"problems": reader.problems})
    return images


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


def _checked(data: Data, base: Encoder) -> Data:
    """`data` without labels where captions take their place. Raises UserError: the base cannot take what there is."""
    if base.image_channels not in MODES:
        raise UserError(
            f"the base asks for images of {base.image_channels} channels, not 1 or 3. Choose a base on grey or RGB "
            "pixels."
        )
    if data.caption_column is None:
        return data
    if base.text is None:
        raise UserError(
            f"--caption_column {data.caption_column}: the base takes no prompts. Leave it out, or choose a "
            "text-conditional base."
        )
    return replace(data, label_column=None)


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
