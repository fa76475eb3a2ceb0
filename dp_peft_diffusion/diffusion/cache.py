"""Records of fixed shapes in memory-mapped files, so that N of them never have to fit into memory.

A cache is a folder (mode 0700) with one .npy file for each array, and `cache.json`, which names everything the arrays
were made from. It appears whole, by one rename, or not at all. Records that are not kept lie in files without a name,
which no kill leaves behind (invariant 13).
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from dp_peft_diffusion.durable import fsync_tree, move_durably, partial_of

DESCRIPTION = "cache.json"
Record = Mapping[str, np.ndarray]


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `folder` when all is written; after an error neither is left.

    The old one goes first: a disk need not hold both.
    """
    partial = partial_of(folder)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        yield partial
        fsync_tree(partial)
        move_durably(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_arrays(
    folder: Path | None, records: Iterable[Record], null: Record, num_records: int
) -> dict[str, np.ndarray]:
    """Write `num_records` records, one after another, and the null record behind them; map (N + 1, ...) for reading.

    folder: gets name.npy of each array. None: files without a name, which last as long as the arrays.
    null: says the name, shape and type of each array. The files are mode 0600.

    Raises:
        OSError: the disk is full, among others. (A write into a memory map would end the process by a signal.)
    """
    shapes = {name: (num_records + 1, *array.shape) for name, array in null.items()}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_new_file(folder, name)) for name in null}
        starts = dict[str, int]()
        for name, file in files.items():
            description = np.lib.format.dtype_to_descr(null[name].dtype)
            header = {"descr": description, "fortran_order": False, "shape": shapes[name]}
            np.lib.format.write_array_header_1_0(file, header)
            starts[name] = file.tell()
        for record in itertools.chain(records, [null]):
            for name, file in files.items():
                file.write(np.asarray(record[name], null[name].dtype).reshape(null[name].shape).tobytes())
        arrays = dict[str, np.ndarray]()
        for name, file in files.items():
            file.flush()
            arrays[name] = np.memmap(file, null[name].dtype, "r", starts[name], shapes[name])
    return arrays


def open_arrays(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Map the arrays of `write_arrays` into memory, for reading.

    Raises:
        OSError, ValueError, EOFError: a file is gone or cut.
    """
    return {name: np.load(_array(folder, name), mmap_mode="r", allow_pickle=False) for name in names}


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Say what the arrays were made from."""
    with open(folder / DESCRIPTION, "x", opener=_private, encoding="utf-8") as file:
        json.dump(description, file)


def read_description(folder: Path) -> dict[str, Any] | None:
    """What `write_description` wrote; None where there is no such thing."""
    try:
        description = json.loads((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        return None
    return description if isinstance(description, dict) else None


def _array(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _new_file(folder: Path | None, name: str) -> IO[bytes]:
    if folder is None:
        return tempfile.TemporaryFile()  # mode 0600; its name, if it ever has one, goes before the first byte comes
    return open(_array(folder, name), "x+b", opener=_private)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
