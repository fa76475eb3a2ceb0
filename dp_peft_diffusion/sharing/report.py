"""report.html: promise and run as one page for everybody, which carries its pictures and loads nothing."""

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jinja2

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.environment import installed
from dp_peft_diffusion.privacy.certificate import CANNOT_PROVE
from dp_peft_diffusion.recipe import Recipe
from dp_peft_diffusion.sharing.card import TEMPLATES, facts, one_line, said, sample_arguments, train_arguments, warnings
from dp_peft_diffusion.sharing.charts import HEIGHT, WIDTH, profile_chart, spending_chart
from dp_peft_diffusion.sharing.pictures import COLUMNS, strip

NAMES = 20  # class names or prompts that are listed
MADE_WITH = ("dp-peft-diffusion", "torch", "diffusers", "peft")


def render_report(folder: Path, certificate: dict[str, Any], recipe: Recipe, trained_on: BaseModel) -> str:
    """report.html of a shareable folder, from its certificate, recipe, metrics.jsonl and samples/."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # class names, prompts and names of columns are what somebody typed
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    guarantee, public = certificate["guarantee"], certificate["public_inputs"]
    epsilon, spent = guarantee["epsilon"], spent_so_far(folder)
    return environment.get_template("report.html").render(
        certificate=certificate,
        guarantee=guarantee,
        mechanism=certificate["mechanism"],
        public={name.replace("_", " "): listed(value) for name, value in public.items() if value is not None},
        what="whole model" if recipe.adapter.kind == "full" else f"{recipe.adapter.kind} adapter",
        words=words(certificate),
        warnings=warnings(certificate),
        recognised=of_100(guarantee["max_tpr_at_fpr"]["0.01"]),
        right_guesses=right_guesses(guarantee["mu_gdp"]),
        factor=math.exp(epsilon),
        odds=[(float(rate), most) for rate, most in guarantee["max_tpr_at_fpr"].items()],
        spending=spending_chart(spent, epsilon) if spent else None,
        profile=profile_chart(guarantee["profile"], epsilon, guarantee["delta"]),
        chart_size=(WIDTH, HEIGHT),
        strip=strip(folder / "samples", public["resolution"]),
        columns=columns_told(recipe),
        facts=facts(certificate, recipe) + more_facts(certificate),
        declared={level: said(level, certificate) for level in ("tuning", "releases")},
        cannot_prove=CANNOT_PROVE,
        sample_arguments=sample_arguments(recipe, trained_on),
        train_arguments=train_arguments(certificate, recipe),
    )


def words(certificate: dict[str, Any]) -> dict[str, str]:
    """What the promise is for, one and many, and what stands in its place in the data set to compare with."""
    one = "image" if certificate["mechanism"]["max_examples_per_group"] == 1 else "group"
    unit = {"one": one, "many": f"{one}s"}
    if certificate["neighboring_relation"] == "replace_one":
        return {**unit, "unused": "replaced by another", "instead": "another in its place", "nothing": "another"}
    return {**unit, "unused": "not used", "instead": "without it", "nothing": "none"}


def of_100(share: float) -> int:
    """How many of 100, rounded up. Shares have 4 digits; the product has more: 100 * 0.07 is above 7."""
    return math.ceil(round(100 * share, 6))


def right_guesses(mu: float) -> int:
    """Of 100 guesses whether an image was used, which a coin decided: how many are right at most, rounded up.

    (1 + delta(0)) / 2, and delta(0) of mu-GDP is 2 Phi(mu / 2) - 1 (arXiv 1905.02383, Corollary 1).
    """
    return math.ceil(100 * NormalDist().cdf(mu / 2))


def spent_so_far(folder: Path) -> list[tuple[int, float]]:
    """(step, epsilon) of the lines of metrics.jsonl that have one."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["epsilon"]) for line in lines if line["epsilon"] is not None]


def columns_told(recipe: Recipe) -> str:
    """What the columns of the grids stand for, in words; empty where all are alike."""
    data, prompts = recipe.data, recipe.sample.prompts
    if prompts is not None:
        return f"Column by column, the prompts are: {listed(prompts[:COLUMNS])}."
    if data.caption_column is not None or data.class_names is None:
        return ""
    return f"Column by column, the classes are: {listed(data.class_names[:COLUMNS])}."


def listed(value: object) -> str:
    """A value as text; of a long list its beginning."""
    if not isinstance(value, list | tuple):
        return f"{value:,}" if isinstance(value, int) else one_line(str(value))
    more = f" and {len(value) - NAMES:,} more" if len(value) > NAMES else ""
    return one_line(", ".join(value[:NAMES])) + more


def more_facts(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    """What the card leaves out: the rest of the mechanism, its price, what is declared of the run."""
    guarantee, mechanism, accounting = certificate["guarantee"], certificate["mechanism"], certificate["accounting"]
    rdp = accounting["epsilon_rdp"]
    optional = {"truncated_batch_size": "records of an update at most", "gamma": "gamma of clipping"}
    return [
        *((name, f"{mechanism[key]:g}") for key, name in optional.items() if mechanism[key] is not None),
        ("noise draws of a record", f"{mechanism['noise_multiplicity']:,}, averaged"),
        ("Gaussian DP", f"mu {guarantee['mu_gdp']:g}, down to delta {guarantee['mu_gdp_smallest_delta']:g}"),
        (
            "price",
            f"epsilon {accounting['epsilon_priced']:g} by privacy loss distributions ({accounting['library']} "
            f"{accounting['version']})" + ("" if rdp is None else f"; {rdp:g} by the looser RDP"),
        ),
        ("key of the noise", said("key", certificate)),
        ("gradients", said("gradients", certificate)),
        ("made with", ", ".join(f"{name} {found}" for name in MADE_WITH if (found := installed(name)))),
    ]
