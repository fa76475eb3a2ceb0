"""Write-ahead record of the steps begun: on disk before the step's noise is drawn (invariant 12)."""

import datetime
import hashlib
import json
import os
from pathlib import Path

from dp_peft_diffusion.durable import fsync
from dp_peft_diffusion.errors import RunError


class Ledger:
    """One JSON line per step begun, appended and never changed; each holds the digest of the line before it.

    A step that is replayed after a crash, with the same noise, is written again and counts once. Reading back counts
    a torn last line too: its step may have been seen. A ledger may so count a step too many, never one too few.

    Attributes:
        path: the file, mode 0600, in the private folder.
        attempt: whose steps `begin` writes.
    """

    def __init__(self, path: Path, attempt: int = 1):
        """Open `path` for appending; create it if need be.

        Raises:
            RunError: the file cannot be opened or written, or was changed.
        """
        self.path, self.attempt = Path(path), attempt
        try:
            created = not self.path.exists()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(self._descriptor, 0o600)
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                self._append(b"\n")  # what follows must not melt into a torn line
            if created:
                fsync(self.path.parent)
        except OSError as error:
            raise RunError(f"the ledger {self.path} cannot be opened: {error.strerror}. Check the folder.") from error
        self._steps = _parse(content, self.path)
        self._last = next((line for line in reversed(content.split(b"\n")) if line), b"")

    @property
    def steps_begun(self) -> dict[int, int]:
        """How many different steps each attempt began: {attempt: steps}."""
        return {attempt: len(steps) for attempt, steps in self._steps.items()}

    def begin(self, step: int) -> None:
        """Put "step `step` begins" on disk; call it before the noise of that step is drawn.

        Raises:
            RunError: the line cannot be written; the step must not be taken.
        """
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {"event": "step_begun", "attempt": self.attempt, "step": step, "time": time}
        self._steps.setdefault(self.attempt, set()).add(step)
        self._last = json.dumps(line | {"after": _digest(self._last)}).encode()
        try:
            self._append(self._last + b"\n")
        except OSError as error:
            raise RunError(
                f"step {step} is not begun: the ledger {self.path} cannot be written: {error.strerror}. "
                "Make room, then type the same command again: nothing is lost."
            ) from error

    def close(self) -> None:
        """Close the file. Every line is on disk already."""
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)  # invariant 12


def steps_begun(path: Path) -> dict[int, int]:
    """What a ledger counts, {attempt: steps}, without opening it for writing; empty when there is none.

    Raises:
        RunError: it cannot be read, or was changed.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"the ledger {path} cannot be read: {error.strerror}. Check the folder.") from error
    return {attempt: len(steps) for attempt, steps in _parse(content, path).items()}


def _parse(content: bytes, path: Path) -> dict[int, set[int]]:
    """The different steps of each attempt. A line that is no JSON was torn: it counts as the step that came next."""
    steps: dict[int, set[int]] = {}
    attempt, before = 1, b""
    for line in filter(None, content.split(b"\n")):
        try:
            entry = json.loads(line)
        except ValueError:
            known = steps.setdefault(attempt, set())
            known.add(max(known, default=-1) + 1)
        else:
            if not isinstance(entry, dict) or entry.get("after") != _digest(before):
                raise RunError(
                    f"the ledger {path} was changed: a line of it does not follow the one before. Put the file back "
                    "as it was, or start afresh in another --output_dir and count all planned steps of this run."
                )
            attempt = entry["attempt"]
            # Steps begin in order: a higher number stands for all before it.
            steps.setdefault(attempt, set()).update(range(entry["step"] + 1))
        before = line
    return steps


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:32]
