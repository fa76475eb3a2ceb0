"""Whether real images are what they are taken for: two sets apart from each other, and the training ones the run's."""

from pathlib import Path

import numpy as np

from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import Data
from dp_peft_diffusion.runs.attempts import load_attempts
from dp_peft_diffusion.runs.folder import RunFolder

# Public data sets repeat a few images across their splits. A hundredth of the held-out images moves a share of them,
# such as an accuracy, by a point at most; above it, numbers of held-out images are numbers of training images.
MOST_IDENTICAL = 0.01
ADVICE = "Give held-out images that nothing was trained on: --dataset_name, --split."


def check_other_split(held_out: Data, training: Data) -> None:
    """Refuse one split of one data set for both.

    Raises:
        UserError: it is.
    """
    places = [(data.dataset_name, data.dataset_config_name, data.split) for data in (held_out, training)]
    if places[0] == places[1]:
        raise UserError(
            f"{held_out.dataset_name!r}, split {held_out.split!r}, is given for the training images and for the "
            f"held-out ones. {ADVICE} Or tell which were trained on: --training_dataset_name, --training_split."
        )


def count_identical(held_out: PrivateImages, training: PrivateImages) -> int:
    """How many held-out images have the very pixels of a training image, at the size that the base sees.

    Raises:
        UserError: they are the same images, or more than `MOST_IDENTICAL` of them are.
    """
    if held_out.source_digest == training.source_digest:
        raise UserError(f"training and held-out images are the same images. {ADVICE}")
    known = {image.tobytes() for image in training.valid_arrays()[0]}
    images = held_out.valid_arrays()[0]
    count = sum(image.tobytes() in known for image in images)
    if count > np.ceil(MOST_IDENTICAL * len(images)):
        raise UserError(
            f"more than {100 * MOST_IDENTICAL:g} % of the held-out images are training images too, pixel by pixel. "
            f"{ADVICE}"
        )
    return count


def is_of_run(run: Path, mechanism: DPMechanism | None, source_digest: bytes) -> bool:
    """Whether this user's ledger of these images has an attempt of the run: by its NAME.private, or name and mechanism.

    False where nobody can tell: no such entry, another machine, a ledger that cannot be read.
    """
    folder = RunFolder(run.resolve())
    as_told = (folder.folder.name, mechanism)
    try:
        record = load_attempts(folder.attempts)
        entries = spending.spendings(spending.data_set_id(source_digest))
    except RunError:
        return False
    names = {attempt.name for attempt in record.attempts} if record else set()
    return any(entry.name in names or (entry.folder, entry.mechanism) == as_told for entry in entries)
