"""A classifier trained with DP-SGD on the private images themselves: what synthetic images have to compete with.

It goes through the engine of a run: Poisson ids, per-example clipping, noise from a secret key, noisy means. It is a
second release of the same records, so its epsilon comes on top of that of the images; `joint_epsilon` adds them up.
"""

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dp_peft_diffusion.diffusion.datasets import Examples, PrivateImages
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Gradients
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.gradients.optimizer import apply_update, learning_rate_at, make_optimizer, set_learning_rate
from dp_peft_diffusion.gradients.self_check import check_gradients
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.privacy.certificate import recorded_mechanism
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.promise import Promise, Release, make_promise
from dp_peft_diffusion.privacy.randomness import new_key
from dp_peft_diffusion.privacy.ranges import EPSILONS, round_up
from dp_peft_diffusion.recipe import Train
from dp_peft_diffusion.training import micro_batches

MAX_GRAD_NORM, EXPECTED_BATCH_SIZE, STEPS = 0.1, 1024, 120
DEFAULTS = Train(optimizer="sgd", learning_rate=8.0, momentum=0.9, micro_batch_size=256)
SMALLEST_SIDE = {1: 16, 3: 8}
LEDGER_PREFIX = "classifier-"  # of the random names of classifiers in the ledger of a data set
IN_ADDITION = (
    "A second release of the same images: its epsilon comes in addition to that of the synthetic images, and is "
    "spent whether its accuracy is published or not."
)


@dataclasses.dataclass(frozen=True)
class PrivateClassifier:
    """A trained classifier, and what it gave away.

    Its weights and predictions are covered by `promise`. Its accuracy on other private images is not.

    Attributes:
        net: (n, c, h, w) in [-1, 1] -> (n, classes), in eval mode.
        promise: what its epsilon covers: this training, once.
        key_source: "os", or "given" by a caller, who can take the noise off: then nothing is promised.
    """

    net: nn.Module
    promise: Promise
    key_source: str

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Images (n, c, h, w) uint8 of the size it was trained on -> class indices (n,) int64."""
        device = next(self.net.parameters()).device
        inputs = (chunk.to(device).float() / 127.5 - 1 for chunk in torch.from_numpy(images).split(500))
        return torch.cat([self.net(chunk).argmax(dim=1).cpu() for chunk in inputs]).numpy()

    def release(self) -> dict[str, Any]:
        """What it gave away, for JSON; `mechanism` has the keys of a certificate's. All of it is public."""
        mechanism = self.promise.mechanism
        return {
            "in_addition": True,
            "statement": IN_ADDITION,
            "epsilon": self.promise.epsilon,
            "delta": self.promise.delta,
            "neighboring_relation": mechanism.neighboring_relation,
            "num_examples": mechanism.num_examples,
            "mechanism": recorded_mechanism(mechanism) | {"clipping": "flat", "gamma": None, "noise_multiplicity": 1},
            "key_source": self.key_source,
        }


def promise_beside(
    document: dict[str, Any],
    *,
    expected_batch_size: float | None = None,
    steps: int = STEPS,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> Promise:
    """The promise of a classifier at the epsilon and delta of a run's certificate, with its relation, unit and records.

    Args:
        document: privacy.json of the run, in its strict form.
        expected_batch_size: None: `EXPECTED_BATCH_SIZE`, or half of the records where that is less.
        steps: planned updates.
        max_grad_norm: C.

    Raises:
        UserError: a number is out of range, or no noise keeps that epsilon.
    """
    run = promise_of(document)
    chance = run.mechanism.sampling_prob / run.mechanism.expected_batch_size  # 1 / N, where N is public
    batch = expected_batch_size or min(EXPECTED_BATCH_SIZE, 0.5 / chance)
    mechanism = DPMechanism(
        sampling_prob=chance * batch,
        steps=steps,
        max_grad_norm=max_grad_norm,
        expected_batch_size=batch,
        num_examples=run.mechanism.num_examples,
        neighboring_relation=run.mechanism.neighboring_relation,
        max_examples_per_group=run.mechanism.max_examples_per_group,
    )
    return make_promise(mechanism, epsilon=run.epsilon, delta=run.delta)


def joint_epsilon(document: dict[str, Any], classifier: Promise, earlier: Sequence[Release] = ()) -> float | None:
    """Epsilon of a run and classifiers together at the run's delta, rounded up; None when above what can be promised.

    Priced as a run that lists them among its earlier releases: its tuning and its other releases count too.

    Args:
        document: privacy.json of the run, in its strict form.
        classifier: from `promise_beside`, or of the same relation and unit.
        earlier: classifiers that were trained beside it before, of the same relation and unit.

    Raises:
        UserError: relation or unit differ, or the run promises nothing because somebody gave its key.
    """
    run = promise_of(document)
    if document["key_source"] != "os":
        raise UserError(
            "the key of the run's noise was given by somebody, so it promises nothing that could be added up. "
            "Train it again without a key."
        )
    release = Release(mechanism=classifier.mechanism, source="a classifier trained directly")
    priced = dataclasses.replace(run, prior=(*run.prior, *earlier, release)).priced
    return round_up(priced) if priced <= EPSILONS[1] else None


def check_trainable(images: PrivateImages, promise: Promise, group_column: str | None = None) -> None:
    """Whether `train_classifier` takes these images for this promise; nothing is spent.

    Raises:
        UserError: they have no classes, are too small or not those that the promise is for, or the promise is for
            groups and no column is given.
    """
    mechanism = promise.mechanism
    if images.class_names is None:
        raise UserError("a classifier needs classes, and these images have none. Give --label_column.")
    if mechanism.max_examples_per_group > 1 and group_column is None:
        raise UserError(
            f"the promise is for groups of at most {mechanism.max_examples_per_group} images, and the run's recipe has "
            "no group_column to tell them by. Leave --private_classifier out."
        )
    if mechanism.num_examples not in (None, len(images)):
        raise UserError(
            "there are more or fewer training images than the run's certificate is for. Give those that the run was "
            "trained on: --training_dataset_name, --training_split."
        )
    make_net(tuple(images.read([-1]).clean.shape[2:]), len(images.class_names), seed=0)


def train_classifier(
    images: PrivateImages,
    promise: Promise,
    train: Train = DEFAULTS,
    *,
    name: str,
    group_column: str | None = None,
    recorded: bool = True,
    device: torch.device | str = "cpu",
    key: bytes | None = None,
) -> PrivateClassifier:
    """Train on private images with labels, all planned steps; the null records among them take part as nothing.

    All planned steps are in the data set's ledger before the first, and nothing is saved on the way: what is stopped
    has spent all of it, and no noise is ever drawn twice from one key (invariants 12 and 16).

    Args:
        images: every row as listed, pixels and labels; of the data set that the promise is for.
        promise: from `promise_beside` or `make_promise`, its noise calibrated.
        train: optimizer, learning rate and its schedule, micro-batch, and the public seed of the first weights; batch
            and steps are those of the promise.
        name: of this release in the data set's ledger.
        group_column: whose images the unit is, if not one image: `images` were opened with it and with the promise's
            cap, so that what is over the cap is null.
        recorded: whether the data set's ledger is told, as `privacy.record_spending` of a run.
        device: where.
        key: 16 bytes in place of the operating system's, for tests: whoever knows it can take the noise off.

    Raises:
        UserError: as of `check_trainable`.
        RunError: the ledger cannot be written.
    """
    check_trainable(images, promise, group_column)
    mechanism, device = promise.mechanism, torch.device(device)
    assert images.class_names is not None
    shape = images.read([-1]).clean.shape[2:]
    net = make_net(tuple(shape), len(images.class_names), train.seed).to(device)
    clipper = PerSampleClipper(net, mechanism.max_grad_norm)
    check_gradients(clipper, classification_losses, made_up_batch(shape, len(images.class_names), device))
    if recorded:
        entry = LEDGER_PREFIX + secrets.token_hex(8)
        spending.record_spending(images.source_digest, entry, 1, name, mechanism, group_column)
    private_steps(clipper, images, mechanism, train, key or new_key())
    return PrivateClassifier(net, promise, "os" if key is None else "given")


def private_steps(
    clipper: PerSampleClipper, images: PrivateImages, mechanism: DPMechanism, train: Train, key: bytes
) -> None:
    """All planned updates of the clipper's parameters."""
    parameters, train = clipper.parameters, dataclasses.replace(train, max_train_steps=mechanism.steps)
    optimizer = make_optimizer(train, parameters, mechanism.noise_stddev / mechanism.expected_batch_size)
    for step in progress(mechanism.steps):
        total = clipped_sum(clipper, images, mechanism, train.micro_batch_size, key, step)
        noisy = add_noise(total, mechanism.noise_stddev, key, step)  # invariant 7: after this, all is post-processing
        set_learning_rate(optimizer, learning_rate_at(train, step))
        apply_update(optimizer, parameters, noisy, mechanism.expected_batch_size)  # invariant 3


def clipped_sum(
    clipper: PerSampleClipper, images: PrivateImages, mechanism: DPMechanism, size: int, key: bytes, step: int
) -> Gradients:
    """The clipped sum of one step over its Poisson sample, {name: shape float64}; zeros when the sample is empty."""
    device = next(iter(clipper.parameters.values())).device
    ids = example_ids(key, step, len(images), mechanism.sampling_prob, mechanism.truncated_batch_size)  # invariant 5
    total = clipper.zeros()  # invariant 6
    for chunk in micro_batches(ids, size):  # invariant 4: the last is padded with null records
        batch = make_batch(images.read(chunk), device)
        for name, part in clipper.clipped_sum_of(classification_losses, batch).items():
            total[name] += part
    return total


def progress(steps: int) -> Iterator[int]:
    """The steps, with a bar that shows no durations: how long a private batch takes is private (invariant 13)."""
    yield from tqdm(range(steps), desc="private classifier", bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total}")


def make_batch(examples: Examples, device: torch.device) -> dict[str, Tensor]:
    """What one micro-batch shows the net."""
    batch = {"images": examples.clean[:, 0], "labels": examples.labels, "weights": examples.weights}
    return {name: value.to(device) for name, value in batch.items()}


def made_up_batch(shape: tuple[int, ...], num_classes: int, device: torch.device) -> dict[str, Tensor]:
    """Two images of noise from a public seed (invariant 15)."""
    pixels = torch.rand((2, 1, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return make_batch(Examples(pixels, torch.arange(2) % num_classes, torch.ones(2), {}), device)


def classification_losses(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each example, (b,); zero of a null record."""
    losses = nn.functional.cross_entropy(net(batch["images"]), batch["labels"], reduction="none")
    return losses * batch["weights"]


def make_net(shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Sequential:
    """The tanh nets of Tramer and Boneh (arXiv 2011.11660, appendix B) for grey and for colour images, in eval mode.

    The strongest small nets that are known for DP-SGD from scratch; tanh: Papernot et al. (2007.14191). No layer of
    them mixes examples (invariant 9).

    Raises:
        UserError: the images have other channels, or are too small.
    """
    channels, side, width = shape
    if channels not in SMALLEST_SIDE or min(side, width) < SMALLEST_SIDE[channels]:
        raise UserError(
            f"the private classifier takes grey images from side {SMALLEST_SIDE[1]} and colour images from side "
            f"{SMALLEST_SIDE[3]}, and the base of this run sees {channels}x{side}x{width}. Leave "
            "--private_classifier out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(*(_grey_features() if channels == 1 else _colour_features()))
        size = features(torch.zeros(1, *shape)).numel()
        hidden = 32 if channels == 1 else 128
        net = nn.Sequential(features, nn.Flatten(), nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, num_classes))
    return net.eval()


def _grey_features() -> Iterator[nn.Module]:
    for inputs, outputs, kernel, padding in ((1, 16, 8, 2), (16, 32, 4, 0)):
        yield from (nn.Conv2d(inputs, outputs, kernel, stride=2, padding=padding), nn.Tanh(), nn.MaxPool2d(2, 1))


def _colour_features() -> Iterator[nn.Module]:
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        for first in (inputs, outputs):
            yield from (nn.Conv2d(first, outputs, 3, padding=1), nn.Tanh())
        yield nn.MaxPool2d(2)
