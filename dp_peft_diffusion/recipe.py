"""Recipes: every choice of a run, as frozen dataclasses, read from strict YAML and flags.

A field says its meaning, range and choices once; `--help`, errors and the comments of written recipes come from there.
Flags stand over the recipe, the recipe over the defaults. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.strict_yaml import read_table, write_line
from dp_peft_diffusion.typed_fields import build, check_range, nearest, option, options

PROMISES = ("epsilon", "noise_multiplier", "no_privacy")  # of a run, exactly one
ADAPTER_KINDS = (
    "lora", "lora_conv", "ffa_lora", "rslora", "dora", "ia3", "lokr", "oft", "vera",
    "bitfit", "norm", "attention", "class_rows", "full",
)  # fmt: skip
NEIGHBORING_RELATIONS = ("zero_out", "add_or_remove_one", "replace_one")
MAX_SCALE = 64  # alpha over rank that an adapter's file may say
WITHOUT_TARGETS = ("bitfit", "class_rows", "full")
MAX_SEED = 2**32  # image i is seeded with seed * 1,000,003 + i, which must fit 63 bits
AnyRecipe = TypeVar("AnyRecipe", "Recipe", "PretrainRecipe")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base, which stays frozen."""

    pretrained_model_name_or_path: str = option("builtin:handwriting", help="base: builtin:NAME, a folder, a Hub name")
    revision: str | None = option(None, help="branch, tag or commit of a base on the Hub")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The private images."""

    dataset_name: str = option("builtin:digits", help="images: builtin:digits, a folder, parquet files, a Hub name")
    dataset_config_name: str | None = option(None, help="configuration of a Hub data set")
    split: str = option("train", help="split of the data set")
    image_column: str = option("image", help="column of the images")
    label_column: str | None = option("label", help="column of the labels; none trains without classes")
    class_names: tuple[str, ...] | None = option(None, help="public list of classes; none takes the data set's own")
    center_crop: bool = option(False, help="cut the middle square out instead of resizing the whole image")
    declared_public: bool = option(False, help="you declare these images public, nothing in them needs protection")
    group_column: str | None = option(None, help="column that says whose image it is; the promise is for all of one's")
    max_examples_per_group: int | None = option(
        None, at_least=1, below=1025, help="images used of one group; the others count as blank"
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What trains."""

    kind: str = option("lora", flag="adapter", choices=ADAPTER_KINDS, help="kind of adapter")
    rank: int = option(4, aliases=("lora_r", "network_dim"), at_least=1, below=257, help="rank of its matrices")
    lora_alpha: float | None = option(None, aliases=("network_alpha",), above=0, help="LoRA alpha; none: the rank")
    target_modules: tuple[str, ...] | None = option(
        None, help="ends of names of modules that are adapted; none: the kind's own"
    )
    class_code_rank: int | None = option(
        None, at_least=1, below=257, help="public directions class rows move in; none: all"
    )
    class_rows: tuple[int, ...] | None = option(
        None, at_least=0, help="rows of the class table that may be overwritten, for a base without spare rows"
    )


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The promise. Exactly one of epsilon, noise_multiplier and no_privacy is given."""

    epsilon: float | None = option(None, aliases=("target_epsilon",), above=0, help="promise of the whole run")
    delta: float = option(1e-5, aliases=("target_delta",), above=0, below=1, help="must be below 1/N")
    noise_multiplier: float | None = option(None, above=0, help="noise over clip bound, in place of epsilon")
    max_grad_norm: float = option(
        1.0, aliases=("per_sample_max_grad_norm",), above=0, help="clip bound of each example (not of the batch)"
    )
    clipping: str = option("automatic", choices=("flat", "automatic"), help="how an example's gradient is bounded")
    gamma: float | None = option(None, above=0, help="of automatic clipping; none: chosen from public images")
    neighboring_relation: str = option(
        "zero_out", choices=NEIGHBORING_RELATIONS, help="how two data sets differ that must look alike"
    )
    sampling_prob: float | None = option(
        None, above=0, below=1, help="chance of each image in each update; add_or_remove_one needs it"
    )
    truncated_batch_size: int | None = option(None, at_least=1, help="most images in one update; none: no cap")
    tuning_runs: int | None = option(
        None, at_least=1, below=100_001, help="runs on these images in all, this one included; epsilon is for all"
    )
    prior_event: tuple[str, ...] | None = option(
        None, help="privacy.json of earlier releases from these images; epsilon is then for all together"
    )
    record_spending: bool = option(True, help="note the run in this user's ledger of the data set (dp-peft spent)")
    no_privacy: bool = option(False, help="no noise, no promise, no export; needs declared_public")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The noisy updates."""

    train_batch_size: int = option(
        256, aliases=("expected_batch_size",), at_least=1, help="expected images in one noisy update (Poisson)"
    )
    max_train_steps: int = option(100, at_least=1, help="noisy updates; part of the promise")
    learning_rate: float = option(1e-2, above=0, help="step size of the optimizer")
    optimizer: str = option("adam", choices=("sgd", "adam"), help="what turns noisy means into updates")
    noise_multiplicity: int = option(1, at_least=1, help="diffusion draws averaged in each example; costs no privacy")
    micro_batch_size: int = option(
        64, aliases=("max_physical_batch_size",), at_least=1, help="images at once on the device: memory only"
    )
    label_dropout: float = option(0.1, at_least=0, below=1, help="share of draws that see no label, for guidance")
    ema_decay: float = option(0.0, at_least=0, below=1, help="moving average of the adapter; 0: off")
    mixed_precision: str = option(
        "no", choices=("no", "bf16", "auto"), help="precision of the frozen base; auto: whichever measures faster"
    )
    checkpointing_steps: int = option(10, at_least=1, help="updates between saved states, from which a stop is resumed")
    skip_self_check: bool = option(False, help="skip the start-up check of gradients; the certificate says so")
    seed: int = option(0, at_least=0, below=MAX_SEED, help="of everything public; the privacy noise has no seed")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The grids of generated images."""

    every: int = option(0, at_least=0, help="steps between grids; 0: before and after only")
    num_images: int = option(80, at_least=1, help="images in a grid")
    scheduler: str = option("ddim", help="sampler: ddim, ddpm, dpmsolver++, or a diffusers scheduler class")
    num_inference_steps: int = option(25, at_least=1, help="denoising steps")
    guidance_scale: float = option(1.0, at_least=0, help="classifier-free guidance; 1: none")
    seed: int = option(0, at_least=0, below=MAX_SEED, help="of the grids")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of a private run."""

    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = Adapter()
    privacy: Privacy = Privacy()
    train: Train = Train()
    sample: Sample = Sample()


@dataclass(frozen=True)
class PretrainRecipe:
    """Every choice of pretraining a base on public images."""

    dataset_name: str = option(help="public images with labels: a folder, parquet files, a Hub name")
    image_column: str = option("image", help="column of the images")
    label_column: str = option("label", help="column of the labels")
    invert: bool = option(True, help="the images are dark on light; the base learns light on dark")
    resolution: int = option(32, at_least=8, help="side of the images in pixels")
    pixel_packing: int = option(2, at_least=1, help="side of the pixel blocks folded into channels")
    block_out_channels: tuple[int, ...] = option((32, 64, 96), at_least=1, help="width of each level of the UNet")
    class_code_rank: int = option(16, at_least=1, help="dimensions of the class table")
    spare_classes: int = option(64, at_least=0, help="free rows of the class table, for private classes")
    train_batch_size: int = option(128, at_least=1, help="images in one update")
    max_train_steps: int = option(4500, at_least=1, help="updates")
    learning_rate: float = option(1e-3, above=0, help="peak step size of Adam")
    lr_warmup_steps: int = option(200, at_least=0, help="updates of linear warm-up")
    label_dropout: float = option(0.1, at_least=0, below=1, help="share of draws that see no label, for guidance")
    ema_decay: float = option(0.999, at_least=0, below=1, help="moving average of the weights")
    seed: int = option(0, at_least=0, below=MAX_SEED, help="of everything")


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe that comes with the package.

    Raises:
        UserError: there is none of that name.
    """
    here = Path(__file__).resolve().parent
    # In a wheel recipes/ lies in the package, in a checkout beside it.
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"--recipe {name!r} does not exist. {nearest(name, known)}There is: {', '.join(known)}. "
            "A file of your own goes with --config FILE."
        )
    return folder / f"{name}.yaml"


def load_recipe(path: Path | str | None = None, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read and check a recipe: overrides such as {"privacy.epsilon": 1.0} over the file over the defaults.

    Any of epsilon, noise_multiplier and no_privacy among the overrides takes the place of the file's. What the file
    declares public is its own data set, not one that an override names; its target_modules go with its own kind.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a value that `validate` refuses.
    """
    recipe = Recipe() if path is None else build(Recipe, read_table(Path(path)), str(path))
    tables = {spec.name: dict(vars(getattr(recipe, spec.name))) for spec in fields(Recipe)}
    overrides = overrides or {}
    if any(f"privacy.{name}" in overrides for name in PROMISES):
        tables["privacy"] |= {"epsilon": None, "noise_multiplier": None, "no_privacy": False}
    if overrides.get("adapter.kind", recipe.adapter.kind) != recipe.adapter.kind:
        tables["adapter"]["target_modules"] = None
    if "data.dataset_name" in overrides:
        tables["data"]["declared_public"] = False
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return validate(build(Recipe, tables, "options"))


def load_pretrain_recipe(path: Path | str, overrides: Mapping[str, object] | None = None) -> PretrainRecipe:
    """The same for pretraining, whose table is flat: overrides such as {"dataset_name": "omniglot"}."""
    return validate(build(PretrainRecipe, {**read_table(Path(path)), **(overrides or {})}, str(path)))


def validate(recipe: AnyRecipe) -> AnyRecipe:
    """Return `recipe` if every value is in its range and all go together.

    Raises:
        UserError: naming the option, its recipe key, what is allowed, and what to type.
    """
    if isinstance(recipe, Recipe):
        _check_kind(recipe.adapter.kind)
        _check_precision(recipe.train.mixed_precision)
    for section, spec, value in options(recipe):
        check_range(section, spec, value)
    if isinstance(recipe, Recipe):
        _check_together(recipe)
    return recipe


def to_yaml(recipe: Recipe | PretrainRecipe) -> str:
    """A complete recipe with comments, which loads back equal and can be run."""
    command = "train" if isinstance(recipe, Recipe) else "pretrain"
    lines, last = [f"# dp-peft {command} --config recipe.yaml"], ""
    for section, spec, value in options(recipe):
        if section != last:
            lines.append(f"{section}:  # {getattr(recipe, section).__doc__}")
            last = section
        lines.append(f"{'  ' if section else ''}{write_line(spec.name, value)}  # {spec.metadata['help']}")
    return "\n".join(lines) + "\n"


def _check_kind(kind: str) -> None:
    """A kind that peft has and this tool cannot train deserves its reason."""
    if kind == "loha":
        raise UserError(
            "--adapter loha (adapter.kind in a recipe): peft computes it in an autograd function of its own, which "
            "neither vmap nor a layer rule can follow, so no per-example gradient of it is exact. "
            "Use --adapter lokr, which is as small, or --adapter lora."
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
    if privacy.gamma is not None and privacy.clipping == "flat":
        raise UserError("--gamma (privacy.gamma) belongs to --clipping automatic. Leave one of them out.")
    if recipe.adapter.target_modules is not None and recipe.adapter.kind in WITHOUT_TARGETS:
        raise UserError(
            f"--target_modules has no meaning with --adapter {recipe.adapter.kind} (adapter.kind in a recipe), which "
            "knows what it trains. Leave it out, or choose --adapter lora."
        )
    if recipe.adapter.kind == "oft" and recipe.adapter.rank < 2:
        raise UserError("--rank 1 (adapter.rank in a recipe): a rotation of one number is none. Type --rank 4 for oft.")
    if recipe.adapter.kind == "lokr" and (recipe.adapter.lora_alpha or 0) > MAX_SCALE * recipe.adapter.rank:
        raise UserError(f"--lora_alpha above {MAX_SCALE} times --rank is more than lokr's file may say. Leave it out.")
    lists = {"--class_names": data.class_names, "--class_rows": recipe.adapter.class_rows}
    for name, items in (lists | {"--target_modules": recipe.adapter.target_modules}).items():
        if items is not None and len(set(items)) < len(items):
            raise UserError(f"{name} names something twice: {', '.join(map(str, items))}. Name each once.")
