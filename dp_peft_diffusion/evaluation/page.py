"""evaluation.html: what was measured, as one page that carries its pictures and loads nothing."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from dp_peft_diffusion.evaluation.summary import Table

TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = {
    "learning_curve.png": "Accuracy against the number of synthetic images. Dotted: trained on real images.",
    "classes.png": "Accuracy of each class.",
    "tuning.png": "Settings of a classifier: what synthetic images say of them, and what real ones say.",
}


def render_page(result: dict[str, Any], tables: list[Table], plots: dict[str, bytes]) -> str:
    """The page of an evaluation.

    result: what evaluation.json holds. plots: file name -> PNG.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # class names are what somebody typed
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [
        (CAPTIONS[name], f"data:image/png;base64,{base64.b64encode(plots[name]).decode()}")
        for name in CAPTIONS
        if name in plots
    ]
    return environment.get_template("evaluation.html").render(result=result, tables=tables, pictures=pictures)
