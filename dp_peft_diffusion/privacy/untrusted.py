"""Read files from strangers without torch: strict JSON, safetensors files, hashes.

Everything here either returns plain, checked values or raises PrivacyError with a sentence. Nothing is opened that is
not a regular file of bounded size, nothing is unpickled, and names inside a file are never used as paths.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dp_peft_diffusion.errors import PrivacyError

MAX_TEXT_BYTES = 1 << 20
MAX_PAGE_BYTES = 8 << 20  # of an HTML page, with the pictures in it
MAX_ADAPTER_BYTES = 256 << 20
MAX_MODEL_BYTES = 2 << 30  # of a file of the name below, which holds a whole model
MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_HEADER_BYTES = 1 << 20  # the format allows 100 MB, an adapter needs a few hundred kB
MAX_ENTRIES, MAX_DEPTH = 10_000, 20  # of a shareable folder
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
BYTES_PER_NUMBER = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# An exponent of all ones is an infinity or NaN (IEEE 754): the type of the bits, and the bits of the exponent.
EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
_CHUNK = 1 << 20  # bytes read at a time, so that memory stays small however large the file


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says it holds.

    Attributes:
        metadata: the free-text part.
        tensors: name -> (dtype, shape), in the order of the file.
        begins: name -> the byte of the file at which the tensor begins.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    begins: dict[str, int]


def parse_json(text: bytes, name: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, however spelled.

    Raises:
        PrivacyError: it is anything else.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_no_duplicates
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate could not be printed
    except (ValueError, RecursionError) as error:
        raise PrivacyError(f"{name} is not strict JSON: {str(error)[:200]}.") from error
    return value


def read_json(path: Path) -> Any:
    """Strict JSON from a file of at most 1 MiB.

    Raises:
        PrivacyError: the file is missing, too big or not strict JSON.
    """
    return parse_json(b"".join(_chunks(path)), path.name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file of at most `byte_limit`, 64 hex digits.

    Raises:
        PrivacyError: it is missing, too big, gives more than its size, or cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def byte_limit(path: Path) -> int:
    """The size in bytes above which a file of this name is not opened."""
    if path.suffix != ".safetensors":
        return MAX_PAGE_BYTES if path.suffix == ".html" else MAX_TEXT_BYTES
    return MAX_MODEL_BYTES if path.name == MODEL_WEIGHTS else MAX_ADAPTER_BYTES


def file_names(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; links to files are among them.

    Raises:
        PrivacyError: it is deeper than `MAX_DEPTH`, has more than `MAX_ENTRIES`, or holds a link to a folder.
    """
    names, folders, entries = [], [""], 0
    while folders:
        inside = folders.pop()
        for entry in _entries(folder / inside):
            entries, name = entries + 1, inside + entry.name
            if entries > MAX_ENTRIES or name.count("/") > MAX_DEPTH:
                raise PrivacyError(f"the folder has more than {MAX_ENTRIES:,} entries, or is deeper than {MAX_DEPTH}.")
            if entry.is_dir(follow_symlinks=False):
                folders.append(name + "/")
            elif (folder / name).is_dir():
                raise PrivacyError(f"{name[:80]!r} is a link to a folder. Put the folder itself there, or remove it.")
            else:
                names.append(name)
    return sorted(names)


def safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file that says nothing besides {"format": "pt"} (invariant 14), or nothing at all.

    Raises:
        PrivacyError: the file is missing, not such a file, or holds other metadata.
    """
    header = any_safetensors_header(path)
    if header.metadata not in ({}, {"format": "pt"}):
        raise PrivacyError(f'{path.name} holds metadata other than {{"format": "pt"}}: {ascii(header.metadata)[:200]}.')
    return header


def any_safetensors_header(path: Path, limit: int | None = None) -> SafetensorsHeader:
    """The header of a safetensors file, checked against the file's length, whatever metadata it holds.

    Tensors must be of a known type, lie one after another and fill the file to its end.

    limit: bytes above which the file is not opened; None: those of its name.

    Raises:
        PrivacyError: the file is missing, too big or not such a file.
    """
    with _opened(path, byte_limit(path) if limit is None else limit) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(length) if length <= MAX_HEADER_BYTES else b""
        size = file.seek(0, 2)
    if len(start) < 8 or length > MAX_HEADER_BYTES or len(text) < length:
        raise PrivacyError(
            f"{path.name} is no safetensors file: its header is cut off or above {MAX_HEADER_BYTES} bytes."
        )
    header = parse_json(text, f"the header of {path.name}")
    if not isinstance(header, dict):
        raise PrivacyError(f"the header of {path.name} is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PrivacyError(f"the metadata of {path.name} are not texts by name.")
    entries, position = sorted(header.items(), key=lambda item: _begin(path, item)), 0
    for name, entry in entries:
        position = _check_tensor(path, name, entry, position)
    if 8 + length + position != size:
        raise PrivacyError(f"{path.name} is cut off, or has bytes that belong to no tensor.")
    return SafetensorsHeader(
        metadata,
        tensors={name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries},
        begins={name: 8 + length + entry["data_offsets"][0] for name, entry in entries},
    )


def tensor_chunks(path: Path, header: SafetensorsHeader, name: str) -> Iterator[bytes]:
    """The bytes of one tensor, a few MB at a time.

    Raises:
        PrivacyError: the file ends before its header said.
    """
    dtype, shape = header.tensors[name]
    length = math.prod(shape) * BYTES_PER_NUMBER[dtype]
    with _opened(path, math.inf) as file:  # its size was looked at with its header
        file.seek(header.begins[name])
        for begin in range(0, length, _CHUNK):
            wanted = min(length - begin, _CHUNK)
            chunk = file.read(wanted)
            if len(chunk) < wanted:
                raise PrivacyError(f"{path.name} grew shorter while it was read.")
            yield chunk


def check_finite(path: Path, header: SafetensorsHeader) -> None:
    """Every number of every tensor is finite, and of a type that weights have.

    Raises:
        PrivacyError: a tensor holds NaN or an infinity, or is of another type; the message names it.
    """
    for name, (dtype, _) in header.tensors.items():
        if dtype not in EXPONENTS:
            raise PrivacyError(f"{path.name}: {name} is of type {dtype}, which no weights are.")
        bits, exponent = EXPONENTS[dtype]
        mask = np.array(exponent, bits)
        if any(((np.frombuffer(chunk, bits) & mask) == mask).any() for chunk in tensor_chunks(path, header, name)):
            raise PrivacyError(f"{path.name}: {name} holds numbers that are not finite.")


def float32_chunks(path: Path, header: SafetensorsHeader, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """The numbers of one tensor of a type in `EXPONENTS`, as float32, a few million at a time."""
    dtype = header.tensors[name][0]
    for chunk in tensor_chunks(path, header, name):
        if dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
        else:
            with np.errstate(all="ignore"):  # what is too large becomes an infinity, as in torch
                numbers = np.frombuffer(chunk, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4")
            yield numbers


def _begin(path: Path, item: tuple[str, Any]) -> tuple[int, int]:
    """Where a tensor begins and ends in the data, once its entry is known to have the right form."""
    name, entry = item
    if not TENSOR_NAME.fullmatch(name):
        raise PrivacyError(f"{path.name} has a tensor of the unusual name {name[:100]!r}.")
    well_formed = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not well_formed or entry["dtype"] not in list(BYTES_PER_NUMBER):
        raise PrivacyError(f"{path.name}: the entry of tensor {name} is malformed, or of an unknown dtype.")
    for numbers in (entry["shape"], entry["data_offsets"]):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
            raise PrivacyError(f"{path.name}: the shape or the offsets of tensor {name} are not whole numbers.")
    if len(entry["data_offsets"]) != 2 or len(entry["shape"]) > 8:
        raise PrivacyError(f"{path.name}: tensor {name} needs two offsets and at most 8 dimensions.")
    return entry["data_offsets"][0], entry["data_offsets"][1]


def _check_tensor(path: Path, name: str, entry: dict[str, Any], position: int) -> int:
    """The end of a tensor that begins at `position` and is as long as its shape says."""
    begin, end = entry["data_offsets"]
    if begin != position or end - begin != math.prod(entry["shape"]) * BYTES_PER_NUMBER[entry["dtype"]]:
        raise PrivacyError(f"{path.name}: tensor {name} overlaps another, leaves a gap or differs from its shape.")
    return end


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a whole file. Some that a link may lead to, below /proc, claim to be empty and never end."""
    with _opened(path, byte_limit(path)) as file:
        left = os.fstat(file.fileno()).st_size
        while chunk := file.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise PrivacyError(f"{path.name} gives more bytes than its size says.")
            yield chunk


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise PrivacyError(f"{folder.name[:80]!r} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def _opened(path: Path, limit: float) -> Iterator[io.BufferedReader]:
    if not path.is_file():  # false for a folder, a device and a pipe, on which reading would wait for ever
        raise PrivacyError(f"{path.name} is missing, or not a regular file.")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise PrivacyError(f"{path.name} is larger than {limit} bytes.")
            yield file
    except OSError as error:
        raise PrivacyError(f"{path.name} cannot be read: {error.strerror}.") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key appears twice")
    return document
