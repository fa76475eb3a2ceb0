"""The choices of pretraining a base on public images."""

from dataclasses import dataclass

from dp_peft_diffusion.recipe.sections import MAX_SEED, MAX_TEXT, PREDICTION_TYPES
from dp_peft_diffusion.typed_fields import option

PRETRAIN_KINDS = ("handwriting", "pixel", "autoencoder", "latent", "captions", "features", "codes")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Every choice of pretraining a base on public images."""

    kind: str = option(
        "pixel",
        choices=PRETRAIN_KINDS,
        help="what is made: a UNet on pixels, latents, prompts or codes, an autoencoder, or features",
    )
    dataset_name: str = option(help="PUBLIC images: a folder, parquet files, a Hub name")
    split: str = option("train", help="split of the data set")
    image_column: str = option("image", help="column of the images")
    label_column: str | None = option("label", help="column of the labels; none trains without classes")
    caption_column: str | None = option(None, help="of captions: column of the captions, in place of labels")
    prompt_template: str = option("{label}", help="of captions: the caption of a class")
    center_crop: bool = option(False, help="cut the middle square out instead of resizing the whole image")
    random_flip: bool = option(False, help="mirror half of the images, left to right")
    characters: bool = option(
        False, help="of autoencoder, captions, features and codes: characters, changed at random as for handwriting"
    )
    invert: bool = option(False, help="of characters: the images are dark on light; the base learns light on dark")
    resolution: int = option(32, at_least=8, help="side of the images in pixels")
    image_channels: int = option(3, at_least=1, below=4, help="3: colour, 1: grey")
    vae: str | None = option(None, help="of latent and captions: the folder of an autoencoder")
    features: str | None = option(None, help="of codes: the folder of a feature net, or builtin:NAME")
    pixel_packing: int = option(1, at_least=1, help="side of the pixel blocks folded into channels")
    latent_channels: int = option(3, at_least=1, help="of autoencoder: channels of its latents")
    kl_weight: float = option(1e-6, at_least=0, help="of autoencoder: weight of KL beside the summed error")
    block_out_channels: tuple[int, ...] = option((32, 64, 96), at_least=1, help="width of each level of the net")
    layers_per_block: int = option(1, at_least=1, help="residual blocks in each level; of features: convolutions")
    attention_levels: tuple[int, ...] | None = option(
        None, at_least=0, help="levels with attention, 0 is the finest; none: only between the way down and up"
    )
    attention_head_dim: int = option(8, at_least=1, help="of a UNet: width of an attention head")
    norm_num_groups: int = option(8, at_least=1, help="groups of each group norm")
    scale_shift_norm: bool = option(False, help="of a UNet: the noise level scales features, besides shifting them")
    resblock_updown: bool = option(False, help="of a UNet: residual blocks between levels, in place of convolutions")
    dropout: float = option(0.0, at_least=0, below=1, help="of a UNet, while pretraining")
    class_code_rank: int = option(
        16, at_least=1, help="of handwriting: dimensions of the class table; of captions, codes: of what a UNet is told"
    )
    spare_classes: int = option(64, at_least=0, help="free rows of the class table, for private classes")
    spare_words: tuple[str, ...] | None = option(
        None, longest=MAX_TEXT, help="of captions: further words that are one token, without a meaning yet"
    )
    text_width: int = option(64, at_least=16, help="of captions: width of the text encoder, a multiple of 16")
    text_layers: int = option(2, at_least=1, help="of captions: layers of the text encoder")
    text_tokens: int = option(24, at_least=4, help="of captions: longest prompt")
    prediction_type: str = option("v_prediction", choices=PREDICTION_TYPES, help="what the UNet predicts")
    beta_schedule: str = option("squaredcos_cap_v2", choices=BETA_SCHEDULES, help="noise of each timestep; not of edm")
    beta_start: float = option(0.0001, above=0, below=1, help="of linear and scaled_linear: variance added at first")
    beta_end: float = option(0.02, above=0, below=1, help="of linear and scaled_linear: variance added at last")
    train_batch_size: int = option(128, at_least=1, help="images in one update")
    max_train_steps: int = option(4500, at_least=1, help="updates")
    learning_rate: float = option(1e-3, above=0, help="peak step size of Adam")
    lr_warmup_steps: int = option(200, at_least=0, help="updates of linear warm-up, before half a cosine down to 0")
    label_dropout: float = option(0.1, at_least=0, below=1, help="share of draws that see no label, for guidance")
    ema_decay: float = option(0.999, at_least=0, below=1, help="moving average of the weights")
    mixed_precision: str = option("no", choices=("no", "bf16"), help="precision of the net while pretraining")
    checkpointing_steps: int = option(500, at_least=1, help="updates between checkpoints, each with a grid of samples")
    seed: int = option(0, at_least=0, below=MAX_SEED, help="of everything")
