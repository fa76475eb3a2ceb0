"""`dp-peft plan`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dp_peft_diffusion.cli.options import FieldValue, format_option
from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.errors import UserError

if TYPE_CHECKING:
    from dp_peft_diffusion.privacy.mechanism import DPMechanism

BATCHES = (64, 256, 1024, 4096, 16384)
_COUNTS = FieldValue(tuple[int, ...])


@click.command()
@click.option("--num_examples", required=True, type=click.IntRange(min=1), help="Images in the data set, N.")
@click.option("--epsilon", "--target_epsilon", "epsilon", type=float, help="Promise of the whole run.")
@click.option("--delta", "--target_delta", "delta", default=1e-5, show_default=True, help="Must be below 1/N.")
@click.option("--noise_multiplier", type=float, help="In place of epsilon: what does this much noise promise?")
@click.option(
    "--train_batch_size",
    "--expected_batch_size",
    "batches",
    metavar="A,B,...",
    type=_COUNTS,
    help="Expected batch sizes.  [three that suit N]",
)
@click.option(
    "--max_train_steps",
    "steps",
    metavar="A,B,...",
    type=_COUNTS,
    default="100,1000",
    show_default=True,
    help="Updates.",
)
@click.option("--trainable_parameters", type=click.IntRange(min=1), help="Of the adapter: adds what to expect.")
@format_option
def plan(
    num_examples: int,
    epsilon: float | None,
    delta: float,
    noise_multiplier: float | None,
    batches: tuple[int, ...] | None,
    steps: tuple[int, ...],
    trainable_parameters: int | None,
    style: str,
) -> None:
    """Show what a promise costs, before you train.

    One line for each batch size and number of updates: the noise multiplier that keeps epsilon (or the epsilon that a
    noise multiplier keeps), and the noise on one coordinate of an update, in units of the clip bound.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise UserError("give either --epsilon or --noise_multiplier. Type for example --epsilon 1.")

    from dp_peft_diffusion.privacy import planning

    found: list[tuple[DPMechanism, dict[str, Any]]] = []
    for mechanism, price in priced(num_examples, epsilon, delta, noise_multiplier, batches, steps):
        row = {
            "train_batch_size": mechanism.expected_batch_size,
            "max_train_steps": mechanism.steps,
            "epsilon": price,
            "noise_multiplier": mechanism.noise_multiplier,
            "noise_per_step": planning.noise_per_step(mechanism),
            "passes": mechanism.steps * mechanism.sampling_prob,
        }
        if trainable_parameters is not None:
            row["signal_to_noise"] = planning.signal_to_noise(mechanism, trainable_parameters)
        if style == "human":  # a row takes seconds: show each when it is there
            click.echo(table_line(row, heading=not found))
        found.append((mechanism, row))
    outlook = None
    if trainable_parameters is not None:
        best = max(found, key=lambda pair: pair[1]["signal_to_noise"])[0]
        outlook = planning.outlook(best, trainable_parameters)
    if style == "json":
        facts = {"num_examples": num_examples, "delta": delta, "trainable_parameters": trainable_parameters}
        click.echo(json.dumps({**facts, "rows": [row for _, row in found], "outlook": outlook}, indent=2))
    elif outlook is not None:
        click.echo(f"\nBest of these: batch {best.expected_batch_size:g}, {best.steps} steps. {outlook}")
    else:
        hint("Add --trainable_parameters to see what to expect of the result.")


def priced(
    num_examples: int,
    epsilon: float | None,
    delta: float,
    noise_multiplier: float | None,
    batches: tuple[int, ...] | None,
    steps: tuple[int, ...],
) -> Iterator[tuple[DPMechanism, float]]:
    """Every mechanism of the table with its epsilon: the promise, or the price rounded up."""
    from dp_peft_diffusion.privacy import accounting, planning
    from dp_peft_diffusion.privacy.mechanism import DPMechanism

    fitting = [batch for batch in BATCHES if 4 * batch <= num_examples][-2:]
    batches = batches or (*fitting, max(1, num_examples // 2))
    for batch in batches:
        if not 1 <= batch <= num_examples:
            raise UserError(f"--train_batch_size {batch} is not between 1 and --num_examples {num_examples}.")
    if epsilon is not None:
        for row in planning.plan_rows(num_examples, epsilon, delta, batches, steps):
            yield row.mechanism, epsilon
        return
    for batch, count in itertools.product(batches, steps):
        mechanism = DPMechanism(
            sampling_prob=batch / num_examples,
            steps=count,
            noise_multiplier=noise_multiplier,
            expected_batch_size=batch,
            num_examples=num_examples,
        )
        yield mechanism, accounting.round_up(mechanism.epsilon(delta))


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
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
