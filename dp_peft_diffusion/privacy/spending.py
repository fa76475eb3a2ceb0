"""What each data set has given away: a local ledger of all runs on it, kept outside their folders.

One file a data set, named by an HMAC of its content under a key of this user: the file tells nothing about the images,
and the same images are found again wherever they lie. An entry is written before the first step and counts all planned
steps, so that unfinished and removed runs count too. Other machines, copies with other bytes, and subsets are not seen.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import filelock

from dp_peft_diffusion.durable import fsync, write_durably
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.ranges import round_up


@dataclass(frozen=True)
class Spending:
    """One attempt at one run.

    Attributes:
        name: random name of the attempt.
        attempt: 1 for the first of a run.
        folder: name of the run's folder, without the folders above it.
        time: when it began, UTC.
        mechanism: as planned.
        group_column: whose images the unit is, if not one image.
        steps: how many count: all planned ones, or those begun by an attempt that was given up and never published.
    """

    name: str
    attempt: int
    folder: str
    time: str
    mechanism: DPMechanism
    group_column: str | None
    steps: int


class Spent(NamedTuple):
    """What attempts of one neighbouring relation and unit cost together; epsilon is infinite far above 100."""

    neighboring_relation: str
    max_examples_per_group: int
    group_column: str | None
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
    with _locked():
        try:
            if not path.is_file():
                write_durably(path, secrets.token_bytes(32), 0o600)
            return hmac.new(path.read_bytes(), source_digest, hashlib.sha256).hexdigest()
        except OSError as error:
            raise _unusable(error) from error


def record_spending(
    source_digest: bytes, name: str, attempt: int, folder: str, mechanism: DPMechanism, group_column: str | None = None
) -> None:
    """Write down that an attempt begins, before its first step. The same attempt again changes nothing.

    Raises:
        RunError: the ledger cannot be written; the run must not begin.
    """
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = Spending(name, attempt, folder, time, mechanism, group_column, mechanism.steps)
    _note(source_digest, name, {"event": "begun", **dataclasses.asdict(entry)}, known=False)


def record_given_up(source_digest: bytes, name: str, steps_begun: int) -> None:
    """Write down that an attempt is given up, of which nothing was published: only the steps it began count.

    An attempt that was not recorded stays so.

    Raises:
        RunError: the ledger cannot be written.
    """
    _note(source_digest, name, {"event": "given_up", "name": name, "steps": steps_begun}, known=True)


def record_published(source_digest: bytes, name: str) -> None:
    """Write down, before it happens, that an attempt is published: it counts whole, whatever a copy of it does.

    Raises:
        RunError: the ledger cannot be written; the run must not be published.
    """
    _note(source_digest, name, {"event": "published", "name": name}, known=True)


def spendings(data_set: str) -> tuple[Spending, ...]:
    """All attempts on a data set, oldest first; none when it is not known.

    Raises:
        RunError: the ledger cannot be read or is damaged.
    """
    path, found, published = spending_folder() / f"{data_set}.jsonl", dict[str, Spending](), set[str]()
    try:
        for line in filter(None, path.read_bytes().split(b"\n") if path.is_file() else ()):
            entry = json.loads(line)
            event, name = entry.pop("event"), entry["name"]
            if event == "begun":
                found[name] = Spending(**entry | {"mechanism": DPMechanism(**entry["mechanism"])})
            elif event == "published":
                published.add(name)
            else:
                found[name] = dataclasses.replace(found[name], steps=min(entry["steps"], found[name].steps))
    except OSError as error:
        raise _unusable(error) from error
    except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise RunError(
            f"{path} is damaged ({error}), so what this data set has given away is not known. Mend the line, which is "
            "JSON, or move the file away and count its runs yourself."
        ) from error
    for name in published & set(found):
        found[name] = dataclasses.replace(found[name], steps=found[name].mechanism.steps)
    return tuple(entry for entry in found.values() if entry.steps)


def spent(entries: tuple[Spending, ...], delta: float) -> list[Spent]:
    """The joint price of all attempts, for each neighbouring relation and unit: two of them have none together.

    Raises:
        UserError: delta is out of range.
    """
    of_unit: dict[tuple[str, int, str], list[DPMechanism]] = {}
    for entry in entries:
        mechanism = dataclasses.replace(entry.mechanism, steps=entry.steps)
        unit = (mechanism.neighboring_relation, mechanism.max_examples_per_group, entry.group_column or "")
        of_unit.setdefault(unit, []).append(mechanism)
    prices = []
    for (relation, group, column), mechanisms in sorted(of_unit.items()):
        event = dp_accounting.ComposedDpEvent(tuple(mechanism.event for mechanism in mechanisms))
        price = round_up(accounting.epsilon(event, delta, relation))
        prices.append(Spent(relation, group, column or None, len(mechanisms), price))
    return prices


def known_data_sets() -> list[str]:
    """Names of all data sets in the ledgers."""
    return sorted(path.stem for path in spending_folder().glob("*.jsonl"))


def _note(source_digest: bytes, name: str, entry: dict[str, Any], known: bool) -> None:
    """Append an entry if the attempt is known already, or is not, as it must be for this entry to say something."""
    data_set = data_set_id(source_digest)
    with _locked():
        if any(spending.name == name for spending in spendings(data_set)) != known:
            return
        path, line = spending_folder() / f"{data_set}.jsonl", json.dumps(entry).encode() + b"\n"
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


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time at these ledgers."""
    folder = spending_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        lock = filelock.FileLock(folder / "lock", timeout=60, mode=0o600)
        lock.acquire()
    except OSError as error:  # filelock's Timeout is one
        raise _unusable(error) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(error: OSError) -> RunError:
    reason = error.strerror or error
    return RunError(
        f"the ledger of what data sets have given away, {spending_folder()}, cannot be used: {reason}. Set "
        "XDG_STATE_HOME to a folder that can be written, or leave the run out of it with --no_record_spending."
    )
