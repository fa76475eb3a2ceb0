"""`dp-peft export`."""

from pathlib import Path

import click

from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.errors import UserError


@click.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "style", required=True, type=click.Choice(["kohya"]), help="kohya: for web UIs.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="[FOLDER.kohya.safetensors]")
def export_command(folder: Path, style: str, output: Path | None) -> None:
    """Write an adapter in the format of another tool.

    kohya is one file, which web UIs such as AUTOMATIC1111's and ComfyUI read: for LoRA on Stable Diffusion 1, 2 and XL.
    diffusers and peft need no export: they load the folder as it is.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that `dp-peft train` wrote.")

    from dp_peft_diffusion.sharing.promises import warnings_of
    from dp_peft_diffusion.sharing.stock_files import write_kohya

    written = write_kohya(folder, output)
    for warning in warnings_of([folder]):
        hint(f"warning: {warning}")
    bases = "of an unusual base" if written.family is None else f"for {written.family}"
    click.echo(f"{written.path}: LoRA on {written.layers} layers, {bases}. Put it where your program keeps its LoRAs.")
