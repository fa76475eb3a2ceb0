"""Before step 1: load, resolve, calibrate and measure, on public or made-up inputs only (invariant 15)."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from dp_peft_diffusion.batches import Task, make_task
from dp_peft_diffusion.diffusion.adapters import Adapter, inject_adapter
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.datasets import survey
from dp_peft_diffusion.errors import RunError, UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy.composition import read_prior
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise, Release, make_promise
from dp_peft_diffusion.recipe import Recipe, load_recipe, to_yaml, validate
from dp_peft_diffusion.rehearsal import (
    check_clipper,
    check_export,
    check_sampler,
    choose_gamma,
    choose_precision,
    measure_micro_batch,
    set_memory_format,
)
from dp_peft_diffusion.resolution import as_resolved, check_given, make_mechanism, resolve, shaping_recipe
from dp_peft_diffusion.runs.attempts import Attempts, charged, load_attempts
from dp_peft_diffusion.runs.context import context_of, differences
from dp_peft_diffusion.runs.folder import RunFolder
from dp_peft_diffusion.runs.state import steps_saved


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, and what its plan tells.

    `promise` is None with --no_privacy. `earlier` lists the attempts begun before, `begun` the steps that each began;
    `resuming` says that the last of them goes on. `context` is everything that shapes an update but for the images.
    """

    recipe: Recipe  # resolved: runs again as it stands
    requested: str
    run: RunFolder
    accelerator: Accelerator
    num_examples: int  # private under add_or_remove_one
    task: Task
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
    def base(self) -> BaseModel:
        """The frozen base."""
        return self.task.base

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
    recipe: Recipe,
    output_dir: Path | str,
    new_attempt: bool = False,
    certified: Promise | None = None,
) -> Prepared:
    """Check the recipe and the folder, load the base, count the images, calibrate the noise, measure one micro-batch.

    Nothing is decoded and nothing is written.

    new_attempt: begin an interrupted run anew, with fresh ids and noise; the steps it began are charged.
    certified: of a run that is replayed; nothing is calibrated then.

    Raises:
        UserError: anything the user can mend.
        RunError: what an interrupted run left behind is damaged.
        FinishedRun: this run was finished before.
    """
    check_given(validate(recipe))
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
    base = open_base(recipe, accelerator.device)
    check_sampler(base, recipe.sample)
    images = survey(recipe.data, base)
    recipe, notes = resolve(recipe, base, images.class_names)
    task = make_task(recipe, base)
    mechanism, promise = make_mechanism(recipe, images.num_examples), certified
    if promise is None and not recipe.privacy.no_privacy:
        count = 0 if earlier is None else len(earlier.attempts) - resuming
        given_up = charged(earlier, count, begun, recipe.data.group_column, run.ledger) if earlier else ()
        promise = promise_of(recipe, mechanism, given_up)
    mechanism = mechanism if promise is None else promise.mechanism
    adapter = make_adapter(recipe, base, mechanism, private=promise is not None)
    task, clipper, more_notes, gamma_source = choose(task, adapter, gamma_given)
    recipe = task.recipe
    check_export(recipe, base, adapter, promise, gamma_source)
    if not recipe.train.skip_self_check:
        check_clipper(task, clipper)
    shaping, told = shaping_recipe(recipe), task.conditions.digest
    context = context_of(shaping, mechanism, promise, base.digest, told, accelerator.device)
    if resuming and earlier is not None:
        check_context(earlier, context, run)
    seconds, activation_bytes = measure_micro_batch(task, clipper)
    return Prepared(
        recipe=recipe,
        requested=requested,
        run=run,
        accelerator=accelerator,
        num_examples=images.num_examples,
        task=task,
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


def make_adapter(recipe: Recipe, base: BaseModel, mechanism: DPMechanism, private: bool) -> Adapter:
    """The adapter of a resolved recipe, untrained. It may reckon with the noise to come; without privacy, none."""
    num_classes = len(recipe.data.class_names or ()) if recipe.adapter.class_rows else 0
    noise_of_mean = mechanism.noise_stddev / mechanism.expected_batch_size if private else 0.0
    bound = mechanism.max_grad_norm
    return inject_adapter(base, recipe.adapter, num_classes, recipe.train.seed, bound, noise_of_mean)


def choose(
    task: Task, adapter: Adapter, gamma_given: bool
) -> tuple[Task, PerSampleClipper, tuple[str, ...], str | None]:
    """What is measured on public inputs, once: gamma and precision. Task, clipper, notes, and gamma's source."""
    recipe, notes, source = task.recipe, tuple[str, ...](), None
    privacy = recipe.privacy
    if privacy.clipping == "automatic":
        source = "given by the user, declared public" if gamma_given else "images sampled from the base"
        if privacy.gamma is None:
            privacy = dataclasses.replace(privacy, gamma=choose_gamma(task, adapter))
            recipe = dataclasses.replace(recipe, privacy=privacy)
        notes = (f"gamma {privacy.gamma:g} of automatic clipping: {source}",)
    clipper = PerSampleClipper(adapter.unet, privacy.max_grad_norm, privacy.clipping, privacy.gamma)
    if recipe.train.mixed_precision == "auto":
        precision, note = choose_precision(task, clipper)
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, mixed_precision=precision))
        notes += (note,)
    set_memory_format(adapter.unet, recipe.train.mixed_precision)
    return dataclasses.replace(task, recipe=recipe), clipper, notes, source


def check_context(earlier: Attempts, context: dict[str, str], run: RunFolder) -> None:
    """An interrupted run goes on only as it began: its noise is never used under another context (invariant 12).

    context: or a part of it.

    Raises:
        UserError: naming what changed.
    """
    before = {name: text for name, text in earlier.attempts[-1].context.items() if name in context}
    if before != context:
        raise UserError(
            f"the interrupted run in {run.private} began otherwise: {differences(before, context)}. Its noise cannot "
            "be used again. Put things back as they were and type the same command, or add --new_attempt, which draws "
            "fresh noise and counts every step begun before."
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


def promise_of(recipe: Recipe, mechanism: DPMechanism, given_up: tuple[Release, ...]) -> Promise:
    """What the run will promise together with everything released before, its noise calibrated."""
    privacy = recipe.privacy
    prior = read_prior(privacy.prior_event or (), mechanism, recipe.data.group_column) + given_up
    return make_promise(
        mechanism,
        delta=privacy.delta,
        epsilon=privacy.epsilon,
        tuning_runs=privacy.tuning_runs,
        unpaid_runs=privacy.unpaid_runs,
        prior=prior,
    )


def open_base(recipe: Recipe, device: torch.device) -> BaseModel:
    """The base of a recipe, on the device where it works."""
    model = recipe.model
    base = load_base(
        model.pretrained_model_name_or_path,
        model.revision,
        from_scratch=model.from_scratch,
        prediction_type=model.prediction_type,
        seed=recipe.train.seed,
    )
    return base.to(device)


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
