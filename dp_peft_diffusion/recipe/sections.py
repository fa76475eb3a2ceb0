"""The choices of a private run, as frozen dataclasses. A field says its meaning, range and choices once."""

from dataclasses import dataclass

from dp_peft_diffusion.typed_fields import option

PROMISES = ("epsilon", "noise_multiplier", "no_privacy")  # of a run, exactly one
ADAPTER_KINDS = (
    "lora", "lora_conv", "ffa_lora", "rslora", "dora", "ia3", "lokr", "oft", "vera",
    "bitfit", "norm", "attention", "class_rows", "code_moments", "full",
)  # fmt: skip
NEIGHBORING_RELATIONS = ("zero_out", "add_or_remove_one", "replace_one")
MAX_SCALE = 64  # alpha over rank that an adapter's file may say
WITHOUT_TARGETS = ("bitfit", "class_rows", "code_moments", "full")
PREDICTION_TYPES = ("epsilon", "v_prediction", "edm")
TIMESTEP_DISTRIBUTIONS = ("uniform", "mixture", "log_normal", "cosine")
AUGMENTATIONS = ("flip", "crop", "shift", "color")
PATH_TO_IMAGES = "PATH_TO_YOUR_IMAGES"  # in recipes whose images or base everybody has elsewhere
PATH_TO_BASE = "PATH_TO_YOUR_BASE"
MAX_ROWS_PER_CLASS = 100_000
MAX_TEXT = 200  # characters of a public text in a certificate
MAX_SEED = 2**32  # image i is seeded with seed * 1,000,003 + i, which must fit 63 bits


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base, which stays frozen."""

    pretrained_model_name_or_path: str = option("builtin:handwriting", help="base: builtin:NAME, a folder, a Hub name")
    revision: str | None = option(None, help="branch, tag or commit of a base on the Hub")
    from_scratch: bool = option(False, help="draw the base's weights anew instead of loading them; with --adapter full")
    prediction_type: str | None = option(
        None, choices=PREDICTION_TYPES, help="what the net predicts; must be the base's own unless from_scratch"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The private images."""

    dataset_name: str = option("builtin:digits", help="images: builtin:digits, a folder, parquet files, a Hub name")
    dataset_config_name: str | None = option(None, help="configuration of a Hub data set")
    split: str = option("train", help="split of the data set")
    image_column: str = option("image", help="column of the images")
    label_column: str | None = option("label", help="column of the labels; none trains without classes")
    class_names: tuple[str, ...] | None = option(
        None, longest=MAX_TEXT, help="public list of classes; none takes the data set's own"
    )
    caption_column: str | None = option(
        None, longest=MAX_TEXT, help="column of the captions, for a text-conditional base"
    )
    prompt_template: str = option(
        "a photo of {label}",
        aliases=("instance_prompt",),
        longest=MAX_TEXT,
        help="prompt of a text-conditional base without captions",
    )
    center_crop: bool = option(False, help="cut the middle square out instead of resizing the whole image")
    augmentations: tuple[str, ...] | None = option(None, choices=AUGMENTATIONS, help="random changes of each image")
    augmentation_variants: int = option(
        8, at_least=1, below=257, help="changed versions of each image kept for a latent base, drawn from in each step"
    )
    declared_public: bool = option(False, help="you declare these images public, nothing in them needs protection")
    group_column: str | None = option(
        None, longest=MAX_TEXT, help="column that says whose image it is; the promise is for all of one's"
    )
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
    rows_per_class: int | None = option(
        None,
        at_least=1,
        below=MAX_ROWS_PER_CLASS + 1,
        help="of code_moments: rows drawn for each class; none: all spare",
    )
    license: str | None = option(None, longest=40, help="licence of the exported weights, by its name on the Hub")

    @property
    def rows_in_turn(self) -> tuple[int, ...]:
        """Rows of the class table that images take in turn: entry i is of class i % C; none without class rows."""
        first = self.class_rows or ()
        return tuple(row + draw * len(first) for draw in range(self.rows_per_class or 1) for row in first)


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
    unpaid_runs: int | None = option(
        None, at_least=1, below=100_001, help="earlier runs that chose these options and that epsilon is not for; told"
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
    optimizer: str = option(
        "adam", choices=("sgd", "adam", "adam_bc"), help="what turns noisy means into updates; bc: DP bias correction"
    )
    momentum: float = option(0.0, at_least=0, below=1, help="of sgd")
    bias_correction_floor: float = option(
        0.01, above=0, help="of adam_bc: least second moment, as a share of the noise variance"
    )
    lr_scheduler: str = option("constant", choices=("constant", "linear", "cosine"), help="decay of the step size")
    lr_warmup_steps: int = option(0, at_least=0, help="updates of linear warm-up")
    noise_multiplicity: int = option(4, at_least=1, help="diffusion draws averaged in each example; costs no privacy")
    augmentation_multiplicity: int = option(
        1, at_least=1, help="changed versions averaged in each example, each under all noise draws; costs no privacy"
    )
    timestep_distribution: str | None = option(
        None, choices=TIMESTEP_DISTRIBUTIONS, help="of noise levels; none: uniform, for a base with EDM log_normal"
    )
    timestep_range: tuple[int, ...] | None = option(
        None, at_least=0, help="first timestep, and one past the last, that are drawn; none: all"
    )
    timestep_edges: tuple[int, ...] = option((0, 30, 600, 1000), at_least=0, help="of mixture: ends of its intervals")
    timestep_weights: tuple[float, ...] = option(
        (0.03, 0.57, 0.4), above=0, help="of mixture: share of draws in each interval"
    )
    p_mean: float = option(-1.2, at_least=-20, below=20, help="of log_normal: mean of log sigma")
    p_std: float = option(1.2, above=0, below=10, help="of log_normal: standard deviation of log sigma")
    snr_gamma: float | None = option(None, above=0, help="cap of the signal-to-noise weight (Min-SNR); none: no weight")
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
    scheduler: str | None = option(
        None,
        help="fidelity (stochastic), utility (deterministic), or one of diffusers; none: fidelity, for EDM utility",
    )
    prompts: tuple[str, ...] | None = option(
        None,
        separator=";",
        longest=MAX_TEXT,
        help="prompts of the grids, for a text-conditional base; public, never private captions",
    )
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
