"""Values of a recipe that are out of range, or do not go together."""

import re
from typing import Any, TypeVar

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe.pretraining import PretrainRecipe
from dp_peft_diffusion.recipe.sections import MAX_SCALE, PROMISES, WITHOUT_TARGETS, Recipe, Train
from dp_peft_diffusion.typed_fields import check_range, options

AnyRecipe = TypeVar("AnyRecipe", Recipe, PretrainRecipe)


def validate(recipe: AnyRecipe) -> AnyRecipe:
    """Return `recipe` if every value is in its range and all go together.

    Raises:
        UserError: naming the option, its recipe key, what is allowed, and what to type.
    """
    if isinstance(recipe, Recipe):
        _check_kind(recipe.adapter.kind)
        _check_precision(recipe.train.mixed_precision)
        _check_license(recipe.adapter.license)
    for section, spec, value in options(recipe):
        check_range(section, spec, value)
    if isinstance(recipe, Recipe):
        _check_together(recipe)
    else:
        _check_pretraining(recipe)
    return recipe


def _check_kind(kind: str) -> None:
    """A kind that peft has and this tool cannot train deserves its reason."""
    if kind == "loha":
        raise UserError(
            "--adapter loha (adapter.kind in a recipe): peft computes it in an autograd function of its own, which "
            "neither vmap nor a layer rule can follow, so no per-example gradient of it is exact. "
            "Use --adapter lokr, which is as small, or --adapter lora."
        )


def _check_license(name: str | None) -> None:
    """Licences have names on the Hub, and what has none is named `other` there."""
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise UserError(
            f"--license {name!r} (adapter.license in a recipe) is no name of the Hub's, which are small letters, "
            "digits, dots and hyphens. Type for example --license apache-2.0, or --license other."
        )


def _check_precision(mixed_precision: str) -> None:
    """A precision that other tools have deserves the reason why it is not here."""
    if mixed_precision == "fp16":
        raise UserError(
            "--mixed_precision fp16 (train.mixed_precision in a recipe) needs a gradient scaler, whose scale would "
            "depend on private gradients, and small gradients would become zero. Type --mixed_precision bf16."
        )


def _check_relation(recipe: Recipe) -> None:
    """Relations, groups and caps that have no price together."""
    privacy, grouped = recipe.privacy, recipe.data.group_column is not None
    if grouped != (recipe.data.max_examples_per_group is not None):
        raise UserError(
            "--group_column and --max_examples_per_group (data in a recipe) go together: whose image it is, and how "
            "many of one owner count. Type for example --group_column patient --max_examples_per_group 4."
        )
    if privacy.neighboring_relation == "add_or_remove_one":
        if privacy.sampling_prob is None:
            raise UserError(
                "--neighboring_relation add_or_remove_one hides the number of images, so nothing may be computed from "
                "it. Give --sampling_prob (privacy.sampling_prob in a recipe), for example --sampling_prob 0.01."
            )
    elif privacy.sampling_prob is not None:
        raise UserError(
            "--sampling_prob (privacy.sampling_prob in a recipe) belongs to --neighboring_relation add_or_remove_one; "
            "elsewhere it is --train_batch_size / N. Leave it out."
        )
    if grouped and privacy.neighboring_relation == "replace_one":
        raise UserError(
            "--group_column with --neighboring_relation replace_one has no known price. "
            "Take --neighboring_relation zero_out."
        )
    if privacy.truncated_batch_size is not None and grouped:
        raise UserError("--truncated_batch_size with --group_column has no known price. Leave one of them out.")
    if privacy.truncated_batch_size is not None and privacy.neighboring_relation == "add_or_remove_one":
        raise UserError(
            "--truncated_batch_size has a price only where the number of images is public. "
            "Leave it out, or take --neighboring_relation zero_out."
        )


def _check_training(recipe: Recipe) -> None:
    """Options of training that belong to others, or contradict them."""
    model, data, train = recipe.model, recipe.data, recipe.train
    if model.from_scratch and recipe.adapter.kind != "full":
        raise UserError(
            f"--from_scratch draws all weights anew, and --adapter {recipe.adapter.kind} would freeze them at random. "
            "Type --adapter full."
        )
    if train.momentum and train.optimizer != "sgd":
        raise UserError(f"--momentum belongs to --optimizer sgd, and {train.optimizer} is chosen. Leave one out.")
    if train.augmentation_multiplicity > 1 and data.augmentations is None:
        raise UserError(
            "--augmentation_multiplicity averages over changed versions of an image, and no change is named. "
            "Add for example --augmentations flip,shift."
        )
    if train.lr_warmup_steps >= train.max_train_steps and train.lr_warmup_steps:
        raise UserError(
            f"--lr_warmup_steps {train.lr_warmup_steps} is not below --max_train_steps {train.max_train_steps}. "
            "Type fewer of the first, or more of the second."
        )
    if data.caption_column is not None and data.class_names is not None:
        raise UserError("--caption_column and --class_names: an image has a caption or a class. Leave one of them out.")
    if "{" in data.prompt_template.replace("{label}", "") or "}" in data.prompt_template.replace("{label}", ""):
        raise UserError(
            f"--prompt_template {data.prompt_template!r}: only {{label}} is filled in. Type for example "
            "'a photo of {label}'."
        )
    _check_timesteps(train)


def _check_timesteps(train: Train) -> None:
    """The range and the mixture from which timesteps are drawn."""
    low_high, edges, weights = train.timestep_range, train.timestep_edges, train.timestep_weights
    if low_high is not None and (len(low_high) != 2 or low_high[0] >= low_high[1]):
        raise UserError("--timestep_range takes two numbers, the first below the second. Type for example 0,600.")
    if len(edges) != len(weights) + 1 or list(edges) != sorted(set(edges)):
        raise UserError(
            f"--timestep_edges {','.join(map(str, edges))} must rise, with one number more than --timestep_weights "
            f"{','.join(map(str, weights))}. Type for example --timestep_edges 0,30,600,1000 --timestep_weights "
            "0.03,0.57,0.4."
        )
    if abs(sum(weights) - 1) > 1e-9:
        raise UserError(f"--timestep_weights add up to {sum(weights):g}. They must add up to 1.")


def _check_together(recipe: Recipe) -> None:
    """What no single value shows."""
    privacy, data = recipe.privacy, recipe.data
    given = [name for name in PROMISES if getattr(privacy, name) not in (None, False)]
    if not given:
        raise UserError("no promise is given (privacy.epsilon in a recipe). Type for example --epsilon 1.")
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in given)} are given (privacy in a recipe); each sets the noise. "
            f"Keep one, for example --{given[0]}."
        )
    if privacy.no_privacy and not data.declared_public:
        raise UserError(
            f"--no_privacy would train on {data.dataset_name} without protection. If nothing in these images needs "
            "protection, say so with --declared_public; otherwise type for example --epsilon 1."
        )
    _check_relation(recipe)
    _check_training(recipe)
    if privacy.gamma is not None and privacy.clipping == "flat":
        raise UserError("--gamma (privacy.gamma) belongs to --clipping automatic. Leave one of them out.")
    if recipe.adapter.target_modules is not None and recipe.adapter.kind in WITHOUT_TARGETS:
        raise UserError(
            f"--target_modules has no meaning with --adapter {recipe.adapter.kind} (adapter.kind in a recipe), which "
            "knows what it trains. Leave it out, or choose --adapter lora."
        )
    _check_code_moments(recipe)
    if recipe.adapter.kind == "oft" and recipe.adapter.rank < 2:
        raise UserError("--rank 1 (adapter.rank in a recipe): a rotation of one number is none. Type --rank 4 for oft.")
    if recipe.adapter.kind == "lokr" and (recipe.adapter.lora_alpha or 0) > MAX_SCALE * recipe.adapter.rank:
        raise UserError(f"--lora_alpha above {MAX_SCALE} times --rank is more than lokr's file may say. Leave it out.")
    lists = {"--class_names": data.class_names, "--class_rows": recipe.adapter.class_rows}
    for name, items in (lists | {"--target_modules": recipe.adapter.target_modules}).items():
        if items is not None and len(set(items)) < len(items):
            raise UserError(f"{name} names something twice: {', '.join(map(str, items))}. Name each once.")


# What code_moments needs: one sum of bounded statistics, and no descent.
_ONE_SUM: dict[str, dict[str, Any]] = {
    "train": {
        "optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "lr_warmup_steps": 0, "max_train_steps": 1,
        "noise_multiplicity": 1, "label_dropout": 0.0, "ema_decay": 0.0, "mixed_precision": "no",
        "lr_scheduler": "constant", "snr_gamma": None, "timestep_distribution": None, "timestep_range": None,
    },
    "privacy": {"clipping": "flat"},
    "adapter": {"class_code_rank": None, "rank": 4, "lora_alpha": None},
}  # fmt: skip


def _check_code_moments(recipe: Recipe) -> None:
    """`code_moments` sums statistics once; options of training by many steps would do nothing, or harm."""
    if recipe.adapter.kind != "code_moments":
        if recipe.adapter.rows_per_class is not None:
            raise UserError(
                "--rows_per_class (adapter.rows_per_class in a recipe) belongs to --adapter code_moments. Leave it out."
            )
        return
    wrong = [
        f"--{name} {'none' if wanted is None else f'{wanted:g}' if isinstance(wanted, float) else wanted}"
        for section, values in _ONE_SUM.items()
        for name, wanted in values.items()
        if getattr(getattr(recipe, section), name) != wanted
    ]
    if wrong:
        raise UserError(
            f"--adapter code_moments takes one noisy sum, and no steps of descent. Type {' '.join(wrong)}, or start "
            "from --recipe mnist-codes."
        )


# Options of pretraining that only some kinds have; elsewhere they would say something and do nothing.
_ONLY_OF = {
    "vae": ("latent", "captions"),
    "latent_channels": ("autoencoder",),
    "kl_weight": ("autoencoder",),
    "characters": ("autoencoder", "captions", "features", "codes"),
    "invert": ("handwriting", "autoencoder", "captions", "features", "codes"),
    "features": ("codes",),
    "class_code_rank": ("handwriting", "captions", "codes"),
    "pixel_packing": ("handwriting", "pixel", "features", "codes"),
    "center_crop": ("pixel", "autoencoder", "latent", "captions", "features", "codes"),
    "random_flip": ("pixel", "autoencoder", "latent", "captions", "features", "codes"),
    "caption_column": ("captions",),
    "prompt_template": ("captions",),
    "spare_words": ("captions",),
    "text_width": ("captions",),
    "text_layers": ("captions",),
    "text_tokens": ("captions",),
}


def _check_pretraining(recipe: PretrainRecipe) -> None:
    """What no single value of a pretraining shows."""
    for _, spec, value in options(recipe):
        kinds = _ONLY_OF.get(spec.name, (recipe.kind,))
        if recipe.kind not in kinds and value != spec.default:
            raise UserError(
                f"--{spec.name} ({spec.name} in a recipe) belongs to --kind {' or '.join(kinds)}, and --kind is "
                f"{recipe.kind}. Leave it out."
            )
    if recipe.image_channels == 2:
        raise UserError("--image_channels 2 (image_channels in a recipe): images are grey or colour. Type 1 or 3.")
    if recipe.kind in ("latent", "captions") and recipe.vae is None:
        raise UserError(
            f"--kind {recipe.kind} needs the autoencoder whose latents the UNet learns: --vae PATH (vae in a recipe). "
            "`dp-peft pretrain --kind autoencoder` makes one."
        )
    if recipe.kind == "captions":
        _check_captions(recipe)
    if recipe.kind == "features" and recipe.label_column is None:
        raise UserError("--kind features learns to tell classes apart. Give a --label_column.")
    if recipe.kind == "codes" and recipe.features is None:
        raise UserError(
            "--kind codes needs the net whose features are the codes: --features PATH (features in a recipe). `dp-peft "
            "pretrain --kind features` makes one, and builtin:handwriting_features comes with the package."
        )
    _check_characters(recipe)
    _check_sizes(recipe)


def _check_captions(recipe: PretrainRecipe) -> None:
    """Every image needs a caption, and the text encoder whole heads."""
    if recipe.label_column is None and recipe.caption_column is None:
        raise UserError("--kind captions needs words for the images. Give --caption_column, or --label_column.")
    if recipe.prompt_template.count("{label}") != 1 or recipe.caption_column and recipe.prompt_template != "{label}":
        raise UserError(
            f"--prompt_template {recipe.prompt_template!r} (prompt_template in a recipe) makes captions of labels, and "
            "holds {label} once. Type for example 'a photo of {label}', or leave it out where captions have a column."
        )
    if recipe.text_width % 16:
        raise UserError(f"--text_width {recipe.text_width} (text_width in a recipe) is no multiple of 16. Type 64.")


def _check_characters(recipe: PretrainRecipe) -> None:
    """What goes with grey characters, and what without."""
    written = recipe.kind == "handwriting" or recipe.characters
    flag = "--kind handwriting" if recipe.kind == "handwriting" else "--characters"
    if written and (recipe.label_column is None or recipe.image_channels != 1 or recipe.caption_column is not None):
        raise UserError(f"{flag} takes grey characters with labels. Type --image_channels 1, and a --label_column.")
    if recipe.invert and not written:
        raise UserError("--invert (invert in a recipe) belongs to --characters. Add it, or leave both out.")
    if recipe.characters and (recipe.center_crop or recipe.random_flip):
        raise UserError("--characters cuts and mirrors on its own. Leave --center_crop and --random_flip out.")


def _check_sizes(recipe: PretrainRecipe) -> None:
    """Sizes of the net that must divide each other."""
    widths, attention = recipe.block_out_channels, recipe.attention_levels or ()
    if any(level >= len(widths) for level in attention):
        raise UserError(
            f"--attention_levels {','.join(map(str, attention))} (attention_levels in a recipe): the net has the "
            f"levels 0 to {len(widths) - 1}, one for each of --block_out_channels."
        )
    if any(width % recipe.norm_num_groups for width in widths):
        raise UserError(
            f"--norm_num_groups {recipe.norm_num_groups} (norm_num_groups in a recipe) does not divide each of "
            f"--block_out_channels {','.join(map(str, widths))}. Change one of them."
        )
    with_heads = {widths[level] for level in attention} | {widths[-1]}  # the middle has attention, too
    headless = recipe.kind in ("autoencoder", "features")
    if not headless and any(width % recipe.attention_head_dim for width in with_heads):
        raise UserError(
            f"--attention_head_dim {recipe.attention_head_dim} (attention_head_dim in a recipe) does not divide the "
            f"widths that have attention: {','.join(map(str, sorted(with_heads)))}. Change one of them."
        )
    halvings = 2 ** (len(widths) - 1)
    if recipe.kind not in ("latent", "captions") and recipe.resolution % (recipe.pixel_packing * halvings):
        raise UserError(
            f"--resolution {recipe.resolution} (resolution in a recipe) is not a multiple of "
            f"{recipe.pixel_packing * halvings}: --pixel_packing {recipe.pixel_packing} divides it, and each level but "
            "the first halves the rest. Type for example --resolution "
            f"{recipe.pixel_packing * halvings * max(1, round(recipe.resolution / recipe.pixel_packing / halvings))}."
        )
