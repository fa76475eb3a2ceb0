"""What is tried out before step 1, on public or made-up inputs only (invariant 15): sampler, gradients, speed."""

import contextlib
import dataclasses
import decimal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dp_peft_diffusion import recipe as recipes
from dp_peft_diffusion.batches import Task, made_up_batch, make_loss, public_batch
from dp_peft_diffusion.diffusion.adapters import Adapter
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.conditions import null_conditions
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.self_check import check_gradients
from dp_peft_diffusion.privacy.adapter_files import check_adapter
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE, check_form
from dp_peft_diffusion.privacy.lora_files import check_lora_file
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.recipe import Recipe, to_yaml
from dp_peft_diffusion.sharing.export import certify, shareable_recipe, write_other_files, write_weights

MEASURED_SECONDS = 1.0
GAMMA_IMAGES = 64
GAMMA_SHARE = 0.1  # of the median norm of public images


@contextlib.contextmanager
def memory_told() -> Iterator[None]:
    """What to type when a micro-batch does not fit the device.

    Raises:
        UserError: torch is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "a micro-batch does not fit the device. Type a smaller --micro_batch_size: it changes nothing but time."
        ) from error


def check_sampler(base: BaseModel, sample: recipes.Sample) -> None:
    """Make one image as the recipe's grids will be made, so that a wrong sampler costs no privacy.

    Raises:
        UserError: what `sample_images` refuses.
    """
    sample_images(
        base,
        null_conditions(base, 1),
        num_images=1,
        seed=sample.seed,
        scheduler=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        device=base.unet.device,
    )


@memory_told()
def choose_gamma(task: Task, adapter: Adapter) -> float:
    """A tenth of the median per-example gradient norm of images sampled from the base itself.

    Automatic clipping (Bu et al. 2023) scales each gradient to C g / (|g| + gamma): a gamma well
    below the norms keeps small gradients from drowning, and no private image chose it.
    """
    base, size = task.base, task.recipe.train.micro_batch_size
    conditions = null_conditions(base, GAMMA_IMAGES)
    if base.public_rows:
        labels = np.random.default_rng(0).choice(base.public_rows, size=GAMMA_IMAGES)
        conditions = {"class_labels": torch.from_numpy(labels).to(base.unet.device)}
    sampled = sample_images(base, conditions, num_images=GAMMA_IMAGES, seed=0, batch_size=size, device=base.unet.device)
    clipper, loss_fn = PerSampleClipper(adapter.unet), make_loss(task)  # for its norms: nothing is clipped
    batch = public_batch(task, sampled.float() / 127.5 - 1)
    chunks = [{name: part[at : at + size] for name, part in batch.items()} for at in range(0, GAMMA_IMAGES, size)]
    norms = torch.cat([clipper.norms_of(loss_fn, chunk) for chunk in chunks])
    return round_down(GAMMA_SHARE * norms.median().item(), digits=2)


def round_down(value: float, digits: int) -> float:
    """`value` with so many significant digits, never above it."""
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_FLOOR)
    return float(context.create_decimal_from_float(value))


def choose_precision(task: Task, clipper: PerSampleClipper) -> tuple[str, str]:
    """The faster of float32 and bfloat16 on made-up images, for about a second each, and a sentence that says so.

    Written into the resolved recipe, so that a run is never measured into another precision half-way.
    """
    seconds = {"no": seconds_of(task, clipper, "no")}
    try:
        seconds["bf16"] = seconds_of(task, clipper, "bf16")
    except UserError as error:
        return "no", f"mixed_precision no: bfloat16 cannot do it here ({error})"
    fastest = min(seconds, key=seconds.__getitem__)
    note = f"mixed_precision {fastest}: {seconds['no']:.2f} s in float32, {seconds['bf16']:.2f} s in bfloat16"
    return fastest, f"{note}, measured on made-up images"


@memory_told()
def seconds_of(task: Task, clipper: PerSampleClipper, mixed_precision: str) -> float:
    """The fastest of the micro-batches of made-up images that fit into about a second."""
    set_memory_format(clipper.model, mixed_precision)
    loss_fn, times = make_loss(task, mixed_precision), list[float]()
    batch = made_up_batch(task, task.recipe.train.micro_batch_size)
    clipper.clipped_sum_of(loss_fn, batch)  # the first call of a precision sets kernels up
    while sum(times) < MEASURED_SECONDS:
        started = time.monotonic()
        clipper.clipped_sum_of(loss_fn, batch)
        times.append(time.monotonic() - started)
    return min(times)


def set_memory_format(model: torch.nn.Module, mixed_precision: str) -> None:
    """Channels last in bfloat16, where convolutions are made for it; contiguous in float32, where nothing is gained."""
    model.to(memory_format=torch.channels_last if mixed_precision == "bf16" else torch.contiguous_format)


@memory_told()
def check_clipper(task: Task, clipper: PerSampleClipper) -> None:
    """The start-up self-check: the loss, model and shapes of the run, on made-up images; two examples, two draws.

    Raises:
        UserError: what `check_gradients` refuses.
    """
    views = task.recipe.train.augmentation_multiplicity if task.recipe.adapter.kind == "code_moments" else 1
    train = task.recipe.train
    train = dataclasses.replace(train, noise_multiplicity=2, augmentation_multiplicity=views, label_dropout=0.0)
    batch = made_up_batch(dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, train=train)), 2)
    check_gradients(clipper, make_loss(task), batch)  # sharp: in bfloat16, rounding would hide small tensors
    if train.mixed_precision == "bf16":
        check_gradients(clipper, make_loss(task, "bf16"), batch, torch.bfloat16)


def check_export(
    recipe: Recipe, base: BaseModel, adapter: Adapter, promise: Promise | None, gamma_source: str | None
) -> None:
    """Write and certify the untrained weights in a temporary folder, as the trained ones will be, and check both.

    Raises:
        UserError: they could not be exported, which is better known before any privacy is spent.
    """
    with tempfile.TemporaryDirectory(prefix="dp-peft-rehearsal-") as scratch:
        try:
            folder, recipe = Path(scratch), shareable_recipe(recipe)
            write_weights(base, adapter, folder)
            check_adapter(folder)
            if promise is not None:
                (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
                document = certify(folder, recipe, base, promise, gamma_source, "os", "deleted")
                check_form(document)
                write_other_files(base, adapter, folder, document)
                if (folder / LORA_FILE).is_file():
                    check_lora_file(folder, document)
        except (PrivacyError, RunError) as error:
            raise UserError(
                f"what this run would train cannot be exported: {error} If it is too large, choose a smaller --rank, "
                "fewer --target_modules, or another --adapter."
            ) from error


@memory_told()
def measure_micro_batch(task: Task, clipper: PerSampleClipper) -> tuple[float, int]:
    """Seconds for one micro-batch of made-up images (the second one run), and bytes kept for its backward.

    The peak of the process would not do: decoding the private images is in it (invariant 13).
    """
    batch = made_up_batch(task, task.recipe.train.micro_batch_size)
    loss_fn, kept = make_loss(task, task.recipe.train.mixed_precision), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # torch.func refuses these hooks, and keeps about what an ordinary backward would.
    run = clipper.clipped_sum_of if clipper.path == "hooks" else lambda loss_fn, batch: loss_fn(clipper.model, batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(loss_fn, batch)
    started = time.monotonic()
    if task.recipe.adapter.kind == "code_moments":  # whose codes are made with the batch
        batch = made_up_batch(task, task.recipe.train.micro_batch_size)
    clipper.clipped_sum_of(loss_fn, batch)
    return time.monotonic() - started, sum(kept.values())
