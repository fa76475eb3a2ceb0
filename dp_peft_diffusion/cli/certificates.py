"""`dp-peft verify` and `dp-peft inspect`: read a folder that somebody handed over."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.cli.program import printable
from dp_peft_diffusion.errors import PrivacyError, UserError

if TYPE_CHECKING:
    from dp_peft_diffusion.privacy.certificate import VerifyReport

_folder = click.argument("folder", type=click.Path(path_type=Path))


@click.command()
@_folder
@click.option("--base", metavar="FOLDER", type=click.Path(path_type=Path), help="Folder of the base: does it fit?")
@click.option("--cross_check", is_flag=True, help="Price once more by the PRV accountant of Opacus (slow).")
@click.option("--escrow_key", metavar="FILE", type=click.Path(path_type=Path), help="Train again with this key.")
@click.option("--dataset_name", help="The private images, which --escrow_key needs.")
@format_option
def verify(
    folder: Path, base: Path | None, cross_check: bool, escrow_key: Path | None, dataset_name: str | None, style: str
) -> None:
    """Check the files and the promise of a folder.

    Says also what no check can prove. With the key that was escrowed and the images, training is repeated, and the
    weights must come out bit for bit. Exit code 0: all checks passed. 3: one did not.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder that `dp-peft train` wrote.")
    if (escrow_key is None) != (dataset_name is None):
        raise UserError("--escrow_key FILE and --dataset_name IMAGES go together: a replay needs both.")
    delete_left_over_key(folder)

    from dp_peft_diffusion.privacy.certificate import CANNOT_PROVE, verify

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a replay takes its files with it
    report = verify(folder, base, cross_check)
    if escrow_key is not None and dataset_name is not None and report.ok:
        report = replayed(report, folder, escrow_key, dataset_name, base)
    levels = [{"name": name, "ok": ok, "text": text} for name, ok, text in report.levels]
    if style == "json":
        facts = {"ok": report.ok, "epsilon": report.epsilon, "levels": levels, "cannot_prove": list(CANNOT_PROVE)}
        click.echo(json.dumps(facts, indent=2))
    else:
        yes, no = marks()
        for name, ok, text in report.levels:
            click.echo(f"{yes if ok else no} {name:<12} {printable(text)}")
        if report.ok:
            click.echo(f"The files are consistent with a promise of epsilon {report.epsilon:g}.")
        click.echo("No check of files can prove:")
        for claim in CANNOT_PROVE:
            click.echo(f"  - {claim}")
    if not report.ok:
        failed = ", ".join(name for name, ok, _ in report.levels if not ok)
        raise PrivacyError(f"{folder} does not keep what it claims ({failed}). Do not rely on it; ask for it again.")


def replayed(
    report: "VerifyReport", folder: Path, escrow_key: Path, dataset_name: str, base: Path | None
) -> "VerifyReport":
    """The report with one level more: whether training again gives the certified weights."""
    from dp_peft_diffusion.replay import replay

    try:
        level = ("replay", True, replay(folder, escrow_key, dataset_name, None if base is None else str(base)))
    except PrivacyError as error:
        level = ("replay", False, str(error))
    return dataclasses.replace(report, ok=report.ok and level[1], levels=(*report.levels, level))


def delete_left_over_key(folder: Path) -> None:
    """Of a run of this user that was published and stopped just before it deleted its key."""
    folder = folder.resolve()
    private = folder.with_name(f"{folder.name}.private") if folder.name else folder
    with contextlib.suppress(OSError):  # somebody else's run is theirs to close
        own = not private.is_symlink() and private.stat().st_uid == os.getuid()
        if own and (private / "key").is_file():
            from dp_peft_diffusion.runs.folder import RunFolder

            RunFolder(folder).finish_closing()


@click.command("inspect")
@_folder
@format_option
def inspect_folder(folder: Path, style: str) -> None:
    """Print all that a folder says.

    Every file, every byte of metadata, the shape of each tensor, the size of the change, and the certificate.
    """
    from dp_peft_diffusion.cli.inspection import inspect_files

    facts = inspect_files(folder)
    click.echo(json.dumps(facts, indent=2) if style == "json" else "\n".join(inspection_lines(facts)))


def inspection_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `inspect_files` for people. Strings of the files are shown as JSON, so none can steer a terminal."""
    lines = [f"files in {facts['folder']}"]
    lines += [f"  {size:>12,} bytes  {json.dumps(name)}" for name, size in facts["files"].items()]
    for name, weights in facts["safetensors"].items():
        lines += ["", f"{json.dumps(name)}: metadata", f"  {json.dumps(weights['metadata'])}", "tensors"]
        for tensor, about in weights["tensors"].items():
            norm = "not read" if about["norm"] is None else f"{about['norm']:.4g}"
            lines.append(f"  {about['dtype']} {str(about['shape']):<18} norm {norm:<10} {json.dumps(tensor)}")
        if weights["changes"]:
            total = sum(value**2 for value in weights["changes"].values()) ** 0.5
            lines.append(f"change of the base's weights, norm of scale * B @ A: {total:.4g} in all")
            lines += [f"  {value:<10.4g} {json.dumps(module)}" for module, value in weights["changes"].items()]
    for name in ("adapter_config.json", "privacy.json"):
        said = "there is none" if facts[name] is None else json.dumps(facts[name], indent=2)
        lines += ["", f"{name}: {said}"]
    return lines


def marks() -> tuple[str, str]:
    """A check mark and a cross, or words where the terminal cannot show them."""
    try:
        "✓✗".encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return "ok    ", "FAILED"
    return "✓", "✗"
