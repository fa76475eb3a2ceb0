"""Read files from strangers without torch: strict JSON, the header of a safetensors file, hashes.

Everything here either returns plain, checked values or raises PrivacyError with a sentence.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from dp_peft_diffusion.errors import PrivacyError

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # the format allows 100 MB, an adapter needs a few hundred kB
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
BYTES_PER_NUMBER = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says it holds.

    Attributes:
        metadata: the free-text part, of which only {"format": "pt"} is allowed (invariant 14).
        tensors: name -> (dtype, shape).
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


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
    return parse_json(_read(path, MAX_JSON_BYTES), path.name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, 64 hex digits.

    Raises:
        PrivacyError: it is missing or cannot be read.
    """
    _check_regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PrivacyError(f"{path.name} cannot be read: {error.strerror}.") from error


def safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file, checked against the file's length.

    Tensors must be of a known type, lie one after another and fill the file to its end.

    Raises:
        PrivacyError: the file is missing or not such a file.
    """
    start = _read(path, 8 + MAX_HEADER_BYTES, truncate=True)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or len(start) < 8 + length:
        raise PrivacyError(
            f"{path.name} is no safetensors file: its header is cut off or above {MAX_HEADER_BYTES} bytes."
        )
    header = parse_json(start[8 : 8 + length], f"the header of {path.name}")
    if not isinstance(header, dict):
        raise PrivacyError(f"the header of {path.name} is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if metadata not in ({}, {"format": "pt"}):
        raise PrivacyError(f'{path.name} holds metadata other than {{"format": "pt"}}: {str(metadata)[:200]!r}.')
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(path, item)):
        position = _check_tensor(path, name, entry, position)
    if 8 + length + position != path.stat().st_size:
        raise PrivacyError(f"{path.name} is cut off, or has bytes that belong to no tensor.")
    return SafetensorsHeader(metadata, {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()})


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


def _read(path: Path, limit: int, truncate: bool = False) -> bytes:
    _check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise PrivacyError(f"{path.name} cannot be read: {error.strerror}.") from error
    if len(content) > limit and not truncate:
        raise PrivacyError(f"{path.name} is larger than {limit} bytes.")
    return content


def _check_regular(path: Path) -> None:
    if not path.is_file():  # false for a folder, a device and a pipe, on which reading would wait for ever
        raise PrivacyError(f"{path.name} is missing, or not a regular file.")


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
