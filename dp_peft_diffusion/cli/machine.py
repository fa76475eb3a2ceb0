"""`dp-peft env`."""

import json

import click

from dp_peft_diffusion import environment
from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.errors import RunError


@click.command()
@format_option
def env(style: str) -> None:
    """Print versions, for a bug report.

    Checks also that torch and torchvision are a pair.
    """
    facts = environment.describe()
    pair = facts["pair"]
    if style == "json":
        click.echo(json.dumps(facts, indent=2))
    else:
        for name in ("python", "platform", "cpu_count"):
            click.echo(f"{name:<20} {facts[name]}")
        for name, version in facts["packages"].items():
            click.echo(f"{name:<20} {version or 'not installed'}")
        if pair["ok"]:
            click.echo(f"{'torch + torchvision':<20} a pair, on {pair['device']}")
    if not pair["ok"]:
        raise RunError(f"torch and torchvision do not work together: {pair['error']}. Type: {pair['install']}")
