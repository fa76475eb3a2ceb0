"""`dp-peft merge`."""

from __future__ import annotations

from pathlib import Path

import click

from dp_peft_diffusion.cli.adapters import (
    adapter_options,
    announce_base,
    check_weights,
    local_folders,
    warnings_as_hints,
)
from dp_peft_diffusion.cli.program import command_line, hint


@click.command()
@adapter_options
@click.option("--output_dir", required=True, type=click.Path(path_type=Path), help="Where the merged model goes.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the merged weights are kept as.",
)
def merge(
    adapters: tuple[str, ...], weights: tuple[float, ...], base: str | None, output_dir: Path, dtype: str
) -> None:
    """Write a base with adapters merged into it.

    The folder is complete: stock diffusers opens it with from_pretrained, and dp-peft train as a base. The sum of
    weight times change over the adapters is added to the base's weights, in float32.
    """
    shares = check_weights(adapters, weights)
    places = local_folders(adapters)

    import torch

    from dp_peft_diffusion.sharing.merged_folder import write_merged
    from dp_peft_diffusion.sharing.promises import warnings_of

    announce_base(places, base)
    with warnings_as_hints():
        opened = write_merged(output_dir, places, shares, base, getattr(torch, dtype))
    for warning in warnings_of(places):
        hint(f"warning: {warning}")
    click.echo(f"merged: {output_dir}")
    hint(f"In Python:\n  {opened.replace('FOLDER', str(output_dir))}")
    hint(f"As a base:\n  {command_line('train', '--pretrained_model_name_or_path', output_dir)}")
