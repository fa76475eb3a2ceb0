"""What one row counts as: arrays of fixed shapes, made from that row alone.

A row that cannot be read, has no valid label, caption or group, or is over its group's cap, is the null record: zeros,
weight 0 (invariants 1 and 17).
"""

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from dp_peft_diffusion.diffusion.augmentation import augment
from dp_peft_diffusion.diffusion.cache import Record
from dp_peft_diffusion.diffusion.decoding import decode
from dp_peft_diffusion.diffusion.encoder import Encoder
from dp_peft_diffusion.diffusion.listing import Row
from dp_peft_diffusion.privacy.randomness import KEY_BYTES, hkdf_sha256
from dp_peft_diffusion.recipe import Data
from dp_peft_diffusion.runs.context import code_digest

MAX_REASON = 200  # characters; a broken label may have millions
MAX_CAPTION = 10_000  # characters that count; text encoders read about 77 tokens
LIBRARIES = ("diffusers", "numpy", "pillow", "torch", "transformers")  # that make a record of a row


class Problem(NamedTuple):
    """A row that is the null record, and why. For the private folder only (invariant 13)."""

    id: int
    name: str
    reason: str


class RecordReader:
    """Rows -> records, in the order of their ids; `problems` lists those that are null records.

    Arrays of a record: `clean`, pixels (1, c, s, s) uint8, or of a latent base V network inputs (V, *input_shape)
    float32; `labels` () int64; `weights` () float32: 1, and 0 of a null record; and with captions their embeddings as
    float16. V is `augmentation_variants`, each changed anew by `augment`, or 1 without augmentations.
    """

    def __init__(
        self,
        data: Data,
        label_names: tuple[str, ...] | None,  # what the source calls its classes
        class_names: tuple[str, ...] | None,
        base: Encoder,
        seed: int,  # of the changed versions, which are no secret
    ):
        self._data, self._base = data, base
        self._label_names, self._class_names = label_names, class_names
        self._changes = data.augmentations or () if base.is_latent else ()
        self._variants = data.augmentation_variants if self._changes else 1
        self._seed, self._used = seed, Counter[Hashable]()
        self.problems: list[Problem] = []
        self.null = self._null()

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the records, besides the rows."""
        data, base = self._data, self._base
        return {
            "code": [code_digest(), *map(importlib.metadata.version, LIBRARIES)],
            "base": base.digest,
            "image": [base.image_channels, base.resolution, data.center_crop],
            "classes": [self._label_names, self._class_names],
            "group": [data.group_column is not None, data.max_examples_per_group],
            "variants": [self._changes, self._variants, self._seed],
        }

    @torch.no_grad()
    def read(self, index: int, row: Row) -> Record:
        """The record of row `index`, which no other row has a part in but earlier ones of its group."""
        try:
            label = _label(_plain(row.label), self._label_names, self._class_names)
            group = self._group(row)
            if row.image is None:
                raise ValueError("no image")
            base = self._base
            pixels = decode(row.image, base.resolution, base.image_channels, self._data.center_crop)
            record = {"clean": self._clean(index, pixels), "labels": np.array(label), "weights": np.array(1)}
            record |= self._embeddings(row.caption)
            if not all(np.isfinite(array).all() for array in record.values()):
                raise ValueError("the base makes infinite numbers of it")
        except torch.OutOfMemoryError:  # the machine's fault, not the record's: all encodings have one shape
            raise
        except Exception as error:  # whatever is wrong with a record must not stop the run (invariant 17)
            name = row.name.encode("utf-8", "backslashreplace").decode()  # file names may be no UTF-8
            self.problems.append(Problem(index, name, f"{type(error).__name__}: {error}"[:MAX_REASON]))
            return self.null
        self._used[group] += 1
        return record

    def _null(self) -> Record:
        base, captions = self._base, self._base.text if self._data.caption_column is not None else None
        pixels = np.zeros((1, base.image_channels, base.resolution, base.resolution), np.uint8)
        clean = np.zeros((self._variants, *base.input_shape), np.float32) if base.is_latent else pixels
        text = {} if captions is None else captions.null
        embeddings = {name: np.zeros(array.shape[1:], np.float16) for name, array in text.items()}
        return {"clean": clean, "labels": np.zeros((), np.int64), "weights": np.zeros((), np.float32)} | embeddings

    def _clean(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels (c, s, s) -> what is kept of them, encoded in a batch of their own."""
        if not self._base.is_latent:
            return pixels[None]
        image = torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1  # (1, c, s, s)
        if self._changes:
            key = hkdf_sha256(self._seed.to_bytes(8, "little"), b"", b"dp-peft/1/variants", KEY_BYTES)
            views = [augment(image, self._changes, key, v, np.array([index]), 1) for v in range(self._variants)]
            image = torch.cat(views)[:, 0]  # (V, c, s, s)
        return self._base.encode(image).float().cpu().numpy()

    def _embeddings(self, value: Any) -> dict[str, np.ndarray]:
        """A caption, encoded alone. No error says a character of it."""
        if self._data.caption_column is None or self._base.text is None:
            return {}
        try:
            caption = _plain(value)
            if not isinstance(caption, str):
                raise ValueError
            text = self._base.text.encode([caption[:MAX_CAPTION]])
        except torch.OutOfMemoryError:
            raise
        except Exception:
            raise ValueError("its caption cannot be encoded") from None
        return {name: array[0].half().cpu().numpy() for name, array in text.items()}

    def _group(self, row: Row) -> Hashable:
        """Whose image it is; None without groups. Its value is private and in no message.

        Raises:
            ValueError: it is nobody's, or its owner has no place left.
        """
        if self._data.group_column is None:
            return None
        group, cap = _plain(row.group), self._data.max_examples_per_group
        if group is None or group == "" or group != group:
            raise ValueError("no group")
        if self._used[group] == cap:
            raise ValueError(f"its group has {cap} images before it")
        return group


class Fingerprint:
    """Digests of the rows that it lets through.

    `images`: SHA-256 over the images as stored, the same in every order: renamed files are the same images.
    `rows`: over all that a row is listed with, in order.
    """

    def __init__(self) -> None:
        self._images, self._rows = list[bytes](), hashlib.sha256()

    def of(self, rows: Iterator[Row]) -> Iterator[Row]:
        """`rows`, each noted as it passes."""
        for row in rows:
            image = _image_digest(row.image)
            listed = repr((row.name, *map(_comparable, (row.label, row.group, row.caption))))
            self._images.append(image)
            self._rows.update(image + hashlib.sha256(listed.encode()).digest())
            yield row

    @property
    def images(self) -> bytes:
        """Of the images, in any order."""
        return hashlib.sha256(b"".join(sorted(self._images))).digest()

    @property
    def rows(self) -> str:
        """Of everything, in order."""
        return self._rows.hexdigest()


def _comparable(value: Any) -> Any:
    """A value of a row; of one that cannot be read, only that: what it counts as is the same."""
    try:
        return _plain(value)
    except Exception as error:
        return type(error)


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
