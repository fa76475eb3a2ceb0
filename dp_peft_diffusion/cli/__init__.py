"""The command line: commands parse and print, and import what is heavy only when they run."""

import click

from dp_peft_diffusion.cli.benchmark import bench
from dp_peft_diffusion.cli.certificates import inspect_folder, verify
from dp_peft_diffusion.cli.evaluation import evaluate
from dp_peft_diffusion.cli.exporting import export_command
from dp_peft_diffusion.cli.hub import pull, push
from dp_peft_diffusion.cli.images import sample
from dp_peft_diffusion.cli.machine import env
from dp_peft_diffusion.cli.merging import merge
from dp_peft_diffusion.cli.planning import plan
from dp_peft_diffusion.cli.pretraining import pretrain
from dp_peft_diffusion.cli.program import Program
from dp_peft_diffusion.cli.recipes import recipes
from dp_peft_diffusion.cli.spending import spent
from dp_peft_diffusion.cli.training import train
from dp_peft_diffusion.environment import installed

# A hyphen is an underscore everywhere: --max-train-steps is --max_train_steps.
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "max_content_width": 110,
}


def print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """The callback of --version; a checkout that is not installed has none."""
    if asked:
        click.echo(f"dp-peft {installed('dp-peft-diffusion') or '(not installed)'}")
        ctx.exit()


@click.group(cls=Program, context_settings=SETTINGS)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print the version."
)
def main() -> None:
    """Type dp-peft train --adapter lora --epsilon 1 for a first private adapter."""


_MAKE = (train, recipes, sample, evaluate)
_SHARE = (verify, inspect_folder, merge, export_command, push, pull)
_PLAN = (plan, spent, pretrain, bench, env)
for _command in (*_MAKE, *_SHARE, *_PLAN):
    main.add_command(_command)
