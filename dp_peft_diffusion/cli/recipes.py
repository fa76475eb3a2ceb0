"""`dp-peft recipes`."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click

from dp_peft_diffusion.cli.options import format_option
from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.recipe import PATH_TO_BASE, recipe_path
from dp_peft_diffusion.strict_yaml import read_table

TITLES = {
    "train": "Private runs: dp-peft train --recipe NAME",
    "pretrain": "Public bases, without privacy: dp-peft pretrain --recipe NAME",
}
COLUMNS = ("name", "what", "base", "data", "epsilon", "status")


@click.command()
@click.argument("name", required=False)
@format_option
def recipes(name: str | None, style: str) -> None:
    """List the recipes, or print the one called NAME.

    The head of a recipe says where its numbers come from, whether it was ever run, and what it costs.
    """
    if name is not None:
        path = recipe_path(name)
        facts = facts_of(path) | {"recipe": read_table(path)}
        click.echo(json.dumps(facts, indent=2) if style == "json" else path.read_text(encoding="utf-8").rstrip())
        return
    rows = [facts_of(path) for path in sorted(recipe_path("digits").parent.glob("*.yaml"), key=lambda path: path.stem)]
    if style == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    for command, title in TITLES.items():
        lines = table([row for row in rows if row["command"] == command])
        click.echo("\n".join([title, "", *lines, ""]))
    hint("Print one with dp-peft recipes NAME. A base or data set called `yours` is given on the command line.")


def facts_of(path: Path) -> dict[str, Any]:
    """One recipe, by column: from its table, and from the comments at its head.

    The base of a recipe that leaves it to the command line is the pretraining recipe its head names. What pretrains
    has neither base nor epsilon; `status` and `cost` are None where the head does not say.
    """
    text, table = path.read_text(encoding="utf-8"), read_table(path)
    words = shlex.split(text.partition("\n")[0])[2:]  # after "# dp-peft"
    base = table.get("model", {}).get("pretrained_model_name_or_path")
    if base == PATH_TO_BASE:
        made = re.search(r"^# dp-peft pretrain --recipe (\S+)", text, re.MULTILINE)
        base = made[1] if made else "yours"
    what = re.search(r"^#\n# ((?:.|\n)+?)\.\s", text, re.MULTILINE)
    return {
        "name": path.stem,
        "command": words[0],
        "what": _one_line(what[1]) if what else None,
        "base": base,
        "data": said(text, "Data") or "yours",
        "epsilon": table.get("privacy", {}).get("epsilon"),
        "status": said(text, "Status"),
        "cost": said(text, "Cost"),
    }


def said(text: str, label: str) -> str | None:
    """What the head of a recipe says after `# Label:`; further lines of it are indented."""
    found = re.search(rf"^# {label}: (.+(?:\n#   .+)*)", text, re.MULTILINE)
    return _one_line(found[1]) if found else None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A heading and one line for each recipe, for people; what is said in words is cut after its first words."""
    first = [{key: re.split("[,;:] ", str(row[key]))[0] if row[key] else "-" for key in COLUMNS} for row in rows]
    lines = [{key: key for key in COLUMNS}, *first]
    widths = {key: max(len(line[key]) for line in lines) for key in COLUMNS}
    return ["  ".join(line[key].ljust(widths[key]) for key in COLUMNS).rstrip() for line in lines]


def _one_line(comment: str) -> str:
    return re.sub(r"\n#\s+", " ", comment)
