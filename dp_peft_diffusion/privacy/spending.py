"""What each data set has given away: a local ledger of all runs on it, kept outside their folders.

One file a data set, named by an HMAC of its content under a key of this user: the file tells nothing about the images,
and the same images are found again wherever they lie. An entry is written before the first step and counts all planned
steps, so that unfinished and removed runs count too. Other machines, copies with other bytes, and subsets are not seen.
"""

import dataclasses
import datetime
import errno
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting

from dp_peft_diffusion.durable import fsync, write_durably
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.ranges import round_up


@dataclass(frozen=True)
class Spending:
    """One attempt at one run.

    Attributes:
        run: random name of the run.
        attempt: 1 for the first.
        folder: name of the run's folder, without the folders above it.
        time: when it began, UTC.
        mechanism: as planned.
        steps: how many count: all planned ones, or those begun by an attempt that was given up.
    """

    run: str
    attempt: int
    folder: str
    time: str
    mechanism: DPMechanism
    steps: int


class Spent(NamedTuple):
    """What attempts of one neighbouring relation and unit cost together; epsilon is infinite far above 100."""

    neighboring_relation: str
    max_examples_per_group: int
    attempts: int
    epsilon: float


def spending_folder() -> Path:
    """Where the ledgers lie: $XDG_STATE_HOME/dp-peft, by default ~/.local/state/dp-peft."""
    state_home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state_home) if state_home else Path.home() / ".local" / "state") / "dp-peft"


def data_set_id(source_digest: bytes) -> str:
    """The name of a data set in this user's ledgers, 64 hex digits; elsewhere it means nothing.

    Raises:
        RunError: the folder cannot be written.
    """
    path = spending_folder() / "key"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path.parent, 0o700)
        if not path.is_file():
            write_durably(path, secrets.token_bytes(32), 0o600)
        return hmac.new(path.read_bytes(), source_digest, hashlib.sha256).hexdigest()
    except OSError as error:
        raise _unusable(error) from error


def record_spending(source_digest: bytes, run: str, attempt: int, folder: str, mechanism: DPMechanism) -> None:
    """Write down that an attempt begins, before its first step. The same attempt again changes nothing.

    Raises:
        RunError: the ledger cannot be written; the run must not begin.
    """
    name = data_set_id(source_digest)
    if any((entry.run, entry.attempt) == (run, attempt) for entry in spendings(name)):
        return
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = Spending(run, attempt, folder, time, mechanism, mechanism.steps)
    _append(name, {"event": "begun", **dataclasses.asdict(entry)})


def record_given_up(source_digest: bytes, run: str, attempt: int, steps_begun: int) -> None:
    """Write down that an attempt is given up, of which nothing was published: only the steps it began count.

    An attempt that was not recorded stays so.

    Raises:
        RunError: the ledger cannot be written.
    """
    name = data_set_id(source_digest)
    if any((entry.run, entry.attempt) == (run, attempt) for entry in spendings(name)):
        _append(name, {"event": "given_up", "run": run, "attempt": attempt, "steps": steps_begun})


def spendings(name: str) -> tuple[Spending, ...]:
    """All attempts on a data set, oldest first; none when it is not known.

    Raises:
        RunError: the ledger cannot be read or is damaged.
    """
    path = spending_folder() / f"{name}.jsonl"
    found: dict[tuple[str, int], Spending] = {}
    try:
        for line in filter(None, path.read_bytes().split(b"\n") if path.is_file() else ()):
            entry = json.loads(line)
            event, key = entry.pop("event"), (entry["run"], entry["attempt"])
            if event == "begun":
                found[key] = Spending(**entry | {"mechanism": DPMechanism(**entry["mechanism"])})
            else:
                found[key] = dataclasses.replace(found[key], steps=min(entry["steps"], found[key].steps))
    except OSError as error:
        raise _unusable(error) from error
    except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise RunError(
            f"{path} is damaged ({error}), so what this data set has given away is not known. Mend the line, which is "
            "JSON, or move the file away and count its runs yourself."
        ) from error
    return tuple(entry for entry in found.values() if entry.steps)


def spent(entries: tuple[Spending, ...], delta: float) -> list[Spent]:
    """The joint price of all attempts, for each neighbouring relation and unit: two of them have none together.

    Raises:
        UserError: delta is out of range.
    """
    kinds = sorted({(e.mechanism.neighboring_relation, e.mechanism.max_examples_per_group) for e in entries})
    prices = []
    for relation, group in kinds:
        of_kind = [
            dataclasses.replace(entry.mechanism, steps=entry.steps)
            for entry in entries
            if (entry.mechanism.neighboring_relation, entry.mechanism.max_examples_per_group) == (relation, group)
        ]
        event = dp_accounting.ComposedDpEvent(tuple(mechanism.event for mechanism in of_kind))
        price = round_up(accounting.epsilon(event, delta, relation))
        prices.append(Spent(relation, group, len(of_kind), price))
    return prices


def known_data_sets() -> list[str]:
    """Names of all data sets in the ledgers."""
    return sorted(path.stem for path in spending_folder().glob("*.jsonl"))


def _append(name: str, entry: dict[str, Any]) -> None:
    path, line = spending_folder() / f"{name}.jsonl", json.dumps(entry).encode() + b"\n"
    try:
        created = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)  # a torn line would make the whole file unreadable
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if created:
            fsync(path.parent)
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: OSError) -> RunError:
    return RunError(
        f"the ledger of what data sets have given away, {spending_folder()}, cannot be used: {error.strerror}. Set "
        "XDG_STATE_HOME to a folder that can be written, or leave the run out of it with --no_record_spending."
    )
