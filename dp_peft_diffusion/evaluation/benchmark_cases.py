"""What `dp-peft bench` compares: named model sizes, methods, and one measurement as a record. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from dp_peft_diffusion.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGET_MODULES = {"lora": ATTENTION, "lora_conv": (*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj")}
METHODS = {
    "floor": "no adapter: forward, and backward to the noisy input only",
    "peft": "stock peft LoRA without privacy: mean loss, backward into the adapter",
    "ours": "PerSampleClipper.clipped_sum_of",
    "vmap": "torch.func: vmap(grad), clipped and summed",
    "opacus_hooks": "Opacus GradSampleModule, DPOptimizer.clip_and_accumulate",
    "opacus_ghost": "Opacus GradSampleModuleFastGradientClipping, two backward passes",
    "step": "ours with Poisson sampling, keyed draws, keyed noise and Adam",
}
MEMORY_FORMATS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class ModelSize:
    """A diffusers model of random weights.

    model_class: its name in diffusers.
    config: arguments of the class; `sample_size` pixels or latents a side.
    batch_size: examples in one step, unless another number is asked for.
    ranks: adapter -> LoRA rank.
    text_tokens: tokens of the made-up text embedding of each example; 0 for a model without text.
    """

    model_class: str
    config: dict[str, Any]
    batch_size: int
    ranks: dict[str, int]
    text_tokens: int = 0


MODELS = {
    "unet2d-4.6m": ModelSize(
        "UNet2DModel",
        {
            "sample_size": 32,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (64, 128, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        batch_size=32,
        ranks={"lora": 8, "lora_conv": 8},
    ),
    "unet2dcond-60m": ModelSize(
        "UNet2DConditionModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (128, 320, 384),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 8,  # heads, in this class
            "cross_attention_dim": 768,
        },
        batch_size=8,
        ranks={"lora": 8, "lora_conv": 2},
        text_tokens=77,
    ),
    "tiny": ModelSize(
        "UNet2DModel",
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
        batch_size=4,
        ranks={"lora": 2, "lora_conv": 2},
    ),
}


@dataclass(frozen=True)
class Case:
    """One measurement, as it is sent to the process that makes it.

    model: a key of MODELS.
    method: a key of METHODS.
    adapter: a key of TARGET_MODULES.
    batch_size: examples held at once.
    noise_multiplicity: K, draws of each example.
    mixed_precision: "no", or "bf16" for a forward under autocast.
    memory_format: of the model's weights, one of MEMORY_FORMATS.
    gradient_checkpointing: recompute activations in the backward.
    threads: of torch; None leaves it to torch.
    warmups, repeats: steps before the clock runs, and timed steps.
    logical_batch: examples of one step in micro-batches of batch_size, for "ours"; None is one micro-batch.
    check: compare with the one-by-one loop, after everything is measured.

    Raises:
        UserError: a name that is not known, or a number below 1.
    """

    model: str
    method: str
    adapter: str = "lora"
    batch_size: int = 32
    noise_multiplicity: int = 1
    mixed_precision: str = "no"
    memory_format: str = "contiguous"
    gradient_checkpointing: bool = False
    threads: int | None = None
    warmups: int = 2
    repeats: int = 5
    logical_batch: int | None = None
    check: bool = False

    def __post_init__(self) -> None:
        named = (
            ("model", self.model, tuple(MODELS)),
            ("methods", self.method, tuple(METHODS)),
            ("adapter", self.adapter, tuple(TARGET_MODULES)),
            ("mixed_precision", self.mixed_precision, ("no", "bf16")),
            ("memory_format", self.memory_format, MEMORY_FORMATS),
        )
        for option, value, known in named:
            if value not in known:
                raise UserError(f"--{option} {value!r} is unknown. Choose from: {', '.join(known)}.")
        for option in ("batch_size", "noise_multiplicity", "threads", "repeats", "logical_batch"):
            number = getattr(self, option)
            if number is not None and number < 1:
                raise UserError(f"--{option} {number} must be 1 or more.")
