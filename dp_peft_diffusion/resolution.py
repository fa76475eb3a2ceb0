"""From the recipe as asked for to the recipe as run: what base and images decide, written into it."""

import dataclasses

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.class_rows import choose_class_rows
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_recipe import MAX_ROWS
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import MAX_ROWS_PER_CLASS, PATH_TO_BASE, PATH_TO_IMAGES, Model, Recipe, to_yaml


def check_given(recipe: Recipe) -> None:
    """Images and base that everybody has elsewhere must be named on the command line.

    Raises:
        UserError: the recipe leaves one of them open.
    """
    if recipe.data.dataset_name == PATH_TO_IMAGES:
        raise UserError("this recipe does not know where your images lie. Add --dataset_name PATH.")
    if recipe.model.pretrained_model_name_or_path == PATH_TO_BASE:
        raise UserError(
            "this recipe does not know where your base lies. Add --pretrained_model_name_or_path PATH, a folder that "
            "dp-peft pretrain wrote; the head of the recipe names the one it is meant for."
        )


def resolve(recipe: Recipe, base: BaseModel, class_names: tuple[str, ...] | None) -> tuple[Recipe, tuple[str, ...]]:
    """Write into the recipe what base and images decide; say what was decided.

    class_names: of the images, as listed.

    Raises:
        UserError: base, images and recipe do not go together.
    """
    check_fit(recipe, base)
    notes: tuple[str, ...] = ()
    data, adapter, train = recipe.data, recipe.adapter, recipe.train
    if adapter.kind == "code_moments":
        adapter = dataclasses.replace(adapter, rows_per_class=choose_rows_per_class(recipe, base, class_names))
    labelled, told = class_names is not None, base.text is not None or base.num_class_embeds is not None
    if labelled and not told:
        notes += ("the base is unconditional: labels are ignored",)
    if not labelled and base.text is None and base.num_class_embeds is not None and base.layout.null_class is None:
        raise UserError(
            f"base {base.name!r} wants a class for every image, and the images have no labels. "
            "Give --label_column, or choose an unconditional base."
        )
    if adapter.class_rows is not None and (class_names is None or base.num_class_embeds is None):
        raise UserError(
            "--class_rows names rows for labelled images on a base with a class table, and there is no such pair here. "
            "Leave it out, or give --label_column."
        )
    if class_names is None or not told:
        data = dataclasses.replace(data, label_column=None, class_names=None)
    else:
        data = dataclasses.replace(data, class_names=class_names)
        if base.text is None:
            rows = choose_class_rows(base, adapter.class_rows, len(class_names))
            adapter = dataclasses.replace(adapter, class_rows=rows)
    has_null = base.text is not None or (data.class_names is not None and base.layout.null_class is not None)
    if train.label_dropout and not has_null:
        train = dataclasses.replace(train, label_dropout=0.0)
        notes += ("no label dropout: there are no labels, or the base has no null class",)
    model = dataclasses.replace(recipe.model, revision=base.revision)  # the commit, which a branch leaves behind
    return dataclasses.replace(recipe, model=model, data=data, adapter=adapter, train=train), notes


def check_fit(recipe: Recipe, base: BaseModel) -> None:
    """Options that mean something on other bases only.

    Raises:
        UserError: one that the base cannot do.
    """
    if base.text is None and recipe.data.caption_column is not None:
        raise UserError(
            f"--caption_column {recipe.data.caption_column}: base {base.name!r} reads no text. "
            "Choose a text-conditional base, or leave it out."
        )
    if base.text is None and recipe.sample.prompts is not None:
        raise UserError(f"--sample_prompts: base {base.name!r} reads no text. Leave it out.")


def choose_rows_per_class(recipe: Recipe, base: BaseModel, class_names: tuple[str, ...] | None) -> int:
    """Rows that each class takes, for `code_moments`: as many as asked for, or all that the base has to spare.

    Raises:
        UserError: the base is told no codes, the images have no labels, or there are fewer rows.
    """
    if base.codes is None:
        raise UserError(
            f"--adapter code_moments needs a base that is told codes of images, and base {base.name!r} has no encoder. "
            "Take builtin:handwriting_codes, make one with dp-peft pretrain --kind codes, or choose --adapter lora."
        )
    if class_names is None:
        raise UserError("--adapter code_moments needs a class for every image. Give --label_column.")
    first, end = base.layout.spare_classes
    if recipe.adapter.class_rows not in (None, tuple(range(first, first + len(class_names)))):
        raise UserError("--adapter code_moments takes all spare class rows. Leave --class_rows out.")
    spare, wanted = (end - first) // len(class_names), recipe.adapter.rows_per_class
    if not spare:
        raise UserError(
            f"base {base.name!r} has {end - first} spare class rows, fewer than the {len(class_names)} classes. Make a "
            "base with more of them: dp-peft pretrain --kind codes --spare_classes N."
        )
    if wanted is not None and wanted > spare:
        raise UserError(
            f"--rows_per_class {wanted}: base {base.name!r} has {end - first} spare class rows, {spare} for each of "
            f"{len(class_names)} classes. Take {spare} or fewer."
        )
    return wanted or min(spare, MAX_ROWS_PER_CLASS, MAX_ROWS // len(class_names))


def make_mechanism(recipe: Recipe, num_examples: int) -> DPMechanism:
    """The mechanism of the run, its noise not yet calibrated. Under add_or_remove_one, N decides nothing."""
    batch, privacy = recipe.train.train_batch_size, recipe.privacy
    public = privacy.neighboring_relation != "add_or_remove_one"
    if public and batch > num_examples:
        raise UserError(
            f"--train_batch_size {batch} is more than the {num_examples} images. Try {num_examples} or less."
        )
    if public and batch < num_examples and recipe.adapter.kind == "code_moments":
        raise UserError(
            f"--train_batch_size {batch}: --adapter code_moments takes one sum, and over all images it has the least "
            f"noise for its epsilon. Type --train_batch_size {num_examples}."
        )
    return DPMechanism(
        sampling_prob=batch / num_examples if privacy.sampling_prob is None else privacy.sampling_prob,
        steps=recipe.train.max_train_steps,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch,
        num_examples=num_examples if public else None,
        neighboring_relation=privacy.neighboring_relation,
        truncated_batch_size=privacy.truncated_batch_size,
        max_examples_per_group=recipe.data.max_examples_per_group or 1,
    )


def as_resolved(asked: Recipe, resolved: Recipe) -> Recipe:
    """What was measured or chosen once stands (invariant 8); bookkeeping may be asked for anew."""
    return dataclasses.replace(
        resolved,
        privacy=dataclasses.replace(resolved.privacy, record_spending=asked.privacy.record_spending),
        train=dataclasses.replace(resolved.train, checkpointing_steps=asked.train.checkpointing_steps),
    )


def shaping_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML without places, whose contents have digests of their own, and bookkeeping."""
    return to_yaml(
        dataclasses.replace(
            recipe,
            model=Model(),
            data=dataclasses.replace(recipe.data, dataset_name="", dataset_config_name=None, declared_public=False),
            privacy=dataclasses.replace(recipe.privacy, prior_event=None, record_spending=True),
            train=dataclasses.replace(recipe.train, checkpointing_steps=1),
        )
    )
