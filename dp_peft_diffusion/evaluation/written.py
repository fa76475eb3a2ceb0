"""The files of an evaluation: JSON, tables, plots, page."""

import json
from pathlib import Path
from typing import Any

from dp_peft_diffusion.durable import write_durably
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.measurements import make_private
from dp_peft_diffusion.evaluation.page import CAPTIONS, render_page
from dp_peft_diffusion.evaluation.plots import plots
from dp_peft_diffusion.evaluation.summary import Table

JSON_FILE, TABLES_FILE, PAGE_FILE = "evaluation.json", "evaluation.md", "evaluation.html"


def write_evaluation(folder: Path, result: dict[str, Any], tables: list[Table]) -> None:
    """Write evaluation.json, evaluation.md, evaluation.html and the plots. What lay there of an earlier one goes.

    Raises:
        PrivacyError: the numbers are of private images, and the folder is not a private one.
        OSError: the folder cannot be written.
    """
    public = result["declared_public"]
    make_output(folder, public)
    drawn = plots(result)
    files = {
        JSON_FILE: json.dumps(result, indent=2).encode() + b"\n",
        TABLES_FILE: markdown(result, tables).encode(),
        PAGE_FILE: render_page(result, tables, drawn).encode(),
        **drawn,
    }
    for name, content in files.items():
        write_durably(folder / name, content, 0o644 if public else 0o600)
    for name in set(CAPTIONS) - set(drawn):
        (folder / name).unlink(missing_ok=True)


def make_output(folder: Path, public: bool) -> None:
    """Make the folder, if it is not there: before what is long to compute, or spends epsilon.

    Raises:
        UserError: it cannot be made.
        PrivacyError: the numbers are of private images, and the folder is not a private one.
    """
    try:
        if public:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            make_private(folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error.strerror}. Choose another.") from error


def markdown(result: dict[str, Any], tables: list[Table]) -> str:
    """evaluation.md."""
    statement = f"{result['statement']}\n\n" if "statement" in result else ""
    return f"# Evaluation\n\n{statement}" + "\n".join(table.markdown for table in tables)
