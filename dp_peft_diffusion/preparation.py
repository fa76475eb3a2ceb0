"""Before step 1: load, resolve, calibrate and measure, on public or made-up inputs only (invariant 15)."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from dp_peft_diffusion.diffusion.adapters import Adapter, inject_adapter
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.class_rows import choose_class_rows
from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import promised_epsilon
from dp_peft_diffusion.recipe import Recipe, to_yaml, validate
from dp_peft_diffusion.rehearsal import (
    check_clipper,
    check_sampler,
    choose_gamma,
    choose_precision,
    measure_micro_batch,
    set_memory_format,
)
from dp_peft_diffusion.run_folder import RunFolder


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
    accelerator = make_accelerator()
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
    if recipe.train.mixed_precision == "auto":
        precision, note = choose_precision(recipe, base, clipper)
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, mixed_precision=precision))
        notes += (note,)
    set_memory_format(adapter.unet, recipe.train.mixed_precision)
    if not recipe.train.skip_self_check:
        check_clipper(recipe, base, clipper)
    measured = measure_micro_batch(recipe, base, clipper)
    return Prepared(
        recipe,
        requested,
        run,
        accelerator,
        base,
        images,
        adapter,
        clipper,
        mechanism,
        *measured,
        gamma_source,
        notes,
    )


def make_accelerator() -> Accelerator:
    """The device, from accelerate. The training loader is never handed to it (invariant 5).

    Raises:
        UserError: more than one process.
    """
    accelerator = Accelerator(cpu=torch.backends.mps.is_available())  # Apple's GPUs have no float64, which sums need
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


def make_clipper(recipe: Recipe, adapter: Adapter) -> PerSampleClipper:
    """The clipper that the recipe asks for."""
    privacy = recipe.privacy
    return PerSampleClipper(adapter.unet, privacy.max_grad_norm, privacy.clipping, privacy.gamma)
