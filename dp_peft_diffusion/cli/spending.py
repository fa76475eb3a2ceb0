"""`dp-peft spent`: what data sets have given away, from this user's ledgers."""

import json
import math
from typing import Any

import click

from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.recipe import Data

SHOWN = 12  # hex digits of a data set's name


@click.command()
@click.option("--dataset_name", help="A data set, as `dp-peft train` takes it.  [all in the ledgers]")
@click.option("--dataset_config_name", help="Configuration of a Hub data set.")
@click.option("--split", default="train", show_default=True, help="Split of the data set.")
@click.option("--image_column", default="image", show_default=True, help="Column of the images.")
@click.option("--delta", default=1e-5, show_default=True, help="Of the joint price.")
@format_option
def spent(delta: float, style: str, dataset_name: str | None, **where: Any) -> None:
    """Show what a data set has given away, all runs together.

    Every run of this user on this machine counts with all planned steps, also when it was stopped or its folder
    removed; an attempt that was given up counts with the steps it began. Other machines, copies of the images with
    other bytes, and parts of the data set are other data sets to these ledgers.
    """
    from dp_peft_diffusion.privacy import spending

    names = spending.known_data_sets()
    if dataset_name is not None:
        from dp_peft_diffusion.diffusion.datasets import source_digest

        names = [spending.data_set_id(source_digest(Data(dataset_name=dataset_name, label_column=None, **where)))]
    ledgers = {name: spending.spendings(name) for name in names}
    facts = [
        {
            "data_set": name,
            "attempts": [
                {"folder": e.folder, "attempt": e.attempt, "began": e.time, "steps": e.steps} for e in entries
            ],
            "spent": [
                {**price._asdict(), "delta": delta, "epsilon": price.epsilon if math.isfinite(price.epsilon) else None}
                for price in spending.spent(entries, delta)
            ],
        }
        for name, entries in ledgers.items()
    ]
    if style == "json":
        click.echo(json.dumps(facts, indent=2))
        return
    for fact in facts:
        click.echo(spent_text(fact))
    if not any(ledgers.values()):
        click.echo("Nothing was spent, as far as these ledgers know.")
    hint(f"The ledgers lie in {spending.spending_folder()}.")


def spent_text(fact: dict[str, Any]) -> str:
    """One data set for people."""
    lines = [f"data set {fact['data_set'][:SHOWN]}"]
    for entry in fact["attempts"]:
        attempt = f", attempt {entry['attempt']}" if entry["attempt"] > 1 else ""
        lines.append(f"  {entry['began']}  {entry['folder']}{attempt}: {entry['steps']:,} steps")
    for price in fact["spent"]:
        group = f"one {price['group_column'] or 'group'} ({price['max_examples_per_group']} images)"
        unit = "one image" if price["max_examples_per_group"] == 1 else group
        epsilon = "above 100" if price["epsilon"] is None else f"{price['epsilon']:g}"
        lines.append(
            f"  all {price['attempts']} together: epsilon {epsilon} at delta {price['delta']:g}, for {unit} "
            f"({price['neighboring_relation']})"
        )
    return "\n".join(lines)
