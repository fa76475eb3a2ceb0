"""Before step 1: load, resolve, calibrate and measure, on public or made-up inputs only (invariant 15)."""

import dataclasses
import decimal
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dp_peft_diffusion import recipe as recipes
from dp_peft_diffusion.diffusion.adapters import Adapter, choose_class_rows, inject_adapter
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples
from dp_peft_diffusion.diffusion.draws import draw_dropped_labels, draw_noise, draw_timesteps
from dp_peft_diffusion.diffusion.generation import sample_images
from dp_peft_diffusion.diffusion.objectives import denoising_losses
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import promised_epsilon
from dp_peft_diffusion.recipe import Recipe, to_yaml, validate
from dp_peft_diffusion.run_folder import RunFolder

Batch = dict[str, torch.Tensor]
PUBLIC_KEY = bytes(16)  # draws for made-up inputs; no secret hangs on it
GAMMA_IMAGES = 64
GAMMA_SHARE = 0.1  # of the median norm of public images


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, and what its plan tells."""

    recipe: Recipe  # resolved: runs again as it stands
    requested: str
    run: RunFolder
    accelerator: Accelerator
    base: BaseModel
    images: PrivateImages
    adapter: Adapter
    clipper: PerSampleClipper
    mechanism: DPMechanism
    seconds_per_micro_batch: float
    activation_bytes: int
    gamma_source: str | None
    notes: tuple[str, ...]

    @property
    def minutes_per_step(self) -> float:
        """Expected time of one noisy update, from public quantities."""
        micro_batches = math.ceil(self.mechanism.expected_batch_size / self.recipe.train.micro_batch_size)
        return micro_batches * self.seconds_per_micro_batch / 60


def prepare(recipe: Recipe, output_dir: Path | str) -> Prepared:
    """Check the recipe and the folder, load base and images, calibrate the noise, measure one micro-batch.

    Raises:
        UserError: anything the user can mend.
        FinishedRun: this run was finished before.
    """
    validate(recipe)
    requested, run = to_yaml(recipe), RunFolder(Path(output_dir))
    run.check_usable(requested)
    accelerator = make_accelerator(recipe.train.mixed_precision)
    base = load_base(recipe.model.pretrained_model_name_or_path, recipe.model.revision)
    base.unet.to(accelerator.device)
    check_sampler(base, recipe.sample)
    images = open_examples(recipe.data, base.resolution, base.image_channels)
    recipe, notes = resolve(recipe, base, images)
    mechanism = make_mechanism(recipe, len(images))
    num_classes = len(recipe.data.class_names or ()) if recipe.adapter.class_rows else 0
    adapter = inject_adapter(base, recipe.adapter, num_classes, recipe.train.seed)
    gamma_source = None if recipe.privacy.gamma is None else "given by the user, declared public"
    if recipe.privacy.clipping == "automatic" and recipe.privacy.gamma is None:
        gamma_source = "images sampled from the base"
        gamma = choose_gamma(recipe, base, adapter)
        recipe = dataclasses.replace(recipe, privacy=dataclasses.replace(recipe.privacy, gamma=gamma))
    if gamma_source is not None:
        notes += (f"gamma {recipe.privacy.gamma:g} of automatic clipping: {gamma_source}",)
    clipper = make_clipper(recipe, adapter)
    measured = measure_micro_batch(recipe, base, clipper)
    return Prepared(
        recipe, requested, run, accelerator, base, images, adapter, clipper, mechanism, *measured, gamma_source, notes
    )


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Device and precision, from accelerate. The training loader is never handed to it (invariant 5).

    Raises:
        UserError: more than one process, or another precision than accelerate has in this process.
    """
    on_cpu = torch.backends.mps.is_available()  # Apple's GPUs have no float64, which norms and sums need
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}. Start a new process for it.") from error
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes: this version trains in one. Start it without accelerate launch."
        )
    return accelerator


def resolve(recipe: Recipe, base: BaseModel, images: PrivateImages) -> tuple[Recipe, tuple[str, ...]]:
    """Write into the recipe what base and images decide; say what was decided."""
    notes: tuple[str, ...] = ()
    data, adapter, train = recipe.data, recipe.adapter, recipe.train
    if images.class_names is None:
        data = dataclasses.replace(data, label_column=None, class_names=None)
        if base.num_class_embeds is not None and base.layout.null_class is None:
            raise UserError(
                f"base {base.name!r} wants a class for every image, and the images have no labels. "
                "Give --label_column, or choose an unconditional base."
            )
    elif base.num_class_embeds is None:
        notes += ("the base is unconditional: labels are ignored",)
        data = dataclasses.replace(data, label_column=None, class_names=None)
    else:
        data = dataclasses.replace(data, class_names=tuple(images.class_names))
        rows = choose_class_rows(base, adapter.class_rows, len(images.class_names))
        adapter = dataclasses.replace(adapter, class_rows=rows)
    if train.label_dropout and (data.class_names is None or base.layout.null_class is None):
        train = dataclasses.replace(train, label_dropout=0.0)
        notes += ("no label dropout: there are no labels, or the base has no null class",)
    return dataclasses.replace(recipe, data=data, adapter=adapter, train=train), notes


def make_mechanism(recipe: Recipe, num_examples: int) -> DPMechanism:
    """The mechanism of the run, its noise calibrated to the promise unless it was given."""
    batch, privacy = recipe.train.train_batch_size, recipe.privacy
    if batch > num_examples:
        raise UserError(
            f"--train_batch_size {batch} is more than the {num_examples} images. Try {num_examples} or less."
        )
    mechanism = DPMechanism(
        sampling_prob=batch / num_examples,
        steps=recipe.train.max_train_steps,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch,
        num_examples=num_examples,
        neighboring_relation=privacy.neighboring_relation,
    )
    if privacy.epsilon is not None:
        mechanism = mechanism.calibrate(epsilon=privacy.epsilon, delta=privacy.delta)
    if not privacy.no_privacy:
        promised_epsilon(mechanism, privacy.delta, privacy.epsilon)  # now, not after the privacy is spent
    return mechanism


def make_clipper(recipe: Recipe, adapter: Adapter, gamma: float | None = None) -> PerSampleClipper:
    """The clipper that the recipe asks for."""
    privacy = recipe.privacy
    return PerSampleClipper(
        adapter.unet,
        max_grad_norm=privacy.max_grad_norm,
        clipping=privacy.clipping,
        gamma=privacy.gamma if gamma is None else gamma,
    )


def make_batch(
    recipe: Recipe,
    base: BaseModel,
    images: torch.Tensor,  # (b, c, side, side) in [-1, 1]
    labels: torch.Tensor,  # (b,) private classes
    weights: torch.Tensor,  # (b,) 1, or 0 for a null record
    ids: np.ndarray,  # (b,) example ids
    key: bytes,
    step: int,
) -> Batch:
    """One micro-batch: images with everything each example draws in this step (invariant 8)."""
    draws, clean = recipe.train.noise_multiplicity, base.encode(images)
    batch = {
        "clean": clean,
        "weights": weights,
        "noise": draw_noise(key, step, ids, draws, tuple(clean.shape[1:])),
        "timesteps": draw_timesteps(key, step, ids, draws, base.scheduler.config.num_train_timesteps),
    }
    if base.num_class_embeds is not None:
        rows = torch.full((len(ids), draws), base.layout.null_class or 0)
        if recipe.adapter.class_rows:
            rows = torch.tensor(recipe.adapter.class_rows)[labels][:, None].expand(-1, draws)
            if recipe.train.label_dropout and base.layout.null_class is not None:
                dropped = draw_dropped_labels(key, step, ids, draws, recipe.train.label_dropout)
                rows = torch.where(dropped, base.layout.null_class, rows)
        batch["rows"] = rows
    return {name: value.to(base.unet.device) for name, value in batch.items()}


def make_loss(base: BaseModel, accelerator: Accelerator | None = None):
    """loss_fn(unet, batch) -> (b,), as the clipper takes it. A null record's loss is zero."""

    def loss_fn(unet: torch.nn.Module, batch: Batch) -> torch.Tensor:
        rows = batch["rows"].flatten() if "rows" in batch else None

        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            if accelerator is None:
                return unet(noisy, timesteps, class_labels=rows).sample
            with accelerator.autocast():
                return unet(noisy, timesteps, class_labels=rows).sample

        losses = denoising_losses(denoise, base.scheduler, batch["clean"], batch["noise"], batch["timesteps"])
        return losses * batch["weights"]

    return loss_fn


def public_batch(recipe: Recipe, base: BaseModel, images: torch.Tensor) -> Batch:
    """A batch of public images with labels in turn and draws from a public key."""
    n = len(images)
    labels = torch.arange(n) % max(1, len(recipe.data.class_names or ()))
    return make_batch(recipe, base, images, labels, torch.ones(n), np.arange(n), PUBLIC_KEY, step=0)


def choose_gamma(recipe: Recipe, base: BaseModel, adapter: Adapter) -> float:
    """A tenth of the median per-example gradient norm of images sampled from the base itself.

    Automatic clipping (Bu et al. 2023) scales each gradient to C g / (|g| + gamma): a gamma well
    below the norms keeps small gradients from drowning, and no private image chose it.
    """
    labels = None
    if base.num_class_embeds is not None:
        public = base.num_class_embeds if base.layout.null_class is None else base.layout.null_class
        labels = torch.from_numpy(np.random.default_rng(0).integers(public, size=GAMMA_IMAGES))
    sampled = sample_images(base, labels, num_images=GAMMA_IMAGES, seed=0, device=base.unet.device)
    clipper = make_clipper(recipe, adapter, gamma=1.0)
    batch = public_batch(recipe, base, sampled.float() / 127.5 - 1)
    norms = clipper.norms_of(make_loss(base), batch)
    return round_down(GAMMA_SHARE * norms.median().item(), digits=2)


def round_down(value: float, digits: int) -> float:
    """`value` with so many significant digits, never above it."""
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_FLOOR)
    return float(context.create_decimal_from_float(value))


def check_sampler(base: BaseModel, sample: recipes.Sample) -> None:
    """Make one image as the recipe's grids will be made, so that a wrong sampler costs no privacy.

    Raises:
        UserError: what `sample_images` refuses.
    """
    labels = None if base.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
    sample_images(
        base,
        labels,
        num_images=1,
        seed=sample.seed,
        scheduler=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        device=base.unet.device,
    )


def measure_micro_batch(recipe: Recipe, base: BaseModel, clipper: PerSampleClipper) -> tuple[float, int]:
    """Seconds for one micro-batch of made-up images (the second of two), and bytes kept for its backward.

    The peak of the process would not do: decoding the private images is in it (invariant 13).
    """
    n, channels = recipe.train.micro_batch_size, base.image_channels
    batch = public_batch(recipe, base, torch.zeros(n, channels, base.resolution, base.resolution))
    loss_fn, kept = make_loss(base), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        clipper.clipped_sum_of(loss_fn, batch)
    started = time.monotonic()
    clipper.clipped_sum_of(loss_fn, batch)
    return time.monotonic() - started, sum(kept.values())
