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
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy.composition import read_prior
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise, Release, make_promise
from dp_peft_diffusion.recipe import Model, Recipe, load_recipe, to_yaml, validate
from dp_peft_diffusion.rehearsal import (
    check_clipper,
    check_export,
    check_sampler,
    choose_gamma,
    choose_precision,
    measure_micro_batch,
    set_memory_format,
)
from dp_peft_diffusion.runs.attempts import Attempts, charged, load_attempts
from dp_peft_diffusion.runs.context import context_of, differences
from dp_peft_diffusion.runs.folder import RunFolder
from dp_peft_diffusion.runs.state import steps_saved


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, and what its plan tells.

    `promise` is None with --no_privacy. `earlier` lists the attempts begun before, `begun` the steps that each began;
    `resuming` says that the last of them goes on. `context` is everything that shapes an update.
    """

    recipe: Recipe  # resolved: runs again as it stands
    requested: str
    run: RunFolder
    accelerator: Accelerator
    base: BaseModel
    images: PrivateImages
    adapter: Adapter
    clipper: PerSampleClipper
    mechanism: DPMechanism
    promise: Promise | None
    earlier: Attempts | None
    begun: dict[int, int]
    resuming: bool
    context: dict[str, str]
    seconds_per_micro_batch: float
    activation_bytes: int
    gamma_source: str | None
    notes: tuple[str, ...]

    @property
    def attempt(self) -> int:
        """Number of the attempt that runs, from 1."""
        begun = 0 if self.earlier is None else len(self.earlier.attempts)
        return begun if self.resuming else begun + 1

    @property
    def minutes_per_step(self) -> float:
        """Expected time of one noisy update, from public quantities."""
        micro_batches = math.ceil(self.mechanism.expected_batch_size / self.recipe.train.micro_batch_size)
        return micro_batches * self.seconds_per_micro_batch / 60


def prepare(
    recipe: Recipe, output_dir: Path | str, new_attempt: bool = False, certified: Promise | None = None
) -> Prepared:
    """Check the recipe and the folder, load base and images, calibrate the noise, measure one micro-batch.

    new_attempt: begin an interrupted run anew, with fresh ids and noise; the steps it began are charged.
    certified: of a run that is replayed; nothing is calibrated then.

    Raises:
        UserError: anything the user can mend.
        RunError: what an interrupted run left behind is damaged.
        FinishedRun: this run was finished before.
    """
    validate(recipe)
    requested, run = to_yaml(recipe), RunFolder(Path(output_dir))
    resuming = run.check_usable(requested, new_attempt) and not new_attempt
    earlier, begun = load_attempts(run.attempts), steps_begun(run.ledger)
    gamma_given = recipe.privacy.gamma is not None
    if earlier is not None:
        last = len(earlier.attempts)
        check_ledger(run, last, steps_saved(run.private, last), begun)
        if resuming:
            recipe = as_resolved(recipe, load_recipe(run.recipe(last)))
    accelerator = make_accelerator()
    base = load_base(recipe.model.pretrained_model_name_or_path, recipe.model.revision)
    base.unet.to(accelerator.device)
    check_sampler(base, recipe.sample)
    images = open_examples(recipe.data, base.resolution, base.image_channels)
    recipe, notes = resolve(recipe, base, images)
    mechanism, promise = make_mechanism(recipe, len(images)), certified
    if promise is None and not recipe.privacy.no_privacy:
        given_up: tuple[Release, ...] = ()
        if earlier is not None:
            count = len(earlier.attempts) - resuming
            given_up = charged(earlier, count, begun, recipe.data.group_column, run.ledger)
        promise = promise_of(recipe, mechanism, given_up)
    mechanism = mechanism if promise is None else promise.mechanism
    num_classes = len(recipe.data.class_names or ()) if recipe.adapter.class_rows else 0
    adapter = inject_adapter(base, recipe.adapter, num_classes, recipe.train.seed)
    recipe, clipper, more_notes, gamma_source = choose(recipe, base, adapter, gamma_given)
    check_export(recipe, base, adapter, promise, gamma_source)
    if not recipe.train.skip_self_check:
        check_clipper(recipe, base, clipper)
    context = context_of(
        shaping_recipe(recipe), mechanism, promise, images.content_digest, base.digest, accelerator.device
    )
    if resuming and earlier is not None:
        check_context(earlier, context, run)
    seconds, activation_bytes = measure_micro_batch(recipe, base, clipper)
    return Prepared(
        recipe=recipe,
        requested=requested,
        run=run,
        accelerator=accelerator,
        base=base,
        images=images,
        adapter=adapter,
        clipper=clipper,
        mechanism=mechanism,
        promise=promise,
        earlier=earlier,
        begun=begun,
        resuming=resuming,
        context=context,
        seconds_per_micro_batch=seconds,
        activation_bytes=activation_bytes,
        gamma_source=gamma_source,
        notes=notes + more_notes,
    )


def choose(
    recipe: Recipe, base: BaseModel, adapter: Adapter, gamma_given: bool
) -> tuple[Recipe, PerSampleClipper, tuple[str, ...], str | None]:
    """What is measured on public inputs, once: gamma and precision. Recipe, clipper, notes, and gamma's source."""
    privacy, notes, source = recipe.privacy, tuple[str, ...](), None
    if privacy.clipping == "automatic":
        source = "given by the user, declared public" if gamma_given else "images sampled from the base"
        if privacy.gamma is None:
            privacy = dataclasses.replace(privacy, gamma=choose_gamma(recipe, base, adapter))
            recipe = dataclasses.replace(recipe, privacy=privacy)
        notes = (f"gamma {privacy.gamma:g} of automatic clipping: {source}",)
    clipper = PerSampleClipper(adapter.unet, privacy.max_grad_norm, privacy.clipping, privacy.gamma)
    if recipe.train.mixed_precision == "auto":
        precision, note = choose_precision(recipe, base, clipper)
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, mixed_precision=precision))
        notes += (note,)
    set_memory_format(adapter.unet, recipe.train.mixed_precision)
    return recipe, clipper, notes, source


def check_context(earlier: Attempts, context: dict[str, str], run: RunFolder) -> None:
    """An interrupted run goes on only as it began: its noise is never used under another context (invariant 12).

    Raises:
        UserError: naming what changed.
    """
    if earlier.attempts[-1].context != context:
        changed = differences(earlier.attempts[-1].context, context)
        raise UserError(
            f"the interrupted run in {run.private} began otherwise: {changed}. Its noise cannot be used again. Put "
            "things back as they were and type the same command, or add --new_attempt, which draws fresh noise and "
            "counts every step begun before."
        )


def check_ledger(run: RunFolder, attempt: int, steps_saved: int, begun: dict[int, int]) -> None:
    """A ledger with fewer steps than the saved state was put back to an older one, and counts too little.

    Raises:
        RunError: it is so, or the ledger is gone.
    """
    if not run.ledger.is_file() or steps_saved > begun.get(attempt, 0):
        raise RunError(
            f"the saved state holds {steps_saved} steps, of which {run.ledger} lists only {begun.get(attempt, 0)}: the "
            "ledger was removed or put back to an older one. Put back the newer one, or start afresh in another "
            "--output_dir and count all planned steps of this run as spent."
        )


def as_resolved(asked: Recipe, resolved: Recipe) -> Recipe:
    """What was measured or chosen once stands (invariant 8); bookkeeping may be asked for anew."""
    return dataclasses.replace(
        resolved,
        privacy=dataclasses.replace(resolved.privacy, record_spending=asked.privacy.record_spending),
        train=dataclasses.replace(resolved.train, checkpointing_steps=asked.train.checkpointing_steps),
    )


def promise_of(recipe: Recipe, mechanism: DPMechanism, given_up: tuple[Release, ...]) -> Promise:
    """What the run will promise together with everything released before, its noise calibrated."""
    privacy = recipe.privacy
    prior = read_prior(privacy.prior_event or (), mechanism, recipe.data.group_column) + given_up
    return make_promise(
        mechanism, delta=privacy.delta, epsilon=privacy.epsilon, tuning_runs=privacy.tuning_runs, prior=prior
    )


def shaping_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML without places, whose contents have digests of their own, and bookkeeping."""
    return to_yaml(
        dataclasses.replace(
            recipe,
            model=Model(),
            data=dataclasses.replace(recipe.data, dataset_name="", dataset_config_name=None, declared_public=False),
            privacy=dataclasses.replace(recipe.privacy, prior_event=None, record_spending=True),
            train=dataclasses.replace(recipe.train, checkpointing_steps=1),
        )
    )


def make_accelerator() -> Accelerator:
    """The device, from accelerate. The training loader is never handed to it (invariant 5).

    Raises:
        UserError: more than one process.
    """
    try:
        accelerator = Accelerator(cpu=torch.backends.mps.is_available())  # Apple's GPUs have no float64, for sums
    except (ImportError, ValueError) as error:
        raise UserError(f"accelerate cannot start: {error} Look at your ACCELERATE_... variables.") from error
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
    """The mechanism of the run, its noise not yet calibrated. Under add_or_remove_one, N decides nothing."""
    batch, privacy = recipe.train.train_batch_size, recipe.privacy
    public = privacy.neighboring_relation != "add_or_remove_one"
    if public and batch > num_examples:
        raise UserError(
            f"--train_batch_size {batch} is more than the {num_examples} images. Try {num_examples} or less."
        )
    return DPMechanism(
        sampling_prob=batch / num_examples if privacy.sampling_prob is None else privacy.sampling_prob,
        steps=recipe.train.max_train_steps,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch,
        num_examples=num_examples if public else None,
        neighboring_relation=privacy.neighboring_relation,
        truncated_batch_size=privacy.truncated_batch_size,
        max_examples_per_group=recipe.data.max_examples_per_group or 1,
    )
