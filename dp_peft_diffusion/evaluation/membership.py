"""Membership test: whether a model's denoising losses tell training images from held-out ones, and how well they may.

The losses are computed from private images without noise: the guarantee does not cover them. The bound comes from the
certificate and is public.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from dp_peft_diffusion.batches import PUBLIC_KEY, Task, make_batch, make_loss, make_task
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.opening import base_of, open_model
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.adapter_files import holds_whole_model
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.promise import Promise, composed_event
from dp_peft_diffusion.privacy.ranges import round_up

MOST_IMAGES, FEWEST_IMAGES = 1000, 50
DRAWS = 16  # of noise and noise level for each image
CONFIDENCE = 0.99
ROWS = 256  # that the network sees at once: memory only
THRESHOLDS = 1 << 14  # at which the bound is integrated


class Auc(NamedTuple):
    """An area under the ROC curve, and an interval that holds the true one with probability `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """How much each image looks trained on; larger is more. Private.

    Attributes:
        members: (n,) of images that were trained on.
        held_out: (m,) of images that were not.
        members_by_base: (n,) the same by the base alone, which saw neither; None where there is no base.
        held_out_by_base: (m,).
    """

    members: np.ndarray
    held_out: np.ndarray
    members_by_base: np.ndarray | None = None
    held_out_by_base: np.ndarray | None = None


def membership_scores(
    folder: Path,
    members: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    *,
    base: str | None = None,
    most: int = MOST_IMAGES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Scores:
    """Scores of images by the model in a shareable folder: the loss that it trained on, averaged over `DRAWS` draws.

    The score is the base's loss less the model's, as some images are easy for any model (Watson et al. 2022, arXiv
    2111.08440; loss attack on diffusion models: Matsumoto et al. 2023, 2302.03262). The base is told no class. A folder
    with a whole model has no base: the score is minus its loss.

    Args:
        folder: from `dp-peft train`.
        members: images (n, c, side, side) uint8 of the base's size that were trained on, and the positions of their
            classes (n,) among the adapter's; these are not looked at where it has none.
        held_out: the same of images of the same distribution that were not trained on.
        base: in place of the one that the folder's recipe names.
        most: images of each kind, chosen at random, that are looked at.
        seed: of the choice.
        device: where.

    Raises:
        UserError: images of another size, an unknown class, or what `open_model` refuses.
        PrivacyError: the files of the folder say what we never write.
        RunError: the model's losses are not finite.
    """
    loaded, (recipe, *_) = open_model([folder], [1.0], base)
    fixed = replace(recipe.train, noise_multiplicity=DRAWS, augmentation_multiplicity=1, label_dropout=0.0)
    recipe = replace(recipe, train=fixed, data=replace(recipe.data, augmentations=None))
    if recipe.adapter.kind == "code_moments":  # its sums stay where it trained; here its rows are class rows
        recipe = replace(recipe, adapter=replace(recipe.adapter, kind="class_rows"))
    task = make_task(recipe, loaded.to(device))
    rng, chosen = np.random.default_rng(seed), []
    for images, labels in (members, held_out):
        some = rng.permutation(len(images))[:most]
        chosen.append((images[some], _classes(task, labels[some])))
    _check_images(task, [images for images, _ in chosen])
    losses = _losses(task, chosen)
    if holds_whole_model(folder):
        return Scores(*(-loss for loss in losses))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another base than was trained on: told when it was opened first
        bare = base_of([folder], recipe, base).to(device)
    untold = [(images, np.full_like(labels, task.conditions.null)) for images, labels in chosen]
    by_base = _losses(replace(task, base=bare), untold)
    gained = [before - after for before, after in zip(by_base, losses, strict=True)]
    return Scores(*gained, *(-loss for loss in by_base))


def membership_test(scores: Scores, document: dict[str, Any] | None, *, verified: bool = True) -> dict[str, Any]:
    """How well scores tell members from held-out images, against what the certificate allows.

    Args:
        scores: from `membership_scores`.
        document: privacy.json in its strict form; None without privacy, where nothing is promised.
        verified: whether the members are known to be the run's own images; of others an attack finds nothing.

    Returns:
        For JSON: `auc` with `auc_low` and `auc_high`; `auc_of_base` with the same two, the control, which is 1/2 if
        members and held-out images are alike; `auc_bound`; `above_bound`, which is a finding; and a `message`. All but
        the bound is not covered by the guarantee.

    Raises:
        UserError: there are fewer than `FEWEST_IMAGES` of one kind.
    """
    if min(len(scores.members), len(scores.held_out)) < FEWEST_IMAGES:
        raise UserError(f"a membership test needs {FEWEST_IMAGES} training images and as many held out. Give more.")
    found = auc(scores.members, scores.held_out)
    control = None
    if scores.members_by_base is not None and scores.held_out_by_base is not None:
        control = auc(scores.members_by_base, scores.held_out_by_base)
    bound = None if document is None else auc_bound(promise_of(document))
    above = bound is not None and found.low > bound
    return {
        "auc": found.value,
        "auc_low": found.low,
        "auc_high": found.high,
        "confidence": CONFIDENCE,
        "auc_of_base": None if control is None else control._asdict(),
        "auc_bound": bound,
        "above_bound": above,
        "message": _message(found, control, bound, verified),
        "num_members": len(scores.members),
        "num_held_out": len(scores.held_out),
    }


def auc(members: np.ndarray, held_out: np.ndarray) -> Auc:
    """The chance that a member has a larger score than a held-out image, ties counting half, and its interval.

    The interval is that of DeLong et al. (1988) or that of Newcombe (2006), whichever reaches further on each side: the
    former has no width where the scores do not overlap, or are all tied. At least two scores of each kind.
    """
    n, m = len(members), len(held_out)
    value = float((rankdata(np.concatenate([members, held_out]))[:n] - rankdata(members)).mean() / m)
    reach = float(norm.isf((1 - CONFIDENCE) / 2) * np.sqrt(delong_variance(members, held_out)))
    low, high = _newcombe_low(value, n, m), 1 - _newcombe_low(1 - value, n, m)
    return Auc(value, max(0.0, min(low, value - reach)), min(1.0, max(high, value + reach)))


def delong_variance(members: np.ndarray, held_out: np.ndarray) -> float:
    """Of the AUC (DeLong et al. 1988, equation 5), from the ranks as Sun and Xu (2014) compute it."""
    n, m = len(members), len(held_out)
    ranks = rankdata(np.concatenate([members, held_out]))
    below = (ranks[:n] - rankdata(members)) / m  # (n,) share of the held-out images below each member
    above = 1 - (ranks[n:] - rankdata(held_out)) / n  # (m,) share of the members above each held-out image
    return float(below.var(ddof=1) / n + above.var(ddof=1) / m)


def _newcombe_low(value: float, n: int, m: int) -> float:
    """The AUC t below `value` of which it is as far as `CONFIDENCE` allows: the variance is that of t, not of `value`.

    (value - t)^2 = z^2 V(t), with the variance of Hanley and McNeil (1982) and both sample sizes in its middle term
    replaced by their mean: Newcombe, Statistics in Medicine 25 (2006), method 5.
    """
    z, middle = norm.isf((1 - CONFIDENCE) / 2), (n + m) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) / (n * m) * (1 + middle * ((1 - t) / (2 - t) + t / (1 + t)))
        return float((value - t) ** 2 - z**2 * variance)

    return float(brentq(excess, 0.0, min(value, 1 - 1e-12))) if value > 0 else 0.0


def auc_bound(promise: Promise) -> float:
    """The largest AUC that the promise leaves to any attack on one image, rounded up.

    A held-out image had no place among the records: some other record had it. So the bound is that of one record
    replaced by another, which is weaker than that of one replaced by nothing; for groups, of one image of them.
    """

    def single(entry: Any) -> Any:
        return replace(entry, mechanism=replace(entry.mechanism, max_examples_per_group=1))

    prior = [single(release) for release in promise.prior]
    event = composed_event(single(promise).mechanism, promise.tuning_runs, prior)
    return largest_auc(*accounting.profile(event, "replace_one"))


def largest_auc(epsilons: Sequence[float] | np.ndarray, deltas: Sequence[float] | np.ndarray) -> float:
    """The largest AUC under a privacy profile, rounded up to 4 digits: never below the truth.

    At false positive rate a, an attack misses at least f(a) = max over the points of 1 - delta - e^eps a and
    e^-eps (1 - delta - a), and 0 (Kairouz et al., arXiv 1311.0776; f of Dong et al., 1905.02383). So AUC is at
    most 1 minus the integral of f. As f is convex, its values at the middles of intervals sum up to no more than that.

    Args:
        epsilons: points of the profile, (p,).
        deltas: delta at each, (p,).
    """
    rates = (np.arange(THRESHOLDS) + 0.5) / THRESHOLDS
    missed = np.zeros(THRESHOLDS)
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        with np.errstate(over="ignore"):  # e^eps above 1e308 says nothing: the other line is above it
            missed = np.maximum(missed, 1 - delta - np.exp(epsilon) * rates)
        missed = np.maximum(missed, np.exp(-epsilon) * (1 - delta - rates))
    return min(1.0, round_up(1 - float(missed.mean())))


def _message(found: Auc, control: Auc | None, bound: float | None, verified: bool) -> str:
    if bound is None:
        return "Trained without privacy: nothing bounds what an attack finds."
    if found.low <= bound and not verified:
        return (
            "NOT VERIFIED: no ledger here says that the training images are the images of this run, and of others an "
            "attack finds nothing. Give those that it was trained on, on the machine and by the user that trained it."
        )
    if found.low <= bound:
        return "Within the bound. This is one attack; the bound holds for every attack, also for stronger ones."
    text = (
        f"FINDING: the attack tells training images from held-out ones with an AUC of at least {found.low:.3f}, and "
        f"the promise allows {bound:g}. Do not share this folder. Either the promise is broken, or the held-out images "
        "are of another kind than the training images, which the promise says nothing about, or it is chance: with a "
        f"kept promise, at most one test in {2 / (1 - CONFIDENCE):.0f} says so."
    )
    if control is not None and not control.low <= 0.5 <= control.high:
        text += f" Of another kind they are: the base, which saw neither, has an AUC of {control.value:.3f} on them."
    return text


def _classes(task: Task, labels: np.ndarray) -> np.ndarray:
    """Rows of the task's condition table; row 0 where there are no classes."""
    names = task.recipe.data.class_names
    if names is None or task.recipe.data.caption_column is not None:
        return np.zeros(len(labels), np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"labels run from 0 to {len(names) - 1}, as the adapter's classes do. Give --class_names.")
    return labels.astype(np.int64)


def _check_images(task: Task, sets: list[np.ndarray]) -> None:
    base = task.base
    wanted = (base.image_channels, base.resolution, base.resolution)
    for images in sets:
        if images.shape[1:] != wanted:
            given, taken = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
            raise UserError(
                f"the membership test was given images of {given}, and the base takes {taken}. Resize them."
            )


def _losses(task: Task, sets: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The mean loss of each image of each set, (n,) float64; every image has draws of its own, the same every time."""
    ends = np.cumsum([len(images) for images, _ in sets])
    losses = [_losses_of(task, *part, first=int(end) - len(part[0])) for part, end in zip(sets, ends, strict=True)]
    if not all(np.isfinite(part).all() for part in losses):
        raise RunError("the model's losses are not finite: its weights are beyond float32. Train with a smaller step.")
    return losses


@torch.no_grad()
def _losses_of(task: Task, images: np.ndarray, labels: np.ndarray, first: int) -> np.ndarray:
    loss_fn, size, parts = make_loss(task), max(1, ROWS // DRAWS), []
    for start in range(0, len(images), size):
        clean = torch.from_numpy(images[start : start + size]).float() / 127.5 - 1
        if task.base.is_latent:  # one at a time, as private images are
            clean = torch.cat([task.base.encode(image.to(task.base.unet.device)).cpu() for image in clean.split(1)])
        told = torch.from_numpy(labels[start : start + size])
        examples = Examples(clean[:, None], told, torch.ones(len(clean)), {})
        ids = first + start + np.arange(len(clean))
        batch = make_batch(task, examples, ids, PUBLIC_KEY, step=0)
        parts.append(loss_fn(task.base.unet, batch).double().cpu().numpy())
    return np.concatenate(parts)
