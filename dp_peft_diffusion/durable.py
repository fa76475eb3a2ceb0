"""Files that survive a crash: whole or not at all, and on the disk when the call returns."""

import errno
import os
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Put `content` into `path` by temp file, fsync, rename and fsync of the folder.

    The file that was there stays until the new one is complete. A full disk raises OSError and leaves it as it was.
    """
    partial = partial_of(path)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
    move_durably(partial, path)


def move_durably(partial: Path, path: Path) -> None:
    """Rename a complete file or folder into place and wait until the disk has it, content first."""
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)


def partial_of(path: Path) -> Path:
    """Where a file lies while it is being written; never read back."""
    return path.with_name(path.name + ".partial")


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or the list of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_weights_readable(folder: Path) -> None:
    """Whoever may open a folder may read its weights: safetensors makes files for their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(path.parent.stat().st_mode & 0o666)


def fsync_tree(folder: Path) -> None:
    """Wait until the disk has everything below `folder`."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
