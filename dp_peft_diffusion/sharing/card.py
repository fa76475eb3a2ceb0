"""The model card: everything in it is read from the certificate and the recipe."""

import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_peft_diffusion.diffusion.adapter_kinds import KINDS, rows_alone
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.conditions import class_prompts
from dp_peft_diffusion.diffusion.samplers import default_scheduler
from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy.certificate_form import LORA_FILE
from dp_peft_diffusion.privacy.certificate_levels import LEVELS
from dp_peft_diffusion.recipe import PATH_TO_IMAGES, Recipe

TEMPLATES = Path(__file__).parent / "templates"
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&#!$])")


def render_card(certificate: dict, recipe: Recipe, trained_on: BaseModel, last_grid: str) -> str:
    """README.md of a shareable folder, with the front matter the Hub reads.

    last_grid: file name of the grid made after the last step.
    """
    whole = recipe.adapter.kind == "full"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": markdown, "code": code, "repr": repr}
    what = "whole model" if whole else f"{recipe.adapter.kind} adapter"
    return environment.get_template("card.md").render(
        front_matter=front_matter(recipe, trained_on),
        title=f"{what}, epsilon {certificate['guarantee']['epsilon']:g}",
        certificate=certificate,
        license=recipe.adapter.license,
        warnings=warnings(certificate),
        last_grid=last_grid,
        whole_model=whole,
        lora_file=LORA_FILE if LORA_FILE in certificate["sha256"] else None,
        sample_command=f"dp-peft sample --adapter FOLDER --num_images 64{sample_arguments(recipe, trained_on)}",
        train_command=f"dp-peft train --config recipe.yaml{train_arguments(certificate, recipe)}",
        facts=facts(certificate, recipe),
        declared=[said(level, certificate) for level in ("tuning", "releases")],
        **snippet_facts(recipe, trained_on),
    )


def front_matter(recipe: Recipe, trained_on: BaseModel) -> str:
    """What the Hub reads, as YAML. A base that is not on the Hub has no name there."""
    spec, base = recipe.adapter, recipe.model.pretrained_model_name_or_path
    whole = spec.kind == "full"
    relation = None if recipe.model.from_scratch else "finetune" if whole else "adapter"
    data = ModelCardData(
        license=spec.license,
        base_model=base if relation and is_hub_name(base) else None,
        base_model_relation=relation,
        library_name="diffusers" if whole else "peft",
        pipeline_tag="unconditional-image-generation" if trained_on.text is None else "text-to-image",
        tags=["differential-privacy", "dp-peft-diffusion", "diffusers", *([] if whole else [spec.kind])],
    )
    return data.to_yaml()


def is_hub_name(name: str) -> bool:
    """Whether a base is a repository on the Hub: neither built in nor a folder, which certificates name `./NAME`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def snippet_facts(recipe: Recipe, trained_on: BaseModel) -> dict[str, Any]:
    """What the Python snippets say of base and images."""
    base, whole, layout = recipe.model.pretrained_model_name_or_path, recipe.adapter.kind == "full", trained_on.layout
    names, rows, null = recipe.data.class_names, recipe.adapter.class_rows, layout.null_class
    if trained_on.text is None and trained_on.num_class_embeds is not None and rows is None and null is not None:
        names, rows = None, (null,)
    guidance = recipe.sample.guidance_scale
    return {
        "builtin": base.startswith("builtin:") and not whole,
        "base": base_place(base, whole),
        "base_options": "".join(
            f', {option}="{value}"'
            for option, value in (("subfolder", trained_on.subfolder), ("revision", trained_on.revision))
            if value is not None and not whole
        )
        or (', subfolder="unet"' if whole else ""),
        "revision": "" if trained_on.revision is None else f', revision="{trained_on.revision}"',
        "reads_text": trained_on.text is not None,
        "prompt": None if trained_on.text is None else example_prompt(recipe),
        "unet_class": type(trained_on.unet).__name__,
        "scheduler_class": "EDMEulerScheduler" if "sigma_data" in trained_on.scheduler.config else "DDIMScheduler",
        "steps": recipe.sample.num_inference_steps,
        "step_options": ", eta=1.0" if stochastic(recipe, trained_on) else "",
        # The loop is written out for pixels, where nothing has to be decoded, and for folders as pipelines have them.
        "denoises_pixels": not trained_on.is_latent and (whole or trained_on.subfolder is not None),
        "input_shape": ", ".join(map(str, trained_on.input_shape)),
        "pixel_packing": layout.pixel_packing,
        "class_rows": rows and list(rows),
        "rows_per_class": recipe.adapter.rows_per_class,
        "class_names": names and list(names),
        "null_class": null,
        "guidance": guidance if guidance != 1 and null is not None and rows not in (None, (null,)) else None,
    }


def stochastic(recipe: Recipe, trained_on: BaseModel) -> bool:
    """Whether the recipe samples with DDIM of eta 1."""
    name = recipe.sample.scheduler or default_scheduler(trained_on)
    return name == "fidelity" and "sigma_data" not in trained_on.scheduler.config


def base_place(base: str, whole: bool) -> str:
    """What a Python snippet passes to `from_pretrained`: a built-in base lies in the package, others have a name."""
    if whole:
        return '"FOLDER"'
    return f'BUILTIN_BASES / "{base.removeprefix("builtin:")}"' if base.startswith("builtin:") else repr(base)


def example_prompt(recipe: Recipe) -> str:
    """A public prompt; captions are private."""
    if recipe.sample.prompts is not None:
        return recipe.sample.prompts[0]
    if recipe.data.caption_column is not None:
        return "a photo of ..."
    return class_prompts(recipe.data.class_names, recipe.data.prompt_template)[0]


def sample_arguments(recipe: Recipe, trained_on: BaseModel) -> str:
    """What `dp-peft sample` cannot know from the folder: captions are private, and a local base lies anywhere."""
    base, words = recipe.model.pretrained_model_name_or_path, ""
    if recipe.data.caption_column is not None and recipe.sample.prompts is None:
        words += " --prompt 'a photo of ...'"
    if base.startswith("./") and (recipe.adapter.kind != "full" or trained_on.is_latent):
        words += f" --base {local_place(base)}"
    return words


def train_arguments(certificate: dict, recipe: Recipe) -> str:
    """What `dp-peft train` cannot know from the shared recipe: where images, a local base and certificates lie."""
    data, base = recipe.data.dataset_name, recipe.model.pretrained_model_name_or_path
    words = f" --dataset_name {PATH_TO_IMAGES}" if data == PATH_TO_IMAGES else ""
    words += f" --pretrained_model_name_or_path {local_place(base)}" if base.startswith("./") else ""
    earlier = ",".join(f"PATH_TO_CERTIFICATE_{i + 1}" for i in range(len(certificate["other_releases"])))
    return words + (f" --prior_event {earlier}" if earlier else "")  # without it epsilon would be for this run alone


def local_place(base: str) -> str:
    """A local base as a word of a command; the folder it lies in is for the reader to fill in."""
    return shlex.quote(f"PATH/{one_line(base.removeprefix('./'))}")


def warnings(certificate: dict) -> list[str]:
    """What weakens the promise, to be read before its numbers."""
    tuning = certificate["tuning"]
    weak = {
        "key": (certificate["key_source"], certificate["key_after_export"]) != ("os", "deleted"),
        "tuning": tuning != "undeclared" and tuning["priced"] == "no",
        "gradients": certificate["gradient_check"] == "skipped",
    }
    return [said(level, certificate) for level, holds in weak.items() if holds]


def said(level: str, certificate: dict) -> str:
    """What `dp-peft verify` says of something that the certificate declares, and no file shows."""
    try:
        return LEVELS[level](Path(), certificate)
    except PrivacyError as error:
        return str(error)


def facts(certificate: dict, recipe: Recipe) -> list[tuple[str, str]]:
    """The rows of the table: what and its value, as plain text."""
    guarantee, mechanism, base = certificate["guarantee"], certificate["mechanism"], certificate["base"]
    pinned = "" if base["revision"] is None else f", commit {base['revision']}"
    number = certificate["public_inputs"].get("num_examples")
    others = {"epsilon_replace_one": "one record replaced by another", "epsilon_per_image": "one image of a group"}
    return [
        ("base", f"{base['name']}{pinned}, SHA-256 of weights {base['sha256']}"),
        ("trained", trained_facts(recipe)),
        ("promise", f"epsilon {guarantee['epsilon']:g}, delta {guarantee['delta']:g}"),
        *((f"epsilon for {of}", f"{guarantee[key]:g}") for key, of in others.items() if guarantee[key] is not None),
        ("found by an attack, at most", attack_odds(guarantee["max_tpr_at_fpr"])),
        ("unit", certificate["unit"]),
        ("relation", certificate["neighboring_relation"]),
        *([] if number is None else [("records", f"{number}, a public number")]),
        ("noisy updates", str(mechanism["count"])),
        ("sampling probability", f"{mechanism['sampling_prob']:.6g}"),
        ("expected batch size", f"{mechanism['expected_batch_size']:g}"),
        ("noise multiplier", str(mechanism["noise_multiplier"])),
        ("clipping", f"{mechanism['clipping']}, bound {mechanism['max_grad_norm']:g}"),
    ]


def attack_odds(shares: dict[str, float]) -> str:
    """The share of the records used that an attacker finds, for each share of false alarms that he may raise."""
    return ", ".join(f"{100 * share:.4g} % with {100 * float(rate):g} % false alarms" for rate, share in shares.items())


def trained_facts(recipe: Recipe) -> str:
    """What trained, in words."""
    spec = recipe.adapter
    facts = [] if rows_alone(spec) else [KINDS[spec.kind].what.format(rank=spec.rank)]
    if facts and spec.target_modules is not None:
        facts = [f"{spec.kind} of rank {spec.rank} on {', '.join(spec.target_modules)}"]
    if spec.kind == "code_moments":
        facts.append(f"sums of image codes of {len(spec.class_rows or ())} classes; rows drawn: {spec.rows_per_class}")
    elif spec.class_rows:
        where = "whole rows" if spec.class_code_rank is None else f"{spec.class_code_rank} public directions"
        facts.append(f"class rows of {len(spec.class_rows)} classes, in {where}")
    return "; ".join(facts)


def markdown(text: str) -> str:
    """Text that somebody typed, as markdown that shows just that: on one line, without links, code or HTML."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Text as a code span, whatever backticks are in it."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def one_line(text: str) -> str:
    """Text without line ends and without what cannot be seen."""
    return "".join(char if char.isprintable() else " " for char in text)
