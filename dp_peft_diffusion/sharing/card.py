"""The model card: everything in it is read from the certificate and the recipe."""

from pathlib import Path

import jinja2

from dp_peft_diffusion.diffusion.adapter_kinds import KINDS, rows_alone
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.recipe import Recipe

TEMPLATES = Path(__file__).parent / "templates"


def render_card(certificate: dict, recipe: Recipe, trained_on: BaseModel, last_grid: str) -> str:
    """README.md of a shareable folder, with the front matter the Hub reads.

    last_grid: file name of the grid made after the last step.
    """
    guarantee, mechanism = certificate["guarantee"], certificate["mechanism"]
    base, whole = recipe.model.pretrained_model_name_or_path, recipe.adapter.kind == "full"
    what = "whole model" if whole else f"{recipe.adapter.kind} adapter"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined)
    return environment.get_template("card.md").render(
        certificate=certificate,
        title=f"{what}, epsilon {guarantee['epsilon']:g}",
        whole_model=whole,
        kind=recipe.adapter.kind,
        base_name=base,
        base_arguments=base_arguments(base, trained_on.subfolder),
        unet_class=type(trained_on.unet).__name__,
        sample_arguments=sample_arguments(recipe, trained_on),
        class_rows=recipe.adapter.class_rows and list(recipe.adapter.class_rows),
        class_names=recipe.data.class_names,
        pixel_packing=trained_on.layout.pixel_packing,
        last_grid=last_grid,
        facts=[
            ("base", f"`{base}`, SHA-256 of weights `{certificate['base']['sha256']}`"),
            ("promise", f"epsilon {guarantee['epsilon']:g}, delta {guarantee['delta']:g}"),
            ("unit", certificate["unit"]),
            ("relation", certificate["neighboring_relation"]),
            ("noisy updates", mechanism["count"]),
            ("sampling probability", f"{mechanism['sampling_prob']:.6g}"),
            ("noise multiplier", mechanism["noise_multiplier"]),
            ("clipping", f"{mechanism['clipping']}, bound {mechanism['max_grad_norm']:g}"),
            ("trained", trained_facts(recipe)),
        ],
    )


def sample_arguments(recipe: Recipe, trained_on: BaseModel) -> str:
    """What `dp-peft sample` cannot know from the folder: captions are private, and a local base lies anywhere."""
    base, words = recipe.model.pretrained_model_name_or_path, ""
    if recipe.data.caption_column is not None and recipe.sample.prompts is None:
        words += " --prompt 'a photo of ...'"
    if base.startswith("./") and (recipe.adapter.kind != "full" or trained_on.is_latent):
        words += f" --base PATH/{base.removeprefix('./')}"
    return words


def trained_facts(recipe: Recipe) -> str:
    """What trained, in words."""
    spec = recipe.adapter
    facts = [] if rows_alone(spec) else [KINDS[spec.kind].what.format(rank=spec.rank)]
    if facts and spec.target_modules is not None:
        facts = [f"{spec.kind} of rank {spec.rank} on {', '.join(spec.target_modules)}"]
    if spec.class_rows:
        where = "whole rows" if spec.class_code_rank is None else f"{spec.class_code_rank} public directions"
        facts.append(f"class rows of {len(spec.class_rows)} classes, in {where}")
    return "; ".join(facts)


def base_arguments(base: str, subfolder: str | None) -> str:
    """What a Python snippet passes to `from_pretrained`: a built-in base lies in the package, others have a name."""
    place = f'BUILTIN_BASES / "{base.removeprefix("builtin:")}"' if base.startswith("builtin:") else repr(base)
    return place if subfolder is None else f'{place}, subfolder="{subfolder}"'
