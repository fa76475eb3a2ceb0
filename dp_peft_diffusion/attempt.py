"""From a prepared run to its first step: write the attempt down, or pick up an interrupted one (invariant 12)."""

import csv
import dataclasses
import secrets
from pathlib import Path

import torch

from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.gradients.optimizer import Ema
from dp_peft_diffusion.preparation import Prepared, check_context, check_ledger
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun
from dp_peft_diffusion.privacy.randomness import attempt_key, new_key
from dp_peft_diffusion.privacy.spending import record_given_up, record_published, record_spending
from dp_peft_diffusion.recipe import to_yaml
from dp_peft_diffusion.runs.attempts import Attempt, Attempts, load_attempts
from dp_peft_diffusion.runs.context import context_digest
from dp_peft_diffusion.runs.escrow import EscrowedKey, write_escrowed_key
from dp_peft_diffusion.runs.folder import key_check_of
from dp_peft_diffusion.runs.state import load_state, restore


def open_images(prepared: Prepared, folder: Path | None) -> PrivateImages:
    """The private images, decoded into `folder`; nothing else is done with them before step 1 (invariant 15).

    Raises:
        UserError: what `open_examples` refuses.
        RunError: there are more or fewer than when the noise was calibrated.
    """
    images = open_examples(prepared.recipe.data, prepared.base, folder, prepared.recipe.train.seed)
    if len(images) != prepared.num_examples:
        raise RunError("the images changed since the plan was made. Type the same command again.")
    return images


def context_of_run(prepared: Prepared, images: PrivateImages) -> dict[str, str]:
    """Everything that shapes an update of a run."""
    return prepared.context | {"images": images.content_digest.hex()}


def begin(
    prepared: Prepared, images: PrivateImages, key: bytes | None, escrow_key: Path | None
) -> tuple[Attempts, bytes]:
    """Write down the attempt before its first step, or pick up an interrupted one; its record and stream key.

    Called under the lock of the run. An attempt exists once it is in the record, which is written in one piece: a
    crash before leaves the attempt before, a crash after goes on with this one.

    Raises:
        RunError: another process has been at this run since it was prepared, or its key was changed.
        UserError: the key is another one than the run's, or its escrow would fall behind.
    """
    folders, earlier = prepared.run, prepared.earlier
    begun = load_attempts(folders.attempts), steps_begun(folders.ledger), folders.finished.is_file()
    if begun != (earlier, prepared.begun, False):
        raise RunError(f"another process has been at {folders.private} meanwhile. Type the same command again.")
    context = context_of_run(prepared, images)
    if prepared.resuming and earlier is not None:
        check_context(earlier, context, folders)
    if earlier is None:
        folders.create(key or new_key())
    run_key = folders.read_key(None if earlier is None else earlier.key_check)
    if key is not None and key != run_key:
        raise UserError(f"the run in {folders.private} was begun with another key. Pass that, or none.")
    record = earlier or Attempts(key_check_of(run_key), "os" if key is None else "given", False, ())
    if record.escrowed and escrow_key is None and not prepared.resuming:
        raise UserError("the key of this run was put aside: give --escrow_key with the same file, which must keep up.")
    if not prepared.resuming:
        folders.write_recipes(prepared.attempt, prepared.requested, to_yaml(prepared.recipe))
        record = dataclasses.replace(record, attempts=(*record.attempts, attempt_of(prepared, context)))
    record = dataclasses.replace(record, escrowed=record.escrowed or escrow_key is not None)
    record.save(folders.attempts)
    if escrow_key is not None:  # after the record: the certificate may say too much of it, never too little
        write_escrowed_key(escrow_key, EscrowedKey(run_key, prepared.attempt, context))
    write_problems(images, folders.private / "problems.csv")
    note_spending(prepared, images, record)
    # Another context draws other noise (invariant 12).
    return record, attempt_key(run_key, prepared.attempt, context_digest(context))


def attempt_of(prepared: Prepared, context: dict[str, str]) -> Attempt:
    """The record of the attempt that begins."""
    mechanism = dataclasses.asdict(prepared.mechanism)
    return Attempt(secrets.token_hex(8), context, mechanism, prepared.recipe.data.group_column)


def note_spending(prepared: Prepared, images: PrivateImages, record: Attempts) -> None:
    """Count the run in the data set's ledger before its first step; of attempts given up, the steps they began."""
    if prepared.promise is None or not prepared.recipe.privacy.record_spending:
        return
    digest, (*given_up, present) = images.source_digest, record.attempts
    for number, attempt in enumerate(given_up, start=1):
        record_given_up(digest, attempt.name, prepared.begun.get(number, 0))
    folder, mechanism = prepared.run.folder.name, prepared.mechanism
    record_spending(digest, present.name, prepared.attempt, folder, mechanism, present.group_column)


def note_publication(prepared: Prepared, images: PrivateImages, record: Attempts) -> None:
    """Before the shareable folder appears: from now on the attempt counts whole, whatever is said of it elsewhere."""
    if prepared.recipe.privacy.record_spending:
        record_published(images.source_digest, record.attempts[-1].name)


def restore_state(prepared: Prepared, key: bytes, ledger: Ledger, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Put the last saved state back and return how many steps it holds; 0 for a run that begins.

    Raises:
        RunError: the state is damaged, or the ledger has fewer steps than it.
    """
    (prepared.run.staging / "samples").mkdir(parents=True, exist_ok=True)
    steps, tensors = load_state(prepared.run.private, key, prepared.attempt)
    check_ledger(prepared.run, prepared.attempt, steps, ledger.steps_begun)
    prepared.run.clean_staging(steps)
    if steps:
        restore(tensors, prepared.clipper.parameters, optimizer, ema)
    return steps


def write_problems(images: PrivateImages, path: Path) -> None:
    """The records that count as nothing, for the data holder's eyes (invariant 17)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "reason"])
        writer.writerows(images.problems)
