"""What a run will do and cost, told before anything is spent."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dp_peft_diffusion.diffusion.code_moments import CodeMoments
from dp_peft_diffusion.privacy import accounting, planning
from dp_peft_diffusion.privacy.promise import composed_event
from dp_peft_diffusion.recipe import Data

if TYPE_CHECKING:
    from dp_peft_diffusion.preparation import Prepared

PRICED_STEPS = 20  # steps at which the epsilon so far is computed; between them the next one's stands


def plan_text(prepared: "Prepared") -> str:
    """The plan, one line a topic, in words first."""
    lines = attempt_lines(prepared) + promise_lines(prepared) + training_lines(prepared) + utility_lines(prepared)
    width = max(len(topic) for topic, _ in lines)
    return "\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)


def attempt_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What was begun before, if anything."""
    if prepared.resuming:
        return [("Resumes", f"the interrupted run in {prepared.run.private}, with the noise it began with")]
    if prepared.attempt > 1:
        return [("Attempt", f"{prepared.attempt}; the steps that earlier ones began are counted in epsilon")]
    return []


def promise_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What is promised, what it means, and by which mechanism."""
    recipe, mechanism, promise = prepared.recipe, prepared.mechanism, prepared.promise
    sampling = f"{mechanism.steps:,} updates, Poisson q = {mechanism.sampling_prob:.4g}"
    if mechanism.truncated_batch_size is not None:
        sampling += f" cut at {mechanism.truncated_batch_size:,} images"
    if promise is None:
        return [
            ("Promise", "NONE. --no_privacy: the images may be read off the adapter; it is not exported"),
            ("Mechanism", f"{sampling}, no noise, {recipe.privacy.clipping} clipping at {mechanism.max_grad_norm:g}"),
        ]
    relation = mechanism.neighboring_relation
    odds = accounting.max_tpr_at_fpr(promise.event, relation, 0.01)
    group = mechanism.max_examples_per_group
    unit = "one image" if group == 1 else f"one {recipe.data.group_column} (at most {group} images)"
    difference = {
        "zero_out": "replaced by nothing",
        "add_or_remove_one": "there or not",
        "replace_one": "replaced by another",
    }[relation]
    lines = [
        (
            "Promise",
            f"epsilon = {promise.epsilon:g}, delta = {promise.delta:g}, for {unit} {difference} (priced "
            f"{promise.priced:.4f})",
        ),
        (
            "Means",
            f"who may be wrong about 1 % of other images recognises at most {100 * odds:.1f} % of the training images",
        ),
        (
            "Mechanism",
            f"{sampling}, noise multiplier {mechanism.noise_multiplier:g}, "
            f"{recipe.privacy.clipping} clipping at {mechanism.max_grad_norm:g}, PLD accountant",
        ),
    ]
    if promise.tuning_runs is not None:
        lines.append(("Tuning", f"epsilon is for {promise.tuning_runs:,} such runs in all"))
    if promise.unpaid_runs is not None:
        lines.append(
            ("Tuning", f"epsilon is NOT for {promise.unpaid_runs:,} earlier runs, which the certificate tells")
        )
    for release in promise.prior:
        updates = f"{release.runs} times {release.mechanism.steps:,} updates"
        lines.append(("Before", f"{updates}, counted in epsilon: {release.source}"))
    return lines


def training_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What trains, on what, at what cost, and what will be written."""
    recipe, clipper, train = prepared.recipe, prepared.clipper, prepared.recipe.train
    total = sum(p.numel() for p in prepared.adapter.unet.parameters())
    trainable = sum(p.numel() for p in prepared.adapter.trainable.values())
    modules, trains_all = prepared.adapter.adapted_modules, prepared.adapter.config is None
    names = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    minutes = prepared.mechanism.steps * prepared.minutes_per_step
    image_bytes = cached_bytes(prepared)
    classes, known_n = recipe.data.class_names, prepared.mechanism.num_examples  # None where N is private
    public = [] if known_n is None else [f"N = {known_n:,}"]
    held = f"{image_bytes:,} bytes an image" if known_n is None else f"{known_n * image_bytes / 1e9:.2f} GB"
    public += [f"{prepared.base.resolution}x{prepared.base.resolution} pixels"]
    public += [f"{len(classes)} class names ({', '.join(classes[:10])})"] if classes else []
    if prepared.base.text is not None and recipe.data.caption_column is None:
        public += [f"the prompt {recipe.data.prompt_template!r}"]
    if recipe.data.caption_column is not None:
        public += [f"that captions come from {recipe.data.caption_column!r}; the captions themselves are private"]
    public += ["class names declare themselves public by being folder or label names"] if classes else []
    return [
        (
            "Base",
            f"{recipe.model.pretrained_model_name_or_path}, {'all of it trains' if trains_all else 'frozen'}",
        ),
        ("Images", images_fact(recipe.data, known_n)),
        (
            "Adapter",
            f"{recipe.adapter.kind} on {names}: {trainable:,} trainable of {total:,}; {clipper.describe()}",
        ),
        ("Public", "; ".join(public)),
        *[("Note", note) for note in prepared.notes],
        (
            "Memory",
            f"{prepared.activation_bytes / 1e9:.2f} GB of activations for a micro-batch of {train.micro_batch_size}, "
            f"and about 1 GB for the program; {held} of cached images on disk",
        ),
        (
            "Time",
            f"about {minutes:.1f} min ({prepared.seconds_per_micro_batch:.2f} s for {train.micro_batch_size} images, "
            f"{train.augmentation_multiplicity * train.noise_multiplicity} draws each, on "
            f"{prepared.accelerator.device})",
        ),
        (
            "Writes",
            f"{prepared.run.folder} (to share), {prepared.run.private} (never share; its problems.csv lists images "
            "that could not be read)",
        ),
    ]


def cached_bytes(prepared: "Prepared") -> int:
    """Bytes of one record in the private cache: its pixels, or its latents and the embedding of its caption."""
    base, data = prepared.base, prepared.recipe.data
    if not base.is_latent:
        return base.image_channels * base.resolution**2
    latents = 4 * math.prod(base.input_shape) * (data.augmentation_variants if data.augmentations else 1)
    captions = (
        0 if data.caption_column is None or base.text is None else sum(x.numel() for x in base.text.null.values())
    )
    return latents + 2 * captions


def images_fact(data: Data, known_n: int | None) -> str:
    """What trains; not where it lies on this machine, as output is pasted into reports."""
    name = "local files" if Path(data.dataset_name).expanduser().exists() else data.dataset_name
    count = "as many as there are, which stays private" if known_n is None else f"{known_n:,} rows"
    groups = "" if data.group_column is None else f", at most {data.max_examples_per_group} of each {data.group_column}"
    return f"{name} ({data.split}), {count}{groups}"


def utility_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What to expect of the result, from public quantities only."""
    if prepared.recipe.privacy.no_privacy:
        return []
    if isinstance(sums := prepared.adapter.class_rows, CodeMoments):
        return [("Utility", sums.outlook())]
    mechanism = prepared.mechanism
    d = sum(p.numel() for p in prepared.adapter.trainable.values())
    return [("Utility", planning.outlook(mechanism, d))]


def epsilon_so_far(prepared: "Prepared") -> list[float | None]:
    """Epsilon after each step, never below the true price; information only (invariant 16)."""
    steps, promise = prepared.mechanism.steps, prepared.promise
    if promise is None:
        return [None] * steps
    priced = sorted({math.ceil(steps * k / PRICED_STEPS) for k in range(1, PRICED_STEPS + 1)})
    price, relation = {}, promise.mechanism.neighboring_relation
    for t in priced:
        event = composed_event(dataclasses.replace(promise.mechanism, steps=t), promise.tuning_runs, promise.prior)
        coarse = accounting.epsilon(event, promise.delta, relation, smallest_interval=1e-3)
        price[t] = min(coarse, promise.epsilon)
    return [price[min(t for t in priced if t > step)] for step in range(steps)]
