"""The two folders of a run: NAME for everybody, NAME.private for the data holder."""

import contextlib
import hashlib
import hmac
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from dp_peft_diffusion.durable import fsync, fsync_tree, move_durably, write_durably
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun
from dp_peft_diffusion.privacy.randomness import KEY_BYTES
from dp_peft_diffusion.runs.attempts import ATTEMPTS_FILE, Attempts, load_attempts

MIN_FREE_BYTES = 200_000_000
LONGEST_NAME = 200  # bytes, so that NAME.private fits too
BOOKKEEPING = ("record_spending", "checkpointing_steps")  # recipe keys that shape no update
# What a run that stopped before its first attempt was recorded may have left.
_FILES = ("lock", "key", "ledger.jsonl", "recipe.yaml", "requested.yaml", "problems.csv", ATTEMPTS_FILE)
_OWN = (*_FILES, "shareable", "cache")
BEGUN = (*_OWN, *(f"{name}.partial" for name in _OWN))


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
    def cache(self) -> Path:
        """Every record as the base sees it, until the run is done."""
        return self.private / "cache"

    def recipe(self, attempt: int) -> Path:
        """The resolved recipe of an attempt, which runs again as it stands."""
        return self.private / numbered("recipe.yaml", attempt)

    def requested_recipe(self, attempt: int) -> Path:
        """The recipe as it was asked for, before anything was resolved."""
        return self.private / numbered("requested.yaml", attempt)

    @property
    def publishing(self) -> Path:
        """Present from just before the shareable folder is moved into place."""
        return self.private / "publishing"

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
        self._check_place()
        self.finish_closing()
        record = load_attempts(self.attempts)
        if self.finished.is_file():
            self._check_finished(requested, record)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--output_dir {self.folder} is not empty. {self._advice}")
        if record is not None:
            self._check_same(requested, new_attempt, len(record.attempts))
            return True
        if self.ledger.is_file() and steps_begun(self.ledger):
            raise RunError(f"{self.ledger} lists steps, but {self.attempts} is gone. {self._advice}")
        if new_attempt:
            raise UserError(f"--new_attempt: --output_dir {self.folder} holds no interrupted run. Leave it out.")
        self._check_room()
        return False

    @property
    def _advice(self) -> str:
        return f"Choose another --output_dir, or remove {self.folder} and {self.private}."

    def _check_place(self) -> None:
        """Refuse a place where private files would be shared, or somebody else's would be overwritten."""
        name = self.folder.name
        if name in ("", "..") or len(name.encode()) > LONGEST_NAME:
            raise UserError(f"--output_dir {self.folder} has no short name of its own. Try --output_dir runs/mine.")
        if name.endswith(".private"):
            raise UserError(f"--output_dir {self.folder}: a name ending in .private is that of what is never shared.")
        if self.folder.is_symlink() or self.folder.is_mount():
            raise UserError(f"--output_dir {self.folder} is a link or a mount point. Name a new folder inside it.")
        for above in self.folder.absolute().parents:
            if (above / "privacy.json").exists():
                raise UserError(f"--output_dir {self.folder} lies in {above}, which is to be shared. Choose another.")
        if self.private.is_symlink() or (self.private.exists() and not self.private.is_dir()):
            raise UserError(f"{self.private} is a link or a file. {self._advice}")
        if self.private.is_dir() and not self.attempts.is_file() and not self.finished.is_file():
            foreign = sorted(path.name for path in self.private.iterdir() if path.name not in BEGUN)
            if foreign and not self.ledger.is_file():
                raise UserError(f"{self.private} holds other files ({', '.join(foreign[:3])}). {self._advice}")

    def _check_finished(self, requested: str, record: Attempts | None) -> None:
        if not self.folder.is_dir() and not self.staging.is_dir():
            raise UserError(f"the run of {self.private} is finished, but {self.folder} was removed. {self._advice}")
        if record is not None and self.requested_recipe(len(record.attempts)).read_text() == requested:
            raise FinishedRun(self.folder if self.folder.is_dir() else self.staging)
        raise UserError(f"--output_dir {self.folder} holds a finished run with other options. {self._advice}")

    def _check_same(self, requested: str, new_attempt: bool, attempt: int) -> None:
        before = self.requested_recipe(attempt).read_text()
        if without_bookkeeping(before) != without_bookkeeping(requested) and not new_attempt:
            raise UserError(
                f"--output_dir {self.folder} holds an interrupted run with other options "
                f"({'; '.join(line_differences(before, requested))}). Type its own command to go on, or add "
                f"--new_attempt to begin anew with these, which counts every step begun before. {self._advice}"
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
        Ledger(self.ledger).close()  # from now on a missing ledger is a lost one

    def write_recipes(self, attempt: int, requested: str, resolved: str) -> None:
        """Write down the recipe of an attempt; it holds once the attempt is recorded."""
        write_durably(self.requested_recipe(attempt), requested.encode())
        write_durably(self.recipe(attempt), resolved.encode())

    def read_key(self, key_check: str | None) -> bytes:
        """The secret key of an unfinished run. key_check: what `key_check_of` gave for it; None when it is new.

        Raises:
            RunError: it is gone, or was changed.
        """
        try:
            key = self.key.read_bytes()
        except OSError as error:
            key, reason = b"", str(error.strerror)
        else:
            reason = "it was changed"
        if len(key) != KEY_BYTES or key_check not in (None, key_check_of(key)):
            raise RunError(
                f"the key {self.key} of this run cannot be used ({reason}), so its noise cannot be drawn again. Put it "
                "back, or start afresh in another --output_dir and count all planned steps of this run as spent."
            )
        return key

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
        write_durably(self.publishing, b"")
        move_durably(self.staging, self.folder)
        self.close()

    def close(self) -> None:
        """Mark the run as done and delete its key, after which nobody can take the noise off again."""
        write_durably(self.finished, b"")
        self.key.unlink(missing_ok=True)
        for state in [*self.private.glob("state*.json"), *self.private.glob("state-*.safetensors")]:
            state.unlink(missing_ok=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        fsync(self.private)

    def finish_closing(self) -> None:
        """Delete the key of a run that was done and stopped before its key was deleted."""
        done = self.finished.is_file() or (self.publishing.is_file() and not self.staging.exists())
        if not done or (self.finished.is_file() and not self.key.exists()):
            return
        with contextlib.suppress(RunError), self.locked():  # whoever holds the lock is closing it
            self.close()


def numbered(name: str, attempt: int) -> str:
    """A file of one attempt: "recipe.yaml" of the first, "recipe-2.yaml" of the second."""
    stem, _, suffix = name.partition(".")
    return name if attempt == 1 else f"{stem}-{attempt}.{suffix}"


def key_check_of(key: bytes) -> str:
    """What tells a key from another and says nothing about it."""
    return hmac.new(key, b"dp-peft/1/key check", hashlib.sha256).hexdigest()


def without_bookkeeping(recipe: str) -> list[str]:
    """The lines of a YAML recipe without those that may differ when a run goes on."""
    return [line for line in recipe.splitlines() if line.split(":")[0].strip() not in BOOKKEEPING]


def grid_name(step: int) -> str:
    """File of the grid made after `step` updates."""
    return f"step-{step:04d}.png"


def line_differences(before: str, now: str) -> list[str]:
    """The lines of two YAML recipes that differ, without their comments."""
    old, new = ([line.split("  # ")[0].strip() for line in text.splitlines()] for text in (before, now))
    return [f"{b} before, {n} now" for b, n in zip(old, new, strict=False) if b != n]
