"""From a prepared run to its first step: write the attempt down, or pick up an interrupted one (invariant 12)."""

import csv
import dataclasses
import secrets
from pathlib import Path

import torch

from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.gradients.optimizer import Ema
from dp_peft_diffusion.preparation import Prepared
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun
from dp_peft_diffusion.privacy.randomness import attempt_key, new_key
from dp_peft_diffusion.privacy.spending import record_given_up, record_spending
from dp_peft_diffusion.recipe import to_yaml
from dp_peft_diffusion.runs.attempts import Attempt, Attempts, load_attempts
from dp_peft_diffusion.runs.context import context_digest
from dp_peft_diffusion.runs.escrow import EscrowedKey, write_escrowed_key
from dp_peft_diffusion.runs.state import load_state, restore


def begin(prepared: Prepared, key: bytes | None, escrow_key: Path | None) -> tuple[Attempts, bytes]:
    """Write down the attempt before its first step, or pick up an interrupted one; its record and stream key."""
    folders, earlier = prepared.run, prepared.earlier
    folders.finish_closing()
    if load_attempts(folders.attempts) != earlier or folders.finished.is_file():
        raise RunError(f"another process has been at {folders.private} meanwhile. Type the same command again.")
    if earlier is None:
        folders.create(key or new_key())
    run_key = folders.read_key()
    if key is not None and key != run_key:
        raise UserError(f"the run in {folders.private} was begun with another key. Pass that, or none.")
    record = earlier or Attempts(secrets.token_hex(8), "os" if key is None else "given", False, ())
    if not prepared.resuming:
        folders.restart(prepared.requested, to_yaml(prepared.recipe))
        write_problems(prepared.images, folders.private / "problems.csv")
        attempt = Attempt(prepared.context, dataclasses.asdict(prepared.mechanism))
        record = dataclasses.replace(record, attempts=(*record.attempts, attempt))
    if escrow_key is not None:
        record = dataclasses.replace(record, escrowed=True)
        write_escrowed_key(escrow_key, EscrowedKey(run_key, prepared.attempt, prepared.context))
    record.save(folders.attempts)
    note_spending(prepared, record)
    # Another context draws other noise (invariant 12).
    return record, attempt_key(run_key, prepared.attempt, context_digest(prepared.context))


def note_spending(prepared: Prepared, record: Attempts) -> None:
    """Count the run in the data set's ledger before its first step; of attempts given up, the steps they began."""
    if prepared.promise is None or not prepared.recipe.privacy.record_spending:
        return
    digest, mechanism = prepared.images.source_digest, prepared.mechanism
    begun = steps_begun(prepared.run.ledger)
    for given_up in range(1, prepared.attempt):
        record_given_up(digest, record.run, given_up, begun.get(given_up, 0))
    record_spending(digest, record.run, prepared.attempt, prepared.run.folder.name, mechanism)


def restore_state(prepared: Prepared, key: bytes, ledger: Ledger, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Put the last saved state back and return how many steps it holds; 0 for a run that begins.

    Raises:
        RunError: the state is damaged, or the ledger has fewer steps than it.
    """
    steps, tensors = load_state(prepared.run.private, key)
    if steps > ledger.steps_begun.get(prepared.attempt, 0):
        raise RunError(
            f"the saved state holds {steps} steps, of which {ledger.path} lists only "
            f"{ledger.steps_begun.get(prepared.attempt, 0)}: the ledger was put back to an older one. Put back the "
            "newer one, or start afresh in another --output_dir and count all planned steps of this run as spent."
        )
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
