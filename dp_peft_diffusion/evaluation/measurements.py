"""All that `dp-peft evaluate` measures, in one result: what is asked for, from images that lie in memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import utility
from dp_peft_diffusion.evaluation.classifiers import training_of
from dp_peft_diffusion.evaluation.features import Features, open_features
from dp_peft_diffusion.evaluation.fidelity import fidelity
from dp_peft_diffusion.evaluation.membership import membership_scores, membership_test
from dp_peft_diffusion.evaluation.memorization import check_private, compare_neighbours, write_neighbours
from dp_peft_diffusion.evaluation.private_classifier import check_trainable, promise_beside, train_classifier
from dp_peft_diffusion.evaluation.separation import is_of_run
from dp_peft_diffusion.evaluation.synthetic_images import to_side
from dp_peft_diffusion.evaluation.together import Together, price_together
from dp_peft_diffusion.evaluation.tuning import tune
from dp_peft_diffusion.privacy.adapter_recipe import read_recipe
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.sharing.promises import checked_promise

SCHEMA = "dp-peft/evaluation/1"
Labelled = tuple[np.ndarray, np.ndarray]  # images (n, c, h, w) uint8, class indices (n,)


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        classifiers: names from `classifiers.NAMES`.
        seed, num_seeds, ensemble: as `utility.train_and_test` takes them.
        epochs, flip, warp: in place of what each classifier's protocol says, if not None and not False.
        evaluation_resolution: side that images are resized to; None: as they are. Membership test and private
            classifier look at images as the base sees them.
        learning_curve, tuning: more of the synthetic images alone.
        features: names as `open_features` takes them, for fidelity; memorization is measured in the first.
        reference, memorization, membership, private_classifier: what needs the images that were trained on.
    """

    classifiers: tuple[str, ...]
    seed: int
    num_seeds: int
    ensemble: int
    epochs: int | None
    flip: bool
    warp: bool
    evaluation_resolution: int | None
    learning_curve: bool
    tuning: bool
    features: tuple[str, ...]
    reference: bool
    memorization: bool
    membership: bool
    private_classifier: bool

    @property
    def of_training_images(self) -> bool:
        """Whether the images that were trained on are looked at."""
        return self.reference or self.memorization or self.of_a_run

    @property
    def of_a_run(self) -> bool:
        """Whether images alone are not enough."""
        return self.membership or self.private_classifier

    @property
    def how(self) -> dict[str, Any]:
        """How classifiers train, for `utility`."""
        how = {name: getattr(self, name) for name in ("classifiers", "seed", "num_seeds", "ensemble")}
        return how | self.changes

    @property
    def changes(self) -> dict[str, Any]:
        """What is not as each classifier's protocol has it."""
        return {name: value for name in ("epochs", "flip", "warp") if (value := getattr(self, name))}


@dataclass(frozen=True)
class Run:
    """The run that made the images.

    Attributes:
        folder: what it shares.
        base: in place of the base that its recipe names.
        document: privacy.json, of which every level of `verify` holds; None where nothing asks for it, or without one.
        promise: of a private classifier beside it; None where none is wanted.
    """

    folder: Path
    base: str | None
    document: dict[str, Any] | None = None
    promise: Promise | None = None


@dataclass(frozen=True)
class Images:
    """The real images, of one size, that synthetic ones of the same classes are compared with.

    Attributes:
        class_names: of the labels.
        held_out: real ones that were not trained on.
        training: those that were; None where nothing looks at them.
        identical: how many held-out images have the pixels of a training image.
    """

    class_names: tuple[str, ...]
    held_out: Labelled
    training: PrivateImages | None = None
    identical: int = 0


def check_run(wanted: Wanted, folder: Path, base: str | None) -> Run:
    """A run and what it promises, as far as that is wanted: refused here, before anything is computed.

    Raises:
        UserError: it makes no promise that a classifier could share.
        PrivacyError: it does not keep what its certificate claims.
    """
    if not wanted.of_a_run:
        return Run(folder, base)
    document = checked_promise(folder)
    if not wanted.private_classifier:
        return Run(folder, base, document)
    if document is None:
        raise UserError(f"--private_classifier takes epsilon from the run's certificate, and {folder} has none.")
    return Run(folder, base, document, promise_beside(document))


def check_images(wanted: Wanted, run: Run | None, images: Images) -> None:
    """Whether a private classifier can be trained and priced: refused here, before anything is sampled.

    Raises:
        UserError: the images are not those of the run's promise, or the classifier's does not add up with it.
        RunError: the data set's ledger cannot be used.
    """
    if wanted.private_classifier and run is not None:
        assert run.promise is not None and images.training is not None
        check_trainable(images.training, run.promise, read_recipe(run.folder).data.group_column)
        _together(run, images.training)


def open_nets(wanted: Wanted, device: str) -> list[Features]:
    """The nets of --features, and a check of the classifiers' names: refused here, before anything is computed.

    Raises:
        UserError: no such classifier, or features that cannot be had.
    """
    for name in wanted.classifiers:
        training_of(name, **wanted.changes)
    return [open_features(name, device) for name in wanted.features]


def measure(
    wanted: Wanted,
    nets: list[Features],
    synthetic: Labelled,
    images: Images,
    *,
    declared_public: bool,
    device: str,
    run: Run | None = None,
    private_folder: Path | None = None,
) -> dict[str, Any]:
    """What is wanted, as JSON holds it. Training comes late, so that images of a wrong kind are refused before it.

    nets: from `open_nets`. declared_public: none of the real images needs protection; otherwise each part is stamped
    as not covered by the guarantee. private_folder: where nearest neighbours are listed.

    Raises:
        UserError: images that cannot be compared, or too few of them.
        PrivacyError: the private folder is none.
    """
    synthetic, held_out = (_resized(part, wanted.evaluation_resolution) for part in (synthetic, images.held_out))
    utility.check_images(*synthetic, held_out[0])
    found: dict[str, Any] = {"fidelity": [fidelity(net, held_out[0], synthetic[0], seed=wanted.seed) for net in nets]}
    if images.training is not None:
        training = images.training.valid_arrays()
        found["real_images"] = _real_images(run, images, images.training)
        resized = _resized(training, wanted.evaluation_resolution)
        if wanted.memorization and private_folder is not None:
            found["memorization"] = _memorization(nets[0], synthetic, resized, held_out, private_folder, wanted.seed)
        if wanted.membership and run is not None:
            verified = found["real_images"]["training_images_of_the_run"]
            found["membership"] = _membership(run, training, images, verified, wanted.seed, device)
        if wanted.reference:
            found["reference"] = utility.reference(*resized, *held_out, **wanted.how)
    if wanted.learning_curve:
        found["learning_curve"] = utility.learning_curve(*synthetic, *held_out, **wanted.how)
    if wanted.tuning:
        found["tuning"] = tune(*synthetic, *held_out, seed=wanted.seed, num_seeds=wanted.num_seeds)
    trained = utility.evaluate(*synthetic, *held_out, declared_public=declared_public, **wanted.how)
    if wanted.private_classifier and run is not None:  # last: it spends epsilon, whatever fails after it
        found["private_classifier"] = _private_classifier(run, images, device)
    result = {"schema": SCHEMA, "class_names": list(images.class_names), "declared_public": declared_public}
    result |= trained | found
    return json.loads(json.dumps(result if declared_public else _stamped(result)))


def _real_images(run: Run | None, images: Images, training: PrivateImages) -> dict[str, Any]:
    """What is known of the real images; `training_images_of_the_run` None without a run."""
    of_run = None
    if run is not None:
        mechanism = None if run.document is None else promise_of(run.document).mechanism
        of_run = is_of_run(run.folder, mechanism, training.source_digest)
    return {
        "training_images_of_the_run": of_run,
        "held_out_images_identical_to_training_images": images.identical,
        "num_held_out_images": len(images.held_out[0]),
        "num_training_images": len(training),
    }


def _resized(labelled: Labelled, side: int | None) -> Labelled:
    return labelled if side is None else (to_side(labelled[0], side), labelled[1])


def _stamped(result: dict[str, Any]) -> dict[str, Any]:
    """Each part says of itself that the guarantee does not cover it, since parts are copied one by one."""
    stamp = {"covered_by_guarantee": False}

    def stamped(part: Any) -> Any:
        if isinstance(part, list):
            return [stamped(entry) for entry in part]
        return part | stamp if isinstance(part, dict) else part

    return {name: stamped(part) for name, part in result.items()}


def _memorization(
    net: Features, synthetic: Labelled, training: Labelled, held_out: Labelled, private_folder: Path, seed: int
) -> dict[str, Any]:
    numbers, neighbours = compare_neighbours(net(synthetic[0]), net(training[0]), net(held_out[0]), seed)
    make_private(private_folder)
    write_neighbours(private_folder, neighbours, synthetic[0], training[0])
    return numbers | {"features": net.name}


def make_private(folder: Path) -> None:
    """Make a private folder, if it is not there.

    Raises:
        PrivacyError: one lies there that others can read, or that is called as if it could be shared.
    """
    if folder.name.endswith(".private"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def _membership(run: Run, training: Labelled, images: Images, verified: bool, seed: int, device: str) -> dict[str, Any]:
    classes = read_recipe(run.folder).data.class_names or ()
    place = np.array([classes.index(name) for name in images.class_names])  # --class_names may have another order
    members, held_out = ((pixels, place[labels]) for pixels, labels in (training, images.held_out))
    scores = membership_scores(run.folder, members, held_out, base=run.base, seed=seed, device=device)
    return membership_test(scores, run.document, verified=verified)


def _private_classifier(run: Run, images: Images, device: str) -> dict[str, Any]:
    """The row of a classifier trained directly with DP-SGD: a second release, at the epsilon of the run's."""
    assert run.promise is not None and images.training is not None
    together, name = _together(run, images.training), f"{run.folder.resolve().name}-classifier"
    trained = train_classifier(
        images.training, run.promise, name=name, device=torch.device(device), **_accounted(run.folder)
    )
    found = utility.scores([trained.predict(images.held_out[0])], images.held_out[1])
    return found | {
        "release": trained.release(),
        "joint_epsilon": together.epsilon,
        "earlier_classifiers": together.earlier_classifiers,
        "not_counted": list(together.not_counted),
    }


def _together(run: Run, training: PrivateImages) -> Together:
    assert run.document is not None and run.promise is not None
    return price_together(run.document, run.promise, training.source_digest, **_accounted(run.folder))


def _accounted(folder: Path) -> dict[str, Any]:
    """Whose images the unit is, and whether the data set's ledger is told: as for the run."""
    recipe = read_recipe(folder)
    return {"group_column": recipe.data.group_column, "recorded": recipe.privacy.record_spending}
