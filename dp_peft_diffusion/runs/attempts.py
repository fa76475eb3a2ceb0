"""The attempts at one run: each has its own random streams, and what the earlier ones began is charged."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Release

ATTEMPTS_FILE = "attempts.json"


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        name: random, in the ledger of the data set.
        context: everything that shapes its updates.
        mechanism: the fields of its `DPMechanism`; without a noise multiplier under --no_privacy.
        group_column: whose images the unit is, if not one image.
    """

    name: str
    context: dict[str, str]
    mechanism: dict[str, Any]
    group_column: str | None


@dataclass(frozen=True)
class Attempts:
    """All attempts at a run, the present one last.

    Attributes:
        key_check: tells the run's key from another.
        key_source: "os", or "given" by a caller.
        escrowed: whether a copy of the key was put aside for replay.
    """

    key_check: str
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


def charged(
    record: Attempts, given_up: int, begun: dict[int, int], group_column: str | None, ledger: Path
) -> tuple[Release, ...]:
    """What the first `given_up` attempts cost: every step they began, whether or not its noise was ever seen.

    Args:
        record: of the run.
        given_up: how many of its attempts.
        begun: steps of each attempt, by the ledger.
        group_column: whose images the unit of this attempt is.
        ledger: its file, for messages.

    Raises:
        RunError: the ledger knows of attempts that the record does not.
        UserError: an attempt had no noise, or another unit.
    """
    if max(begun, default=0) > len(record.attempts):
        raise RunError(
            f"{ledger} lists steps of attempt {max(begun)}, of which {ATTEMPTS_FILE} beside it knows nothing: it was "
            "put back to an older state. Put back the newer one, or start afresh in another --output_dir."
        )
    releases = []
    for number, attempt in enumerate(record.attempts[:given_up], start=1):
        mechanism = DPMechanism(**attempt.mechanism)
        steps = min(begun.get(number, 0), mechanism.steps)
        if steps and mechanism.noise_multiplier is None:
            raise UserError(
                f"attempt {number} of this run trained without privacy, so nothing can be promised any more. Choose "
                "another --output_dir, for images that are public."
            )
        if steps and attempt.group_column != group_column:
            raise UserError(
                f"attempt {number} of this run counted by {attempt.group_column or 'single images'}, this one by "
                f"{group_column or 'single images'}: their prices do not add up. Give --group_column as before."
            )
        if steps:
            mechanism = dataclasses.replace(mechanism, steps=steps)
            releases.append(Release(mechanism=mechanism, source="an earlier attempt of this run"))
    return tuple(releases)
