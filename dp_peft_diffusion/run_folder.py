"""The two folders of a run: NAME for everybody, NAME.private for the data holder."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from dp_peft_diffusion.errors import UserError

MIN_FREE_BYTES = 200_000_000


class FinishedRun(Exception):
    """The same run was finished before; nothing is left to do."""

    def __init__(self, folder: Path):
        super().__init__(f"{folder} is finished")
        self.folder = folder


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Everything is made in `private`; `folder` appears at the end, whole, by one rename. So a run
    that is stopped leaves nothing half-written that somebody could share.
    """

    folder: Path

    @property
    def private(self) -> Path:
        """Mode 0700, beside the shareable folder, never inside."""
        return self.folder.with_name(self.folder.name + ".private")

    @property
    def staging(self) -> Path:
        """The shareable folder while it is being made."""
        return self.private / "shareable"

    @property
    def ledger(self) -> Path:
        """Steps begun."""
        return self.private / "ledger.jsonl"

    @property
    def key(self) -> Path:
        """The secret key while the run is going on; mode 0600."""
        return self.private / "key"

    @property
    def requested_recipe(self) -> Path:
        """The recipe as it was asked for, before anything was resolved."""
        return self.private / "requested.yaml"

    @property
    def finished(self) -> Path:
        """Present once the run is done."""
        return self.private / "finished"

    def check_usable(self, requested: str) -> None:
        """Refuse a folder that holds something else.

        Raises:
            FinishedRun: this very run is finished.
            UserError: another run, an interrupted run, other files, or no room on the disk.
        """
        if not self.folder.name:
            raise UserError(f"--output_dir {self.folder} has no name of its own. Try --output_dir runs/mine.")
        advice = f"Choose another --output_dir, or remove {self.folder} and {self.private}."
        if self.folder.is_symlink() or self.folder.is_mount():
            raise UserError(f"--output_dir {self.folder} is a link or a mount point. Name a new folder inside it.")
        if self.finished.is_file():
            if not self.folder.is_dir() and not self.staging.is_dir():
                raise UserError(f"the run of {self.private} is finished, but {self.folder} was removed. {advice}")
            if self.requested_recipe.read_text() == requested:
                raise FinishedRun(self.folder if self.folder.is_dir() else self.staging)
            raise UserError(f"--output_dir {self.folder} holds a finished run with other options. {advice}")
        if self.private.is_dir() and any(self.private.iterdir()):
            begun = len(self.ledger.read_text().splitlines()) if self.ledger.is_file() else 0
            raise UserError(
                f"--output_dir {self.folder} holds an interrupted run that began {begun} steps "
                f"({self.ledger}). This version cannot resume. To start afresh"
                f"{', which spends privacy again' if begun else ''}: {advice}"
            )
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--output_dir {self.folder} is not empty. {advice}")
        parent = next(path for path in self.folder.absolute().parents if path.is_dir())
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output_dir {self.folder}: {parent} cannot be written to. Choose another --output_dir.")
        if shutil.disk_usage(parent).free < MIN_FREE_BYTES:
            raise UserError(
                f"the disk of {parent} has less than 200 MB free. Make room, or choose another --output_dir."
            )

    def create(self, requested: str, key: bytes) -> None:
        """Make the private folder with the key in it."""
        if self.folder.is_dir():
            self.folder.rmdir()  # empty, by check_usable
        self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.private, 0o700)
        (self.staging / "samples").mkdir(parents=True)
        self.requested_recipe.write_text(requested)
        with open(os.open(self.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)

    def publish(self) -> None:
        """Move the finished shareable folder into place, then forget the key."""
        now = time.time()
        for path in [*self.staging.rglob("*"), self.staging]:
            os.utime(path, (now, now))  # when which grid was made tells how long batches took (invariant 13)
        _fsync_tree(self.staging)
        os.rename(self.staging, self.folder)
        self.close()

    def close(self) -> None:
        """Mark the run as done and delete its key: nobody can take the noise off again."""
        self.forget_key()
        self.finished.touch()
        _fsync_tree(self.private)

    def forget_key(self) -> None:
        """Delete the key, also of a run that failed: it is never resumed."""
        self.key.unlink(missing_ok=True)


def _fsync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
