"""Private training, on one screen: ids -> losses -> clipped sum -> noise -> step."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from dp_peft_diffusion.attempt import begin, note_publication, open_images, restore_state
from dp_peft_diffusion.batches import make_batch, make_loss
from dp_peft_diffusion.diffusion.conditions import null_conditions
from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.diffusion.generation import class_indices
from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.durable import DISK_FULL, fsync_tree
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.gradients.functional import Gradients
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.gradients.optimizer import Ema, apply_update, learning_rate_at, make_optimizer, set_learning_rate
from dp_peft_diffusion.plan import epsilon_so_far, plan_text
from dp_peft_diffusion.preparation import Prepared, prepare
from dp_peft_diffusion.privacy.ledger import Ledger
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.recipe import Recipe
from dp_peft_diffusion.rehearsal import memory_told
from dp_peft_diffusion.runs.folder import FinishedRun, grid_name
from dp_peft_diffusion.runs.state import save_state, training_tensors
from dp_peft_diffusion.sharing.export import export

__all__ = ["FinishedRun", "Prepared", "RunResult", "plan_text", "prepare", "run", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `certificate` is None without privacy."""

    folder: Path
    certificate: dict | None
    private_folder: Path


def train(recipe: Recipe, output_dir: Path | str, key: bytes | None = None) -> RunResult:
    """Train an adapter as the recipe says and write the shareable folder; go on with a run that was interrupted.

    key: 16 bytes for the random streams, for tests and replay. Whoever knows it can take the noise off, so the
        certificate says that it was given, and `verify` refuses the folder.

    Raises:
        UserError: anything the user can mend, before any privacy is spent.
        RunError: what an interrupted run left is damaged, or the disk is full.
        FinishedRun: this run was finished before.
    """
    return run(prepare(recipe, output_dir), key)


def run(prepared: Prepared, key: bytes | None = None, escrow_key: Path | None = None) -> RunResult:
    """Train, export, check the export with stock tools, publish the folder, delete the key.

    key: as for `train`. escrow_key: a file that gets a copy of the key, for replay.

    Raises:
        RunError: the disk is full, or another process is at this run. What was begun can go on.
    """
    folders = prepared.run
    try:
        with folders.locked():
            images = open_images(prepared, folders.cache)
            record, streams = begin(prepared, images, key, escrow_key)
            with memory_told():
                train_steps(prepared, images, streams)
            certificate = export(
                folders.staging,
                prepared.recipe,
                prepared.base,
                prepared.task.conditions,
                prepared.adapter,
                prepared.promise,
                prepared.gamma_source,
                record.key_source,
                "escrowed" if record.escrowed else "deleted",
            )
            if certificate is None:
                folders.close()  # stays in the private folder: there is no promise to share it under
                return RunResult(folders.staging, None, folders.private)
            note_publication(prepared, images, record)
            folders.publish()
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        raise RunError(
            f"the disk is full: {error}. Nothing was published and nothing is lost: make room, then type the same "
            f"command to go on. {folders.ledger} lists the steps that were begun."
        ) from error
    return RunResult(folders.folder, certificate, folders.private)


def train_steps(prepared: Prepared, images: PrivateImages, key: bytes) -> None:
    """All planned steps, from the last saved state on. Leaves the trained (or averaged) weights in the adapter.

    key: of this attempt's streams.
    """
    recipe, mechanism, clipper = prepared.recipe, prepared.mechanism, prepared.clipper
    parameters = clipper.parameters  # invariant 10: what is clipped is what trains
    noise_of_mean = 0.0 if recipe.privacy.no_privacy else mechanism.noise_stddev / mechanism.expected_batch_size
    optimizer = make_optimizer(recipe.train, parameters, noise_of_mean)
    ema = Ema(parameters, recipe.train.ema_decay)
    loss_fn = make_loss(prepared.task, recipe.train.mixed_precision)
    ledger = Ledger(prepared.run.ledger, prepared.attempt)
    first = restore_state(prepared, key, ledger, optimizer, ema)
    if first == 0:
        write_grid(prepared, 0)
    spent = epsilon_so_far(prepared)
    for step in progress(prepared, first, spent):
        ledger.begin(step)  # invariant 12: on disk before this step's noise is drawn
        ids = example_ids(
            key, step, len(images), mechanism.sampling_prob, mechanism.truncated_batch_size
        )  # invariant 5
        total = clipper.zeros()
        for chunk in micro_batches(ids, recipe.train.micro_batch_size):
            batch = make_batch(prepared.task, images.read(chunk), chunk.clip(0), key, step)
            for name, part in clipper.clipped_sum_of(loss_fn, batch).items():
                total[name] += part  # invariant 3: a sum, in float64
        noisy = privatize(prepared, total, key, step)  # invariant 7: after this, all is post-processing
        set_learning_rate(optimizer, learning_rate_at(recipe.train, step))
        apply_update(optimizer, parameters, noisy, mechanism.expected_batch_size)
        ema.update()
        record_metrics(prepared, step + 1, noisy, spent[step])
        if recipe.sample.every and (step + 1) % recipe.sample.every == 0 and step + 1 < mechanism.steps:
            with ema.applied():
                write_grid(prepared, step + 1)
        if (step + 1) % recipe.train.checkpointing_steps == 0 or step + 1 == mechanism.steps:
            fsync_tree(prepared.run.staging)
            state = training_tensors(parameters, optimizer, ema)
            save_state(prepared.run.private, key, prepared.attempt, step + 1, state)
    ledger.close()
    ema.copy_to(parameters)
    write_grid(prepared, mechanism.steps)


def progress(prepared: Prepared, first: int, spent: list[float | None]) -> Iterator[int]:
    """The steps from `first` on, with a bar that shows what is public."""
    steps, promise = prepared.mechanism.steps, "NOT PRIVATE"
    minutes = prepared.minutes_per_step  # measured on made-up images: how long a private batch takes is private
    layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} {postfix}"
    bar = tqdm(range(first, steps), desc="train", initial=first, total=steps, bar_format=layout)
    for step in bar:
        yield step
        if spent[-1]:
            promise = f"epsilon {spent[step]:.3g} of {spent[-1]:.3g}"
        bar.set_postfix_str(f"{promise}, about {(steps - step - 1) * minutes:.1f} min left")


def privatize(prepared: Prepared, total: Gradients, key: bytes, step: int) -> Gradients:
    """The noisy sum; with --no_privacy, on images that were declared public, the bare sum."""
    if prepared.recipe.privacy.no_privacy:
        return {name: tensor.float() for name, tensor in total.items()}
    return add_noise(total, prepared.mechanism.noise_stddev, key, step)


def micro_batches(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Chunks of one size; the last is padded with -1, the null record (invariant 4)."""
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        yield np.pad(chunk, (0, size - len(chunk)), constant_values=-1)


def record_metrics(prepared: Prepared, step: int, noisy: dict[str, torch.Tensor], epsilon: float | None) -> None:
    """One line of what is public: everything here is computed from noisy sums (invariant 13)."""
    norm = torch.sqrt(sum(value.double().square().sum() for value in noisy.values()))  # type: ignore[arg-type]
    line = {
        "step": step,
        "learning_rate": learning_rate_at(prepared.recipe.train, step - 1),
        "update_norm": norm.item() / prepared.mechanism.expected_batch_size,
        "epsilon": epsilon,
    }
    with open(prepared.run.staging / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def write_grid(prepared: Prepared, step: int) -> None:
    """A grid of samples, all classes or prompts in turn, the same noise every time."""
    sample, device = prepared.recipe.sample, prepared.accelerator.device
    conditions, columns = grid_conditions(prepared)
    images = sample_images(
        dataclasses.replace(prepared.base, unet=prepared.adapter.unet),
        conditions,
        num_images=sample.num_images,
        seed=sample.seed,
        scheduler=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        batch_size=prepared.recipe.train.micro_batch_size,
        device=device,
    )
    image_grid(images, columns).save(prepared.run.staging / "samples" / grid_name(step))


def grid_conditions(prepared: Prepared) -> tuple[dict[str, torch.Tensor], int]:
    """What the network is told of each image of a grid, all of it public; and the columns of the grid."""
    data, sample, base = prepared.recipe.data, prepared.recipe.sample, prepared.base
    turns = torch.arange(sample.num_images)
    if base.text is not None and sample.prompts is not None:
        told = base.text.encode(list(sample.prompts))
        return {name: rows[turns % len(sample.prompts)] for name, rows in told.items()}, len(sample.prompts)
    if data.caption_column is not None:
        return null_conditions(base, sample.num_images), 10
    if data.class_names is None:
        return prepared.task.conditions.take(torch.zeros_like(turns)), 10
    if base.text is None:  # classes may have several rows each, which come in turn
        rows = torch.tensor(prepared.recipe.adapter.rows_in_turn)
        return {"class_labels": rows[turns % len(rows)].to(base.unet.device)}, len(data.class_names)
    labels = class_indices(data.class_names, None, sample.num_images)
    return prepared.task.conditions.take(torch.tensor(labels)), len(data.class_names)
