"""A run small enough to be made hundreds of times: a denoiser of linear layers, its images, and what a step showed.

Nothing here stands in for the code under test but the network: sampling, batches, clipping, noise and updates are the
real ones, called by the real `training.train_steps`.
"""

import copy
import functools
import hashlib
import io
import json
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dp_peft_diffusion import training
from dp_peft_diffusion.batches import make_task
from dp_peft_diffusion.diffusion.adapters import Adapter
from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel
from dp_peft_diffusion.diffusion.class_rows import ClassRows
from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import Adapter as AdapterOptions
from dp_peft_diffusion.recipe import Data, Privacy, Recipe, Sample, Train
from dp_peft_diffusion.runs.folder import RunFolder

C = 0.5  # max_grad_norm
LEARNING_RATE = 0.1
DIRECTIONS = 2
NULL_ROW = 1  # of the class table: row 0 is public, rows from 2 on are the private classes
ACCELERATOR = Accelerator(cpu=True)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a run syncs its files to disk many times


def key_of(seed: int) -> bytes:
    return hashlib.sha256(f"key {seed}".encode()).digest()[:16]


class TinyDenoiser(nn.Module):
    """Lift, add the class row, scale by time, drop: linear in its input, so that large pixels give large gradients."""

    def __init__(self, side: int, width: int, num_classes: int, directions: int) -> None:
        super().__init__()
        self.lift, self.drop = nn.Linear(side**2, width), nn.Linear(width, side**2)
        rows = tuple(range(NULL_ROW + 1, NULL_ROW + 1 + num_classes))
        table = nn.Embedding(NULL_ROW + 1 + num_classes, width)
        self.class_embedding = ClassRows(table, rows, torch.randn(directions, width))
        self.config = SimpleNamespace(sample_size=side, in_channels=1, num_class_embeds=table.num_embeddings)
        self.device = torch.device("cpu")

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        lifted = self.lift(x.flatten(1)) + self.class_embedding(class_labels)
        return SimpleNamespace(sample=self.drop(lifted * (0.5 + t.float().view(-1, 1) / 1000)).view_as(x))


@functools.cache
def _tiny_net(side: int = 4, width: int = 8, num_classes: int = 3, directions: int = DIRECTIONS, lora: bool = True):
    torch.manual_seed(0)
    net = TinyDenoiser(side, width, num_classes, directions).eval()
    net.requires_grad_(False)
    net.class_embedding.codes.requires_grad_(True)
    if lora:
        config = net.config
        net.config = None  # peft would take it for that of a transformer
        net = inject_adapter_in_model(
            LoraConfig(r=2, lora_alpha=2, target_modules=["lift", "drop"], init_lora_weights=False), net
        ).eval()
        net.config = config
        net.class_embedding.codes.requires_grad_(True)
    else:
        net.lift.weight.requires_grad_(True)
        net.drop.weight.requires_grad_(True)
    return net


def tiny_net(**options) -> nn.Module:
    """A fresh `TinyDenoiser`. What trains: LoRA on both layers or their whole weights, and the class rows."""
    return copy.deepcopy(_tiny_net(**options))


def private_images(records: np.ndarray, weights: np.ndarray | None = None, num_classes: int = 3) -> PrivateImages:
    """`records` (n, s, s), of any float32 values; record i has class i modulo the number of classes."""
    n, side, _ = records.shape
    clean = np.zeros((n + 1, 1, 1, side, side), np.float32)
    with np.errstate(over="ignore"):
        clean[:n, 0, 0] = records
    kept = np.append(np.ones(n) if weights is None else weights, 0).astype(np.float32)
    labels = np.arange(n + 1) % num_classes * (kept > 0)
    names = tuple(f"class {c}" for c in range(num_classes))
    return PrivateImages({"clean": clean, "labels": labels, "weights": kept}, names, [], b"digest")


def nulled(records: np.ndarray, i: int) -> PrivateImages:
    """Record i replaced by nothing, as the data room writes it: a blank image of weight 0."""
    weights = np.ones(len(records))
    weights[i] = 0
    without = records.copy()
    without[i] = 0
    return private_images(without, weights)


@dataclass
class Trace:
    """What the steps of one run did, seen from outside.

    sums: clipped sums as they met the noise, and `noisy` as they came out of it. updates, divisors: what the optimizer
    was given. ledger_at_noise: lines of the ledger when each noise was drawn. read: ids of the images that were read,
    micro-batch by micro-batch; made, steps: ids and step of the batches that were made of them.
    """

    sums: list[dict[str, Tensor]] = field(default_factory=list)
    noisy: list[dict[str, Tensor]] = field(default_factory=list)
    updates: list[dict[str, Tensor]] = field(default_factory=list)
    divisors: list[float] = field(default_factory=list)
    ledger_at_noise: list[int] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    made: list[np.ndarray] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ledger: int = 0
    metrics: list[dict] = field(default_factory=list)
    files: tuple[str, ...] = ()
    first_grid: bytes = b""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def events(self) -> tuple:
        """What anybody could see of the run but the numbers that noise covers."""
        shapes = [{name: tensor.shape for name, tensor in update.items()} for update in self.updates]
        public = [{name: line[name] for name in line if name != "update_norm"} for line in self.metrics]
        return shapes, len(self.sums), self.divisors, self.ledger, public, self.files, self.first_grid


@dataclass(frozen=True)
class TinyRun:
    """The choices of a tiny run."""

    images: PrivateImages
    steps: int = 1
    sampling_prob: float = 1.0
    noise_multiplier: float = 1.0
    noise_multiplicity: int = 1
    micro_batch_size: int = 2
    optimizer: str = "sgd"
    ema_decay: float = 0.0
    label_dropout: float = 0.3
    expected_batch_size: float | None = None  # with it, N is private (add_or_remove_one)

    def recipe(self) -> Recipe:
        classes = tuple(self.images.class_names)
        rows = tuple(range(NULL_ROW + 1, NULL_ROW + 1 + len(classes)))
        return Recipe(
            data=Data(dataset_name="tiny", class_names=classes),
            adapter=AdapterOptions(class_rows=rows),
            privacy=Privacy(epsilon=None, noise_multiplier=self.noise_multiplier, max_grad_norm=C, clipping="flat"),
            train=Train(
                train_batch_size=max(1, round(self.sampling_prob * len(self.images))),
                max_train_steps=self.steps,
                noise_multiplicity=self.noise_multiplicity,
                micro_batch_size=self.micro_batch_size,
                learning_rate=LEARNING_RATE,
                optimizer=self.optimizer,
                ema_decay=self.ema_decay,
                label_dropout=self.label_dropout,
                mixed_precision="no",
                checkpointing_steps=1000,
            ),
            sample=Sample(num_images=3, num_inference_steps=1),
        )

    def mechanism(self) -> DPMechanism:
        known = self.expected_batch_size is None
        n = len(self.images)
        return DPMechanism(
            sampling_prob=self.sampling_prob,
            steps=self.steps,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=C,
            expected_batch_size=self.sampling_prob * n if known else self.expected_batch_size,
            num_examples=n if known else None,
            neighboring_relation="zero_out" if known else "add_or_remove_one",
        )


def tiny_base(net: nn.Module) -> BaseModel:
    scheduler = DDPMScheduler(prediction_type="epsilon")
    return BaseModel(net, scheduler, BaseLayout(1, NULL_ROW), "tiny", None, None, "0" * 64)


def prepared_run(run: TinyRun, folder: Path, net: nn.Module) -> training.Prepared:
    """What `preparation.prepare` would hand over."""
    return training.Prepared(
        recipe=run.recipe(),
        requested="",
        run=RunFolder(folder / "run"),
        accelerator=ACCELERATOR,
        num_examples=len(run.images),
        task=make_task(run.recipe(), tiny_base(net)),
        adapter=Adapter(net, None, net.class_embedding),
        clipper=PerSampleClipper(net, C),
        mechanism=run.mechanism(),
        promise=None,
        earlier=None,
        begun={},
        resuming=False,
        context={},
        seconds_per_micro_batch=1.0,
        activation_bytes=0,
        gamma_source=None,
        notes=(),
    )


def trace_of(run: TinyRun, key: bytes, net: nn.Module | None = None, learn: bool = False) -> Trace:
    """Run the real `train_steps`. Without `learn` the weights stay where they are, so that every step can be compared.

    The wrapped functions hand everything on; only `apply_update` is left out when nothing is to be learned.
    """
    trace, net = Trace(), tiny_net() if net is None else net
    make_batch, apply_update, add_noise = training.make_batch, training.apply_update, training.add_noise
    read = run.images.read

    def seen_batch(task, examples, ids, batch_key, step):
        trace.made.append(np.array(ids))
        trace.steps.append(step)
        return make_batch(task, examples, ids, batch_key, step)

    def seen_read(ids):
        trace.read.append(np.array(ids))
        return read(ids)

    def seen_noise(total, *arguments):
        trace.sums.append({name: tensor.clone() for name, tensor in total.items()})
        trace.ledger_at_noise.append(len(prepared.run.ledger.read_text().splitlines()))
        noisy = add_noise(total, *arguments)
        trace.noisy.append({name: tensor.clone() for name, tensor in noisy.items()})
        return noisy

    def seen_update(optimizer, parameters, noisy, expected_batch_size):
        trace.updates.append({name: tensor.clone() for name, tensor in noisy.items()})
        trace.divisors.append(expected_batch_size)
        if learn:
            apply_update(optimizer, parameters, noisy, expected_batch_size)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        prepared = prepared_run(run, Path(folder), net)
        prepared.run.create(key)
        with (
            patch.object(training, "make_batch", seen_batch),
            patch.object(training, "apply_update", seen_update),
            patch.object(training, "add_noise", seen_noise),
            patch.object(run.images, "read", seen_read),
            patch.object(training, "epsilon_so_far", lambda prepared: [0.0] * run.steps),  # slow, and information only
            redirect_stderr(io.StringIO()),
        ):
            training.train_steps(prepared, run.images, key)
        staging = prepared.run.staging
        trace.ledger = len(prepared.run.ledger.read_text().splitlines())
        metrics = staging / "metrics.jsonl"
        trace.metrics = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        trace.files = tuple(sorted(str(path.relative_to(staging)) for path in staging.rglob("*")))
        trace.first_grid = (staging / "samples" / "step-0000.png").read_bytes()
        trace.weights = {name: p.detach().clone() for name, p in prepared.clipper.parameters.items()}
    return trace


def vector(gradients: dict[str, Tensor]) -> Tensor:
    """All tensors as one vector, float64."""
    return torch.cat([tensor.double().flatten() for tensor in gradients.values()])
