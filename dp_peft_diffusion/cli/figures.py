"""The pictures of `dp-peft plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dp_peft_diffusion.privacy.promise import Promise
    from dp_peft_diffusion.privacy.question import Question

CURVE_POINTS = 9  # batch sizes on the curve of the noise


def draw_plan(question: Question, promises: list[Promise], folder: Path) -> list[Path]:
    """Write the pictures into `folder`: what each promise means at every delta, and noise per step by batch size."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"delta-by-epsilon.png": profile_figure(promises)}
    if question.num_examples is not None:
        figures["noise-by-batch.png"] = noise_figure(question, promises)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def profile_figure(promises: list[Promise]) -> Figure:
    """Delta against epsilon, one curve a promise, each promise marked."""
    from matplotlib.figure import Figure

    from dp_peft_diffusion.privacy import accounting

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for promise in promises:
        mechanism = promise.mechanism
        epsilons, deltas = accounting.profile(promise.event, mechanism.neighboring_relation)
        label = f"batch {mechanism.expected_batch_size:,}, {mechanism.steps:,} steps"
        (line,) = axes.semilogy(epsilons, deltas, label=f"{label}, noise {mechanism.noise_multiplier:g}")
        axes.plot(promise.epsilon, promise.delta, "o", color=line.get_color())
    axes.set(xlabel="epsilon", ylabel="delta", title="Every (epsilon, delta) that each line of the plan keeps")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def noise_figure(question: Question, promises: list[Promise]) -> Figure:
    """Noise per step against batch size, one curve for each number of steps, the lines of the plan marked."""
    from matplotlib.figure import Figure

    from dp_peft_diffusion.privacy.planning import answers, noise_per_step

    n = question.num_examples or 1
    smallest = min(16, n)
    sizes = {round(smallest * (n / smallest) ** (k / (CURVE_POINTS - 1))) for k in range(CURVE_POINTS)}
    curves: dict[str, list[tuple[float, float]]] = {}
    for promise in answers(dataclasses.replace(question, train_batch_size=tuple(sizes))):
        label = "" if question.epsilon and question.noise_multiplier else f"{promise.mechanism.steps:,} steps"
        point = (promise.mechanism.expected_batch_size, noise_per_step(promise.mechanism))
        curves.setdefault(label, []).append(point)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.loglog(*zip(*points, strict=True), label=label or "as many steps as epsilon allows")
    axes.plot(
        [promise.mechanism.expected_batch_size for promise in promises],
        [noise_per_step(promise.mechanism) for promise in promises],
        "ok",
        label="lines of the plan",
    )
    axes.set(xlabel="batch size", ylabel="noise per step, in clip bounds", title="Noise on one coordinate of an update")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure
