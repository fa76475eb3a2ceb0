"""The attempts at one run: each has its own random streams, and what the earlier ones began is charged."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Release

ATTEMPTS_FILE = "attempts.json"


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        context: everything that shapes its updates.
        mechanism: the fields of its `DPMechanism`.
    """

    context: dict[str, str]
    mechanism: dict[str, Any]


@dataclass(frozen=True)
class Attempts:
    """All attempts at a run, the present one last.

    Attributes:
        run: random name of the run in the ledger of the data set.
        key_source: "os", or "given" by a caller.
        escrowed: whether a copy of the key was put aside for replay.
    """

    run: str
    key_source: str
    escrowed: bool
    attempts: tuple[Attempt, ...]

    def save(self, path: Path) -> None:
        """Write whole or not at all. Raises OSError when the disk is full."""
        write_durably(path, json.dumps(dataclasses.asdict(self), indent=1).encode(), 0o600)


def load_attempts(path: Path) -> Attempts | None:
    """The attempts of a run; None when none was begun.

    Raises:
        RunError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_bytes())
        attempts = tuple(Attempt(**attempt) for attempt in table.pop("attempts"))
        return Attempts(**table, attempts=attempts)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path} is damaged ({type(error).__name__}), so this run cannot go on. Put it back as it was, or start "
            "afresh in another --output_dir and count all planned steps of this run as spent."
        ) from error


def charged(record: Attempts, given_up: int, ledger: Path) -> tuple[Release, ...]:
    """What the first `given_up` attempts cost: every step they began, whether or not its noise was ever seen.

    Raises:
        RunError: the ledger cannot be read, was changed, or knows of attempts that the record does not.
    """
    begun = steps_begun(ledger)
    if max(begun, default=0) > len(record.attempts):
        raise RunError(
            f"{ledger} lists steps of attempt {max(begun)}, of which {ATTEMPTS_FILE} beside it knows nothing: it was "
            "put back to an older state. Put back the newer one, or start afresh in another --output_dir."
        )
    releases = []
    for number, attempt in enumerate(record.attempts[:given_up], start=1):
        mechanism = DPMechanism(**attempt.mechanism)
        steps = min(begun.get(number, 0), mechanism.steps)
        if steps and mechanism.noise_multiplier is not None:
            mechanism = dataclasses.replace(mechanism, steps=steps)
            releases.append(Release(mechanism=mechanism, source="an earlier attempt of this run"))
    return tuple(releases)
