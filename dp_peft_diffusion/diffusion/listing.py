"""The rows of a data set, listed in a fixed order before anything is decoded.

Nothing private is written to disk here. Parquet rows are read with pyarrow, since `datasets.load_dataset` copies every
image into its Arrow cache, downloads Hub files to HF_HOME whatever its `cache_dir`, and raises when one ClassLabel is
out of range. `datasets` resolves Hub names and reads ClassLabel names; the rows of a Hub data set are streamed.
"""

import contextlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dp_peft_diffusion.diffusion.decoding import image_extensions
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import Data

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev")
METADATA = "metadata.jsonl"  # of an image folder
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DIGITS_SPLITS = {"train": (0, 1437), "test": (1437, 1797), "choose": (1437, 1617), "report": (1617, 1797)}


class Row(NamedTuple):
    """A row as stored. What a parquet row has besides its image are pyarrow scalars; `as_py` of a broken one raises."""

    name: str
    image: Path | bytes | Image.Image | None
    label: Any = None
    group: Any = None
    caption: Any = None


class Listing(NamedTuple):
    """Rows as listed. `label_names`: what the source itself calls its classes; None for bare values."""

    num_rows: int
    rows: Iterator[Row]
    label_names: tuple[str, ...] | None
    labelled: bool


def list_rows(data: Data, cache_dir: Path | None) -> Listing:
    """List `data`. Raises UserError: no such data set, split or column."""
    name, path = data.dataset_name, Path(data.dataset_name).expanduser()
    if name == "builtin:digits":
        return _list_digits(data)
    if files := parquet_files(path, data.split):
        return _list_parquet(files, data, None)
    if path.is_dir():
        return _list_folder(path, data)
    if path.exists() or not HUB_NAME.fullmatch(name):
        known = "an image folder, a .parquet file, a folder of them, a Hub name or builtin:digits"
        raise UserError(f"--dataset_name {name!r}: no such folder or parquet file. It takes {known}.")
    addresses, features = _resolve_hub(data, cache_dir)
    return _list_parquet(addresses, data, features)


def _check_fixed_columns(data: Data) -> None:
    if data.group_column is not None:
        raise UserError(
            f"--group_column {data.group_column}: {data.dataset_name!r} has no columns. Put images, labels and groups "
            "into a .parquet file, and give that as --dataset_name."
        )
    if data.image_column != "image" or data.label_column not in (None, "label"):
        unknown = data.image_column if data.image_column != "image" else data.label_column
        raise UserError(f"no column {unknown!r}: {data.dataset_name!r} has the columns image, label.")


def _list_digits(data: Data) -> Listing:
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 0..16, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    _check_fixed_columns(data)
    if data.caption_column is not None:
        raise UserError(f"--caption_column {data.caption_column}: builtin:digits has no captions. Leave it out.")
    split = data.split
    if split not in DIGITS_SPLITS:
        raise UserError(f"builtin:digits has no split {split!r}. Take one of: {', '.join(DIGITS_SPLITS)}.")
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(1797)  # the one numpy stream promised never to change (NEP 19)
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    first, last = DIGITS_SPLITS[split]
    rows = (Row(f"digit {i}", Image.fromarray(images[i]), int(bunch.target[i])) for i in order[first:last])
    return Listing(last - first, rows, tuple(map(str, range(10))), True)


def _list_folder(root: Path, data: Data) -> Listing:
    folders = _folders(root)
    if folders and set(folders) <= set(SPLIT_NAMES):
        if data.split not in folders:
            raise UserError(f"{str(root)!r} has no split {data.split!r}. Take one of: {', '.join(folders)}.")
        root = root / data.split
        folders = _folders(root)
    elif data.split != "train":
        raise UserError(f"{str(root)!r} has no sub-folder of split {data.split!r}. Name the folder of those images.")
    _check_fixed_columns(data)
    extensions = image_extensions()
    found = itertools.chain(root.iterdir(), *((root / folder).rglob("*") for folder in folders))
    names = sorted(path.relative_to(root).parts for path in found if path.suffix.lower() in extensions)
    names = [parts for parts in names if not any(p.startswith(".") for p in parts) and root.joinpath(*parts).is_file()]
    captions = {} if data.caption_column is None else _folder_captions(root, data.caption_column)
    files = (("/".join(parts), parts) for parts in names)
    rows = (Row(n, root.joinpath(*p), p[0] if len(p) > 1 else None, caption=captions.get(n)) for n, p in files)
    return Listing(len(names), rows, tuple(folders), bool(folders))


def _folder_captions(root: Path, column: str) -> dict[str, Any]:
    """Captions by file name, from the metadata.jsonl that `datasets` reads: {"file_name": "a/1.png", COLUMN: "..."}.

    A line is part of the record of the file that it names; of several, the first counts. Captions do not come from
    metadata.csv, where one unpaired quotation mark takes those of the rows behind it.

    Raises:
        UserError: there is no such file. What its lines hold is private, and refuses nothing (invariant 17).
    """
    path, captions = root / METADATA, dict[str, Any]()
    if not path.is_file():
        raise UserError(
            f"--caption_column {column}: {str(root)!r} has no {METADATA}. Write one line for each image, such as "
            f'{{"file_name": "1.png", "{column}": "a red bird"}}.'
        )
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a fault of its record alone
                entry = json.loads(line)
                captions.setdefault(entry["file_name"], entry.get(column))
    return captions


def _folders(root: Path) -> list[str]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if not name.isprintable():  # surrogates of names that are no UTF-8, too
            raise UserError(f"the class folder {name!r} has a name that cannot be printed. Rename it.")
    return names


def parquet_files(path: Path, split: str) -> list[Path]:
    """The parquet files of a split: those named after it; all, when no file is named after any split.

    Empty when `path` is no parquet file nor a folder that holds one. Raises UserError: no file of that split.
    """
    if path.is_file() and path.suffix == ".parquet":
        if split != "train":
            raise UserError(f"{str(path)!r} is one file, without a split {split!r}. Name the file of those images.")
        return [path]
    files = sorted(path.glob("*.parquet")) if path.is_dir() else []
    split_of = {file: re.split(r"[-_.]", file.name)[0] for file in files}
    if any(named == split or named in SPLIT_NAMES for named in split_of.values()):
        chosen = [file for file in files if split_of[file] == split]
    else:
        chosen = files if split == "train" else []
    if files and not chosen:
        raise UserError(f"{str(path)!r} has no files of split {split!r}; it has {', '.join(f.name for f in files)}.")
    return chosen


def _resolve_hub(data: Data, cache_dir: Path | None) -> tuple[list[str], datasets.Features | None]:
    """Addresses (hf://...) of the split's parquet files; they are streamed, not downloaded."""
    name = data.dataset_name
    with tempfile.TemporaryDirectory() as scratch:
        try:
            builder = datasets.load_dataset_builder(name, data.dataset_config_name, cache_dir=str(cache_dir or scratch))
        except Exception as error:  # httpx, huggingface_hub and datasets each have their own
            raise hub_error(name, error) from error
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if data.split not in splits:
        raise UserError(f"{name!r} has no split {data.split!r}. Take one of: {', '.join(splits)}.")
    files = splits[data.split]
    if not all(file.endswith(".parquet") for file in files):
        download = f"hf download --repo-type dataset {name} --local-dir FOLDER"
        raise UserError(f"{name!r} keeps other files than parquet. Run `{download}`, then --dataset_name FOLDER.")
    return files, builder.info.features


def hub_error(name: str, error: Exception) -> UserError:
    """What to tell when the Hub does not give the data set `name`."""
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{name!r} is no file or folder here, and as a data set of the Hub it could not be opened "
        f"({type(error).__name__}: {reason}). Check the name and the network, or give a local folder."
    )


def _list_parquet(files: Sequence[Path | str], data: Data, features: datasets.Features | None) -> Listing:
    """`features`: what stands over the files' own metadata, if anything."""
    columns = (data.image_column, data.label_column, data.group_column, data.caption_column)
    wanted = list(dict.fromkeys(column for column in columns if column is not None))
    num_rows, label_names, group_types = 0, [], set()
    for path in files:
        with _parquet(path) as file:
            num_rows += file.metadata.num_rows
            _check_columns(path, file.schema_arrow, data)
            feature = (features or datasets.Features.from_arrow_schema(file.schema_arrow)).get(data.label_column)
            label_names.append(tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None)
            if data.group_column is not None:
                group_types.add(file.schema_arrow.field(data.group_column).type)
    if len(set(label_names)) > 1:
        raise UserError(
            f"{data.dataset_name!r}: its files disagree about the class names. Give one file or rewrite them."
        )
    if len(group_types) > 1:  # else 7 in one file and "7" in another would be two owners
        raise UserError(
            f"{data.dataset_name!r}: its files hold column {data.group_column!r} as "
            f"{' and as '.join(sorted(map(str, group_types)))}. Rewrite them with one type."
        )

    def rows() -> Iterator[Row]:
        for path in files:
            position = itertools.count()
            with _parquet(path) as file:
                for batch in file.iter_batches(16, columns=wanted):
                    values = [batch.column(name) if name else [None] * len(batch) for name in columns]
                    for image, *rest in zip(*values, strict=True):
                        yield Row(f"{Path(path).name} row {next(position)}", _encoded(image), *rest)

    return Listing(num_rows, rows(), label_names[0], data.label_column is not None)


def _encoded(image: pa.Scalar) -> bytes | None:
    return (image["bytes"] if isinstance(image, pa.StructScalar) else image).as_py()


@contextlib.contextmanager
def _parquet(path: Path | str) -> Iterator[pq.ParquetFile]:
    try:
        opened = open(path, "rb") if isinstance(path, Path) else fsspec.open(path, "rb")
        with opened as handle, pq.ParquetFile(handle) as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # the container, not a record: nothing behind it can be listed
        raise UserError(
            f"{str(path)!r} cannot be read as parquet ({type(error).__name__}). Replace the file."
        ) from error


def _check_columns(path: Path | str, schema: pa.Schema, data: Data) -> None:
    single = {"label": data.label_column, "group": data.group_column, "caption": data.caption_column}
    for kind, column in ({"image": data.image_column} | single).items():
        if column is not None and column not in schema.names:
            has = ", ".join(schema.names)
            raise UserError(f"{str(path)!r} has no column {column!r}; it has {has}. Set --{kind}_column.")
    stored = schema.field(data.image_column).type
    encoded = stored.get_field_index("bytes") >= 0 if pa.types.is_struct(stored) else False
    if not (encoded or pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise UserError(
            f"{str(path)!r}: column {data.image_column!r} holds {stored}, not encoded images. Set --image_column."
        )
    for kind, column in single.items():
        if column is not None and pa.types.is_nested(schema.field(column).type):
            raise UserError(f"{str(path)!r}: column {column!r} holds no single {kind}. Set --{kind}_column.")
    if data.caption_column is not None:
        held = schema.field(data.caption_column).type
        text = held.value_type if pa.types.is_dictionary(held) else held
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise UserError(
                f"{str(path)!r}: column {data.caption_column!r} holds {held}, not text. Set --caption_column."
            )
