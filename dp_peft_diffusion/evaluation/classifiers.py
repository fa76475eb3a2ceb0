"""Classifiers by name: trained on one set of labelled images, they predict the classes of another.

They see the labels of the images they train on, and of no others: each net trains for the epochs that its protocol
has, and the last epoch counts. (DPDM's released code keeps the epoch that did best on a second labelled set.)
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from dp_peft_diffusion.diffusion.warping import affine, bend
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.classifier_nets import Shape, dpdm_cnn, resnet, small_cnn, wide_resnet


@dataclass(frozen=True)
class Training:
    """How a classifier trains.

    epochs: passes over the images; the last one counts.
    batch_size: images; the last batch of an epoch may be smaller.
    optimizer: "adam", or "sgd" with Nesterov's momentum of 0.9.
    drops: shares of the epochs after which the learning rate falls to a fifth.
    shift: share of the shorter side that an image is moved by at most; its edges are repeated.
    flip: mirror half of the images. Only for classes that a mirror does not change: never for characters.
    warp: turn, stretch, shear and bend every image a little.

    Raises:
        UserError: a number out of range.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    optimizer: str = "adam"
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()
    shift: float = 0.0
    flip: bool = False
    warp: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("epochs", 1, 10**6), ("batch_size", 1, 10**9), ("shift", 0, 0.5)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{name} of a classifier is {getattr(self, name)}. Choose {least} to {most}.")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate of a classifier is {self.learning_rate}. Choose a number above 0.")


MakeNet = Callable[[Shape, int], nn.Module]
NETS: dict[str, MakeNet] = {"cnn": small_cnn, "cnn_dpdm": dpdm_cnn, "wrn_40_4": wide_resnet, "resnet_110": resnet}
PROTOCOLS = {
    "mlp": Training(50, 3e-4, 128),  # DPDM, released code: 100 hidden units
    "cnn": Training(20, 3e-3, 100, shift=1 / 16),
    "cnn_dpdm": Training(50, 3e-4, 128),  # DPDM, released code
    # The net of Ghalebikesabi et al. (2302.13861), trained as in 1605.07146: how they trained it is not known here.
    "wrn_40_4": Training(200, 0.1, 128, "sgd", 5e-4, drops=(0.3, 0.6, 0.8), shift=1 / 8),
    # DPImageBench (2503.14681), for all but CIFAR; without its moving average of the weights.
    "resnet_110": Training(50, 0.01, 256, drops=(0.4, 0.8)),
}
NAMES = ("logistic_regression", *PROTOCOLS)
MLP_FIELDS = ("epochs", "learning_rate", "batch_size", "weight_decay")


def predict(
    name: str,
    images: np.ndarray,  # (n, c, h, w) uint8
    labels: np.ndarray,  # (n,) class indices
    tested_images: np.ndarray,  # (m, c, h, w) uint8
    *,
    seed: int = 0,
    ensemble: int = 1,
    **changes: Any,
) -> np.ndarray:
    """Class indices (m,) of `tested_images`, of a classifier that trained on `images`.

    The same on the same machine with the same number of threads. On a GPU where there is one.

    name: one of NAMES.
    seed: of weights, order and augmentation. Logistic regression has none.
    ensemble: nets whose probabilities are averaged, of seeds that no other ensemble of this size has. It costs privacy
        nothing: all of them train on the same images.
    changes: fields of Training that are not to be as in PROTOCOLS; of them the MLP takes MLP_FIELDS.

    Raises:
        UserError: no such classifier, or a number out of range.
    """
    training = training_of(name, **changes)
    if ensemble < 1:
        raise UserError(f"An ensemble of {ensemble} classifiers predicts nothing. Choose 1 or more.")
    if training is None:
        return _logistic_regression(images, labels, tested_images).argmax(axis=1)
    members = range(seed * ensemble, seed * ensemble + ensemble)
    if name == "mlp":
        found = [_mlp(images, labels, tested_images, training, member) for member in members]
    else:
        found = [probabilities(NETS[name], training, images, labels, tested_images, seed=member) for member in members]
    return np.mean(found, axis=0).argmax(axis=1)


def training_of(name: str, **changes: Any) -> Training | None:
    """How the classifier `name` trains, with `changes`; None for logistic regression, which solves a convex problem.

    Raises:
        UserError: no such classifier, or a number out of range.
    """
    if name not in NAMES:
        raise UserError(f"{name!r} is no classifier. Choose from: {', '.join(NAMES)}.")
    if name == "mlp":
        changes = {field: value for field, value in changes.items() if field in MLP_FIELDS}
    return replace(PROTOCOLS[name], **changes) if name in PROTOCOLS else None


def probabilities(
    make_net: MakeNet,
    training: Training,
    images: np.ndarray,  # (n, c, h, w) uint8
    labels: np.ndarray,  # (n,) class indices
    tested_images: np.ndarray,  # (m, c, h, w) uint8
    *,
    seed: int,
) -> np.ndarray:
    """Probabilities (m, k) float64 of each class, of a net that trained on `images`; k is the largest label plus 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, c, h, w = images.shape
    with _own_random_stream(seed):
        net = make_net((c, h, w), int(labels.max()) + 1).to(device)
        _train(net, torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), training, seed)
    net.eval()
    with torch.no_grad():
        chunks = [net(_as_input(chunk.to(device))).double() for chunk in torch.from_numpy(tested_images).split(500)]
    return torch.cat(chunks).softmax(dim=1).cpu().numpy()  # in float64, where no two logits become equal


def _train(net: nn.Module, images: Tensor, labels: Tensor, training: Training, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            net.parameters(), training.learning_rate, momentum=0.9, weight_decay=training.weight_decay, nesterov=True
        )
    else:
        optimizer = torch.optim.Adam(net.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    milestones = [max(1, round(share * training.epochs)) for share in training.drops]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    for _ in range(training.epochs):
        for batch in torch.randperm(len(images), generator=generator).to(images.device).split(training.batch_size):
            inputs = _as_input(_augmented(images[batch], training, generator))
            loss = nn.functional.cross_entropy(net(inputs), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@contextmanager
def _own_random_stream(seed: int) -> Iterator[None]:
    """Inside, torch's global stream (weights, dropout) is that of `seed`; outside, as if nothing had been drawn."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        torch.manual_seed(seed)
        yield


def _as_input(images: Tensor) -> Tensor:
    """(b, c, h, w) uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _augmented(images: Tensor, training: Training, generator: torch.Generator) -> Tensor:
    """(b, c, h, w) uint8, each image changed by its own draw; drawn on the CPU, so alike on every device."""
    if training.shift:
        images = _shift(images, int(min(images.shape[2:]) * training.shift), generator)
    if training.flip:
        mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return _warp(images, generator) if training.warp else images


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own few pixels, at most `most` along each side; edges repeat."""
    b, _, h, w = images.shape
    down, right = torch.randint(-most, most + 1, (2, b, 1), generator=generator)
    rows = (torch.arange(h) + down).clamp(0, h - 1).to(images.device)
    columns = (torch.arange(w) + right).clamp(0, w - 1).to(images.device)
    each = torch.arange(b, device=images.device)
    moved = images[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (b, h, w, c)
    return moved.permute(0, 3, 1, 2)


def _warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 0.2 radians, stretched, sheared and bent by its own draw; edges repeat."""
    b, _, h, w = images.shape

    def uniform(most: float) -> Tensor:
        return most * (2 * torch.rand(b, generator=generator) - 1)

    angle, size, aspect, shear = uniform(0.2), uniform(0.12).exp(), uniform(0.12).exp(), uniform(0.2)
    looks = affine(angle, size, aspect, shear, shift=torch.zeros(b, 2), mirror=torch.ones(b))
    grid = nn.functional.affine_grid(looks, [b, 1, h, w], align_corners=False) + bend(b, h, w, 0.04, generator)
    warped = nn.functional.grid_sample(
        images.float(), grid.to(images.device), padding_mode="border", align_corners=False
    )
    return warped.round().to(torch.uint8)


def _logistic_regression(images: np.ndarray, labels: np.ndarray, tested_images: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], not standardised: a pixel almost constant in synthetic images must not explode in real ones."""
    flat, tested = (x.reshape(len(x), -1) / 255 for x in (images, tested_images))
    return _by_class(LogisticRegression(max_iter=1000).fit(flat, labels), tested)


def _mlp(images: np.ndarray, labels: np.ndarray, tested: np.ndarray, training: Training, seed: int) -> np.ndarray:
    net = MLPClassifier(
        hidden_layer_sizes=(100,),
        learning_rate_init=training.learning_rate,
        alpha=training.weight_decay,
        batch_size=min(training.batch_size, len(images)),
        max_iter=training.epochs,
        n_iter_no_change=training.epochs,  # every epoch is trained, as in the nets
        random_state=seed % 2**32,
    )
    flat, flat_tested = (x.reshape(len(x), -1) / np.float32(127.5) - 1 for x in (images, tested))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of epochs is what is asked for
        return _by_class(net.fit(flat, labels), flat_tested)


def _by_class(fitted: LogisticRegression | MLPClassifier, tested: np.ndarray) -> np.ndarray:
    """Probabilities (m, k) by class index: scikit-learn has columns for the classes that it saw only."""
    found = np.zeros((len(tested), int(fitted.classes_.max()) + 1))
    found[:, fitted.classes_] = fitted.predict_proba(tested)
    return found
