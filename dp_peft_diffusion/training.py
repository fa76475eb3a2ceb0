"""Private training, on one screen: ids -> losses -> clipped sum -> noise -> step."""

import csv
import dataclasses
import errno
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dp_peft_diffusion.batches import make_batch, make_loss
from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.diffusion.generation import class_indices, class_rows, image_grid, sample_images
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.gradients.functional import Gradients
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.gradients.optimizer import Ema, apply_update, make_optimizer
from dp_peft_diffusion.plan import epsilon_so_far, plan_text
from dp_peft_diffusion.preparation import Prepared, prepare
from dp_peft_diffusion.privacy.ledger import Ledger
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.randomness import new_key
from dp_peft_diffusion.recipe import Recipe, to_yaml
from dp_peft_diffusion.run_folder import FinishedRun
from dp_peft_diffusion.sharing.export import export

__all__ = ["FinishedRun", "Prepared", "RunResult", "plan_text", "prepare", "run", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `certificate` is None without privacy."""

    folder: Path
    certificate: dict | None
    private_folder: Path


def train(recipe: Recipe, output_dir: Path | str) -> RunResult:
    """Train an adapter as the recipe says and write the shareable folder.

    Raises:
        UserError: anything the user can mend, before any privacy is spent.
        FinishedRun: this run was finished before.
    """
    return run(prepare(recipe, output_dir))


def run(prepared: Prepared) -> RunResult:
    """Train, export, check the export with stock tools, and publish the folder.

    Raises:
        RunError: the disk is full. Steps begun are in the ledger; nothing was published.
    """
    folders, key = prepared.run, new_key()
    try:
        folders.create(prepared.requested, key)
        (folders.private / "recipe.yaml").write_text(to_yaml(prepared.recipe))
        write_problems(prepared.images, folders.private / "problems.csv")
        train_steps(prepared, key)
        certificate = export(
            folders.staging,
            prepared.recipe,
            prepared.base,
            prepared.adapter,
            prepared.mechanism,
            prepared.gamma_source,
        )
        if prepared.recipe.privacy.no_privacy:
            folders.close()  # stays in the private folder: there is no promise to share it under
            return RunResult(folders.staging, None, folders.private)
        folders.publish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"the disk is full: {error}. Nothing was published; {folders.ledger} lists the steps that were spent. "
            f"Make room and start afresh with another --output_dir, or remove {folders.private}."
        ) from error
    finally:
        folders.forget_key()
    return RunResult(folders.folder, certificate, folders.private)


def train_steps(prepared: Prepared, key: bytes) -> None:
    """All planned steps. Leaves the trained (or averaged) weights in `prepared.adapter`."""
    recipe, mechanism, clipper = prepared.recipe, prepared.mechanism, prepared.clipper
    parameters = clipper.parameters  # invariant 10: what is clipped is what trains
    optimizer = make_optimizer(recipe.train.optimizer, parameters, recipe.train.learning_rate)
    ema = Ema(parameters, recipe.train.ema_decay)
    loss_fn, ledger = make_loss(prepared.base, recipe.train.mixed_precision), Ledger(prepared.run.ledger)
    spent = epsilon_so_far(prepared)
    write_grid(prepared, 0)
    minutes = prepared.minutes_per_step  # measured on made-up images: how long a private batch takes is private
    bar = tqdm(
        range(mechanism.steps), desc="train", bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} {postfix}"
    )
    for step in bar:
        ledger.begin(step)  # invariant 12: on disk before this step's noise is drawn
        ids = example_ids(key, step, len(prepared.images), mechanism.sampling_prob)  # invariant 5
        total = clipper.zeros()
        for chunk in micro_batches(ids, recipe.train.micro_batch_size):
            batch = make_batch(recipe, prepared.base, *prepared.images.read(chunk), chunk.clip(0), key, step)
            for name, part in clipper.clipped_sum_of(loss_fn, batch).items():
                total[name] += part  # invariant 3: a sum, in float64
        noisy = privatize(prepared, total, key, step)  # invariant 7: after this, all is post-processing
        apply_update(optimizer, parameters, noisy, mechanism.expected_batch_size)
        ema.update()
        record_metrics(prepared, step + 1, noisy, spent[step])
        promise = f"epsilon {spent[step]:.3g} of {spent[-1]:.3g}" if spent[-1] else "NOT PRIVATE"
        bar.set_postfix_str(f"{promise}, about {(mechanism.steps - step - 1) * minutes:.1f} min left")
        if recipe.sample.every and (step + 1) % recipe.sample.every == 0 and step + 1 < mechanism.steps:
            with ema.applied():
                write_grid(prepared, step + 1)
    ema.copy_to(parameters)
    write_grid(prepared, mechanism.steps)


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
        "learning_rate": prepared.recipe.train.learning_rate,
        "update_norm": norm.item() / prepared.mechanism.expected_batch_size,
        "epsilon": epsilon,
    }
    with open(prepared.run.staging / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def write_problems(images: PrivateImages, path: Path) -> None:
    """The records that count as nothing, for the data holder's eyes (invariant 17)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "reason"])
        writer.writerows(images.problems)


def write_grid(prepared: Prepared, step: int) -> None:
    """A grid of samples, all classes in turn, the same noise every time."""
    sample, classes = prepared.recipe.sample, prepared.recipe.data.class_names
    labels = None if classes is None else class_indices(classes, None, sample.num_images)
    images = sample_images(
        dataclasses.replace(prepared.base, unet=prepared.adapter.unet),
        class_rows(prepared.base, prepared.recipe.adapter.class_rows, labels, sample.num_images),
        num_images=sample.num_images,
        seed=sample.seed,
        scheduler=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        device=prepared.accelerator.device,
    )
    columns = 10 if classes is None else len(classes)
    image_grid(images, columns).save(prepared.run.staging / "samples" / f"step-{step:04d}.png")
