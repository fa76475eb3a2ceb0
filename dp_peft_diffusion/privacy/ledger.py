"""Write-ahead record of the steps begun: on disk before the step's noise is drawn (invariant 12)."""

import datetime
import json
import os
from pathlib import Path

from dp_peft_diffusion.errors import RunError


class Ledger:
    """One JSON line per step begun, appended and never changed.

    Reading back counts every line, a torn last one too: its step may have been seen. A ledger may so count a step
    too many, never one too few.

    Attributes:
        path: the file, mode 0600, in the private folder.
        steps_begun: over all attempts that wrote to this file.
    """

    def __init__(self, path: Path):
        """Open `path` for appending; create it if need be.

        Raises:
            RunError: the file cannot be opened or written.
        """
        self.path = Path(path)
        try:
            created = not self.path.exists()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(self._descriptor, 0o600)
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                self._append(b"\n")  # what follows must not melt into a torn line
            if created:
                _fsync_folder(self.path.parent)
        except OSError as error:
            raise RunError(f"the ledger {self.path} cannot be opened: {error.strerror}. Check the folder.") from error
        self.steps_begun = sum(1 for line in content.split(b"\n") if line.strip())

    def begin(self, step: int) -> None:
        """Put "step `step` begins" on disk; call it before the noise of that step is drawn.

        Raises:
            RunError: the line cannot be written; the step must not be taken.
        """
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.steps_begun += 1
        try:
            self._append(json.dumps({"event": "step_begun", "step": step, "time": time}).encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"step {step} is not begun: the ledger {self.path} cannot be written: {error.strerror}. "
                "Free some space and start afresh in another --output_dir."
            ) from error

    def close(self) -> None:
        """Close the file. Every line is on disk already."""
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)  # invariant 12


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
