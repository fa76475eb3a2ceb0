"""What a run will do and cost, told before anything is spent."""

import dataclasses
import math
from typing import TYPE_CHECKING

from dp_peft_diffusion.privacy import accounting, planning
from dp_peft_diffusion.privacy.promise import promised_epsilon

if TYPE_CHECKING:
    from dp_peft_diffusion.preparation import Prepared

PRICED_STEPS = 20  # steps at which the epsilon so far is computed; between them the next one's stands


def plan_text(prepared: "Prepared") -> str:
    """The plan, one line a topic, in words first."""
    lines = promise_lines(prepared) + training_lines(prepared) + utility_lines(prepared)
    width = max(len(topic) for topic, _ in lines)
    return "\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)


def promise_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What is promised, what it means, and by which mechanism."""
    recipe, mechanism = prepared.recipe, prepared.mechanism
    sampling = f"{mechanism.steps:,} updates, Poisson q = {mechanism.sampling_prob:.4g}"
    if recipe.privacy.no_privacy:
        return [
            ("Promise", "NONE. --no_privacy: the images may be read off the adapter; it is not exported"),
            ("Mechanism", f"{sampling}, no noise, {recipe.privacy.clipping} clipping at {mechanism.max_grad_norm:g}"),
        ]
    epsilon, delta = mechanism.epsilon(recipe.privacy.delta), recipe.privacy.delta
    promised = promised_epsilon(mechanism, delta, recipe.privacy.epsilon)
    odds = accounting.max_tpr_at_fpr(mechanism.event, mechanism.neighboring_relation, 0.01)
    return [
        (
            "Promise",
            f"epsilon = {promised:g}, delta = {delta:g}, for one image replaced by nothing (priced {epsilon:.4f})",
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


def training_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What trains, on what, at what cost, and what will be written."""
    recipe, clipper, train = prepared.recipe, prepared.clipper, prepared.recipe.train
    total = sum(p.numel() for p in prepared.adapter.unet.parameters())
    trainable = sum(p.numel() for p in prepared.adapter.trainable.values())
    modules, trains_all = prepared.adapter.adapted_modules, prepared.adapter.config is None
    names = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    minutes = prepared.mechanism.steps * prepared.minutes_per_step
    images_bytes = len(prepared.images) * prepared.base.image_channels * prepared.base.resolution**2
    classes = recipe.data.class_names
    public = [f"N = {len(prepared.images):,}", f"{prepared.base.resolution}x{prepared.base.resolution} pixels"]
    public += [f"{len(classes)} class names ({', '.join(classes[:10])})"] if classes else []
    public += ["class names declare themselves public by being folder or label names"] if classes else []
    return [
        (
            "Base",
            f"{recipe.model.pretrained_model_name_or_path}, {'all of it trains' if trains_all else 'frozen'}",
        ),
        ("Images", f"{recipe.data.dataset_name} ({recipe.data.split}), {len(prepared.images):,} rows"),
        (
            "Adapter",
            f"{recipe.adapter.kind} on {names}: {trainable:,} trainable of {total:,}; {clipper.describe()}",
        ),
        ("Public", "; ".join(public)),
        *[("Note", note) for note in prepared.notes],
        (
            "Memory",
            f"{prepared.activation_bytes / 1e9:.2f} GB of activations for a micro-batch of {train.micro_batch_size}, "
            f"{images_bytes / 1e9:.2f} GB of images, and about 1 GB for the program",
        ),
        (
            "Time",
            f"about {minutes:.1f} min ({prepared.seconds_per_micro_batch:.2f} s for {train.micro_batch_size} images, "
            f"{train.noise_multiplicity} draws each, on {prepared.accelerator.device})",
        ),
        (
            "Writes",
            f"{prepared.run.folder} (to share), {prepared.run.private} (never share; its problems.csv lists images "
            "that could not be read)",
        ),
    ]


def utility_lines(prepared: "Prepared") -> list[tuple[str, str]]:
    """What to expect of the result, from public quantities only."""
    if prepared.recipe.privacy.no_privacy:
        return []
    mechanism = prepared.mechanism
    d = sum(p.numel() for p in prepared.adapter.trainable.values())
    return [("Utility", planning.outlook(mechanism, d))]


def epsilon_so_far(prepared: "Prepared") -> list[float | None]:
    """Epsilon after each step, never below the true price; information only (invariant 16)."""
    mechanism = prepared.mechanism
    if prepared.recipe.privacy.no_privacy:
        return [None] * mechanism.steps
    priced = sorted({math.ceil(mechanism.steps * k / PRICED_STEPS) for k in range(1, PRICED_STEPS + 1)})
    price = {
        t: accounting.epsilon(
            dataclasses.replace(mechanism, steps=t).event, prepared.recipe.privacy.delta, mechanism.neighboring_relation
        )
        for t in priced
    }
    return [price[min(t for t in priced if t > step)] for step in range(mechanism.steps)]
