"""A copy of the key, put aside for replay (`--escrow_key FILE`). Whoever has it can take the noise off."""

import json
from pathlib import Path
from typing import NamedTuple

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import UserError

SCHEMA = "dp-peft/key/1"


class EscrowedKey(NamedTuple):
    """What a replay needs beside the images: the run's key, and where its streams began."""

    key: bytes
    attempt: int
    context: dict[str, str]


def check_place(path: Path, folder: Path) -> None:
    """Refuse a place where the key would be shared or overwrite something.

    Raises:
        UserError: it lies in the shareable folder, exists and is no escrowed key, or has no folder.
    """
    place, shared = path.resolve(), folder.resolve()
    private = shared.with_name(f"{shared.name}.private")
    if place in (shared, private) or private in place.parents:
        raise UserError(f"--escrow_key {path} is where the run itself writes. Choose a place of its own.")
    if shared in place.parents:
        raise UserError(f"--escrow_key {path} lies in {folder}, which is to be shared. Choose a place of its own.")
    if not path.parent.is_dir():
        raise UserError(f"--escrow_key {path}: there is no folder {path.parent}. Make it first.")
    if path.exists():
        read_escrowed_key(path)


def write_escrowed_key(path: Path, escrowed: EscrowedKey) -> None:
    """Write the key, mode 0600; the same key again changes nothing but the attempt.

    Raises:
        UserError: the file holds the key of another run.
    """
    if path.exists() and read_escrowed_key(path).key != escrowed.key:
        raise UserError(f"--escrow_key {path} holds the key of another run. Choose another file.")
    document = {
        "schema": SCHEMA,
        "warning": "Whoever has this key can take the noise off the adapter. Keep it as you keep the images.",
        "key": escrowed.key.hex(),
        "attempt": escrowed.attempt,
        "context": escrowed.context,
    }
    write_durably(path, json.dumps(document, indent=1).encode(), 0o600)


def read_escrowed_key(path: Path) -> EscrowedKey:
    """The key in a file that `write_escrowed_key` wrote.

    Raises:
        UserError: it is missing or something else.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA:
            raise ValueError
        return EscrowedKey(bytes.fromhex(document["key"]), document["attempt"], document["context"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no key that --escrow_key wrote. Check the file.") from error
