"""`dp-peft plan`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_peft_diffusion.cli.options import format_option, given_options, recipe_options
from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.privacy.question import Question

if TYPE_CHECKING:
    from dp_peft_diffusion.privacy.promise import Promise

KNEE_MARK = "  <- knee"
KNEE_MEANS = (
    "knee: the smallest batch of the table whose noise per step is at most 10 % above that of a full batch; a larger "
    "one takes longer and hardly learns more."
)


@click.command()
@recipe_options(Question())
@click.option("--trainable_parameters", type=click.IntRange(min=1), help="Of the adapter: adds what to expect.")
@click.option("--cross_check", is_flag=True, help="Price every line by the PRV accountant of Opacus too (slow).")
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path),
    help="Draw delta against epsilon, and noise against batch size, here.",
)
@format_option
@click.pass_context
def plan(
    ctx: click.Context,
    trainable_parameters: int | None,
    cross_check: bool,
    output_dir: Path | None,
    style: str,
    **_: Any,
) -> None:
    """Show what a promise costs, before you train.

    One line for each batch size and number of updates: the noise multiplier that keeps epsilon, the epsilon that a
    noise multiplier keeps, or, given both, the most updates; and the noise on one coordinate of an update, in units of
    the clip bound.
    """
    names = {spec.name for spec in fields(Question)}
    question = Question(**{name: value for name, value in given_options(ctx).items() if name in names})

    from dp_peft_diffusion.privacy import planning

    found: list[Promise] = []
    rows: list[dict[str, Any]] = []
    for promise, knee in planning.answers_with_knee(question):
        row = facts_of(promise, knee, trainable_parameters, cross_check)
        if style == "human":  # a row takes seconds: show each when it is there
            click.echo(table_line(row, heading=not found))
        found.append(promise)
        rows.append(row)
    outlook = None
    if trainable_parameters is not None:
        best = max(found, key=lambda promise: planning.signal_to_noise(promise.mechanism, trainable_parameters))
        outlook = planning.outlook(best.mechanism, trainable_parameters)
    if style == "json":
        asked = {"num_examples": question.num_examples, "delta": question.delta}
        asked["trainable_parameters"] = trainable_parameters
        click.echo(json.dumps({**asked, "rows": rows, "outlook": outlook}, indent=2))
    else:
        print_notes(rows, found)
        if outlook is None:
            hint("Add --trainable_parameters to see what to expect of the result.")
        else:
            size, steps = best.mechanism.expected_batch_size, best.mechanism.steps
            click.echo(f"\nBest of these: batch {size:g}, {steps} steps. {outlook}")
    if output_dir is not None:
        from dp_peft_diffusion.cli.figures import draw_plan

        for path in draw_plan(question, found, output_dir):
            hint(f"Drawn: {path}")


def facts_of(promise: Promise, knee: bool, trainable_parameters: int | None, cross_check: bool) -> dict[str, Any]:
    """One line of the table, by name."""
    from dp_peft_diffusion.privacy import planning
    from dp_peft_diffusion.privacy.selection import selection_epsilons

    mechanism = promise.mechanism
    row: dict[str, Any] = {
        "train_batch_size": mechanism.expected_batch_size,
        "max_train_steps": mechanism.steps,
        "epsilon": promise.epsilon,
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_per_step": planning.noise_per_step(mechanism),
        "passes": mechanism.steps * mechanism.sampling_prob,
        "knee": knee,
        "epsilon_if_selected": selection_epsilons(promise),
    }
    if trainable_parameters is not None:
        row["signal_to_noise"] = planning.signal_to_noise(mechanism, trainable_parameters)
    if cross_check:
        from dp_peft_diffusion.privacy.cross_check import cross_check as checked

        row["cross_check"] = checked(promise)
    return row


def print_notes(rows: list[dict[str, Any]], found: list[Promise]) -> None:
    """What the table's numbers mean, below it."""
    from dp_peft_diffusion.privacy.selection import CONDITIONS

    if any(row["knee"] for row in rows):
        click.echo(f"\n{KNEE_MEANS}")
    for row, promise in zip(rows, found, strict=True):
        where = f"batch {row['train_batch_size']:,}, {row['max_train_steps']:,} updates"
        if "cross_check" in row:
            click.echo(f"\n{where}: {row['cross_check']}")
        if row["epsilon_if_selected"] is not None:
            prices = " or ".join(f"{epsilon:g} ({name})" for name, epsilon in row["epsilon_if_selected"].items())
            click.echo(
                f"\n{where}: epsilon {row['epsilon']:g} pays for {promise.tuning_runs} runs, whatever is done with "
                f"them. Were their number random with that mean, epsilon would be {prices}, {CONDITIONS}."
            )


def table_line(row: dict[str, Any], heading: bool) -> str:
    """One row for people, with the heading above the first."""
    titles = ["batch", "steps", "epsilon", "noise multiplier", "noise per step", "passes over data"]
    cells = [
        f"{row['train_batch_size']:,}",
        f"{row['max_train_steps']:,}",
        f"{row['epsilon']:g}",
        f"{row['noise_multiplier']:g}",
        f"{row['noise_per_step']:.2e}",
        f"{row['passes']:.1f}",
    ]
    if "signal_to_noise" in row:
        titles.append("signal to noise")
        cells.append(f"{row['signal_to_noise']:.2g}")
    widths = [max(9, len(title)) for title in titles]
    lines = [titles, cells] if heading else [cells]
    text = "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return text + (KNEE_MARK if row["knee"] else "")
