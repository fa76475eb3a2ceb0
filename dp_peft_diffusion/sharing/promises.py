"""The promise of a shareable folder, as other files may quote it: checked, or told to be missing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME

NO_CERTIFICATE = "No certificate belongs to this adapter: nothing is promised of the images it was trained on."


def is_certified(folder: Path) -> bool:
    """Whether a folder has a privacy.json, be it good or bad."""
    return os.path.lexists(folder / FILE_NAME)


def checked_promise(folder: Path) -> dict[str, Any] | None:
    """privacy.json of a folder, of which every level of `verify` holds; None where there is none.

    Raises:
        PrivacyError: a level does not hold, so nobody may quote it.
    """
    if not is_certified(folder):
        return None
    report = certificate.verify(folder)
    if not report.ok:
        failed = ", ".join(name for name, ok, _ in report.levels if not ok)
        raise PrivacyError(
            f"{folder} does not keep what its {FILE_NAME} claims ({failed}), so the promise is not passed on. To see "
            f"why, type: dp-peft verify {folder}"
        )
    return certificate.read(folder)


def warnings_of(folders: Sequence[Path]) -> list[str]:
    """A sentence for each folder without a certificate."""
    return [f"{folder} has no {FILE_NAME}. {NO_CERTIFICATE}" for folder in folders if not is_certified(folder)]


def check_apart(output: Path, option: str, folders: Sequence[Path]) -> None:
    """What is made of shareable folders lies in none, neither one of these nor another.

    option: of the command line, for the message.

    Raises:
        UserError: it does; the certificate there would fail, since it lists all weights.
    """
    sources = {folder.resolve() for folder in folders}
    for parent in (output.resolve(), *output.resolve().parents):
        if parent in sources or is_certified(parent):
            raise UserError(f"{option} {output} lies in {parent}, whose certificate lists its weights. Choose another.")
