"""The two folders of a run: NAME for everybody, NAME.private for the data holder."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from dp_peft_diffusion.durable import fsync, fsync_tree, move_durably, write_durably
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.runs.attempts import ATTEMPTS_FILE

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
    that is stopped leaves nothing half-written that somebody could share, and nobody outside has
    seen a step that is replayed.
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
    def attempts(self) -> Path:
        """The attempts and their contexts; once it is there, the run has begun."""
        return self.private / ATTEMPTS_FILE

    @property
    def key(self) -> Path:
        """The secret key while the run is going on; mode 0600."""
        return self.private / "key"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, which runs again as it stands."""
        return self.private / "recipe.yaml"

    @property
    def requested_recipe(self) -> Path:
        """The recipe as it was asked for, before anything was resolved."""
        return self.private / "requested.yaml"

    @property
    def finished(self) -> Path:
        """Present once the run is done."""
        return self.private / "finished"

    def check_usable(self, requested: str, new_attempt: bool = False) -> bool:
        """Whether this very run was begun and can go on; False when there is none yet.

        Raises:
            FinishedRun: this very run is finished.
            UserError: another run, other files, or no room on the disk.
            RunError: what lies there is damaged.
        """
        if not self.folder.name:
            raise UserError(f"--output_dir {self.folder} has no name of its own. Try --output_dir runs/mine.")
        if self.folder.is_symlink() or self.folder.is_mount():
            raise UserError(f"--output_dir {self.folder} is a link or a mount point. Name a new folder inside it.")
        self.finish_closing()
        if self.finished.is_file():
            self._check_finished(requested)
        if self.attempts.is_file():
            self._check_same(requested, new_attempt)
            return True
        if self.ledger.is_file() and steps_begun(self.ledger):
            raise RunError(f"{self.ledger} lists steps, but {self.attempts} is gone. {self._advice}")
        if new_attempt:
            raise UserError(f"--new_attempt: --output_dir {self.folder} holds no interrupted run. Leave it out.")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--output_dir {self.folder} is not empty. {self._advice}")
        self._check_room()
        return False

    @property
    def _advice(self) -> str:
        return f"Choose another --output_dir, or remove {self.folder} and {self.private}."

    def _check_finished(self, requested: str) -> None:
        if not self.folder.is_dir() and not self.staging.is_dir():
            raise UserError(f"the run of {self.private} is finished, but {self.folder} was removed. {self._advice}")
        if self.requested_recipe.read_text() == requested:
            raise FinishedRun(self.folder if self.folder.is_dir() else self.staging)
        raise UserError(f"--output_dir {self.folder} holds a finished run with other options. {self._advice}")

    def _check_same(self, requested: str, new_attempt: bool) -> None:
        changed = line_differences(self.requested_recipe.read_text(), requested)
        if changed and not new_attempt:
            raise UserError(
                f"--output_dir {self.folder} holds an interrupted run with other options ({'; '.join(changed)}). Type "
                "its own command to go on, or add --new_attempt to begin anew with these, which counts every step "
                f"begun before. {self._advice}"
            )

    def _check_room(self) -> None:
        parent = next(path for path in self.folder.absolute().parents if path.is_dir())
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output_dir {self.folder}: {parent} cannot be written to. Choose another --output_dir.")
        if shutil.disk_usage(parent).free < MIN_FREE_BYTES:
            raise UserError(
                f"the disk of {parent} has less than 200 MB free. Make room, or choose another --output_dir."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this run. The lock goes with the process, however it ends.

        Raises:
            RunError: another process holds it.
        """
        self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.private, 0o700)
        lock = filelock.FileLock(self.private / "lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"another process is training in {self.private}. Wait for it, or choose another --output_dir."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def create(self, key: bytes) -> None:
        """Make the private folder with the key in it."""
        if self.folder.is_dir():
            self.folder.rmdir()  # empty, by check_usable
        self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self.key, key, 0o600)

    def restart(self, requested: str, resolved: str) -> None:
        """Write down the recipe of an attempt, and take back everything an earlier one staged."""
        (self.staging / "samples").mkdir(parents=True, exist_ok=True)
        for state in self.private.glob("state*"):
            state.unlink()
        write_durably(self.requested_recipe, requested.encode())
        write_durably(self.recipe, resolved.encode())
        self.clean_staging(0)

    def read_key(self) -> bytes:
        """The secret key of an unfinished run.

        Raises:
            RunError: it is gone.
        """
        try:
            return self.key.read_bytes()
        except OSError as error:
            raise RunError(
                f"the key {self.key} of this run cannot be read ({error.strerror}), so its noise cannot be drawn "
                "again. Start afresh in another --output_dir and count all planned steps of this run as spent."
            ) from error

    def clean_staging(self, steps: int) -> None:
        """Take back what was staged after `steps` updates: it is made again."""
        metrics, samples = self.staging / "metrics.jsonl", self.staging / "samples"
        if metrics.is_file():
            write_durably(metrics, b"".join(metrics.read_bytes().splitlines(keepends=True)[:steps]))
        kept = {metrics, samples} | {samples / grid_name(step) for step in range(steps + 1)}
        for path in [*samples.iterdir(), *self.staging.iterdir()]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """Move the finished shareable folder into place, then forget the key."""
        now = time.time()
        for path in [*self.staging.rglob("*"), self.staging]:
            os.utime(path, (now, now))  # when which grid was made tells how long batches took (invariant 13)
        fsync_tree(self.staging)
        move_durably(self.staging, self.folder)
        self.close()

    def close(self) -> None:
        """Delete the key, after which nobody can take the noise off again, and mark the run as done."""
        self.key.unlink(missing_ok=True)
        for state in self.private.glob("state*"):
            state.unlink()
        fsync(self.private)
        self.finished.touch()
        fsync(self.private)

    def finish_closing(self) -> None:
        """Delete the key of a run that was published and stopped before its key was deleted."""
        published = self.attempts.is_file() and self.folder.is_dir() and not self.staging.exists()
        if published and (self.key.exists() or not self.finished.is_file()):
            self.close()


def grid_name(step: int) -> str:
    """File of the grid made after `step` updates."""
    return f"step-{step:04d}.png"


def line_differences(before: str, now: str) -> list[str]:
    """The lines of two YAML recipes that differ, without their comments."""
    old, new = ([line.split("  # ")[0].strip() for line in text.splitlines()] for text in (before, now))
    return [f"{b} before, {n} now" for b, n in zip(old, new, strict=False) if b != n]
