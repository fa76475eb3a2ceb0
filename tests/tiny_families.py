"""Tiny diffusers models of six families, adapters of every kind, and denoising losses: what the proofs run on.

Kinds are written out here as plain peft configs, not taken from the package, so that a proof stands on its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "pos_embed.proj"]
HOOKED = ("lora", "lora_conv", "ffa_lora", "rslora", "bitfit", "norm", "attention", "full")
RAW = ("dora", "ia3", "lokr", "oft", "vera")  # their weights are parameters that no layer is called with
KINDS = HOOKED + RAW
SIDE, CHANNELS, TOKENS, TEXT = 8, 4, 3, 8


class Family(NamedTuple):
    """make: () -> model. predict: (model, x (n, c, s, s), t (n,), text (n, tokens, 8)) -> (n, c, s, s)."""

    make: Callable[[], nn.Module]
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def conditional_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        num_layers=2,
        sample_size=SIDE,
        num_embeds_ada_norm=6,
    )


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=SIDE,
        use_additional_conditions=False,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )


def predict_by_text(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]


def predict_by_sd3(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x, text, text.mean(dim=1), t, return_dict=False)[0]


def predict_by_flux(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    tokens = x.flatten(2).mT  # (n, s * s, c)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))
    found = model(tokens, text, text.mean(dim=1), t / 1000, places, torch.zeros(TOKENS, 3), return_dict=False)[0]
    return found.mT.unflatten(2, (SIDE, SIDE))


FAMILIES = {
    "UNet2DModel": Family(unet, lambda model, x, t, text: model(x, t).sample),
    "UNet2DConditionModel": Family(conditional_unet, predict_by_text),
    "DiT": Family(dit, lambda model, x, t, text: model(x, t, class_labels=t % 6).sample),
    "PixArt": Family(pixart, predict_by_text),
    "SD3": Family(sd3, predict_by_sd3),
    "Flux": Family(flux, predict_by_flux),
}


def norm_names(model: nn.Module) -> list[str]:
    """Normalisation layers that have a weight."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("GroupNorm", "LayerNorm", "RMSNorm") and module.weight is not None
    ]


def convolution_names(model: nn.Module) -> list[str]:
    """The attention Linears, and those of CONVOLUTION that the model has."""
    return [name for name, _ in model.named_modules() if name.endswith((*ATTENTION, *CONVOLUTION))]


def has_kind(model: nn.Module, kind: str) -> bool:
    """Whether there is something in the model for a kind to adapt."""
    if kind == "norm":
        return bool(norm_names(model))
    if kind == "lora_conv":
        return any(name.endswith(tuple(CONVOLUTION)) for name in convolution_names(model))
    return True


def peft_config(model: nn.Module, kind: str):
    lora = dict(r=2, lora_alpha=3, target_modules=ATTENTION)
    configs = {
        "lora": lambda: LoraConfig(**lora),
        "lora_conv": lambda: LoraConfig(**lora | dict(target_modules=convolution_names(model))),
        "ffa_lora": lambda: LoraConfig(**lora),
        "rslora": lambda: LoraConfig(**lora, use_rslora=True),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
        "bitfit": lambda: LoraConfig(**lora | dict(r=1), bias="all"),
        "ia3": lambda: IA3Config(target_modules=ATTENTION, feedforward_modules=[]),
        "lokr": lambda: LoKrConfig(r=2, alpha=3, target_modules=ATTENTION),
        "loha": lambda: LoHaConfig(r=2, alpha=3, target_modules=ATTENTION),
        "oft": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION),
        "vera": lambda: VeraConfig(r=2, target_modules=ATTENTION, d_initial=0.1),
        "norm": lambda: LNTuningConfig(target_modules=norm_names(model)),
        "attention": lambda: LNTuningConfig(target_modules=ATTENTION),
    }
    return configs[kind]()


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """Freeze, inject, and move what trains off its start: at B = 0 every gradient of A is zero and shows nothing."""
    model.requires_grad_(False)
    if kind == "full":
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, peft_config(model, kind)).base_model.model
    frozen = {"ffa_lora": ("lora_A",), "bitfit": ("lora_A", "lora_B")}.get(kind, ())
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def tiny_model(family: str, kind: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return adapted(FAMILIES[family].make(), kind)


def made_up_batch(b: int, k: int, seed: int = 2) -> dict[str, Tensor]:
    """b made-up examples with k draws in each: images (b, ...), noise (b, k, ...), timesteps (b, k), text (b, ...)."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(b, CHANNELS, SIDE, SIDE, generator=draw),
        "noise": torch.randn(b, k, CHANNELS, SIDE, SIDE, generator=draw),
        "timesteps": torch.randint(0, 1000, (b, k), generator=draw),
        "text": torch.randn(b, TOKENS, TEXT, generator=draw),
    }


class DenoisingLoss(NamedTuple):
    """loss_fn(model, batch) -> (b,): each the mean over its k draws of a squared error.

    stacked: one forward of b * k rows, example-major; otherwise k forwards of b rows, so that layers are called twice.
    one_text: all rows see the same text, expanded from one row.
    autocast: of the forward; None for float32.
    """

    family: str
    stacked: bool = True
    one_text: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    autocast: torch.dtype | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        b, k = batch["timesteps"].shape
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            if self.stacked:
                rows = self._rows(model, batch, batch["noise"].flatten(0, 1), batch["timesteps"].flatten(), k)
                return rows.view(b, k).mean(dim=1)
            draws = [self._rows(model, batch, batch["noise"][:, j], batch["timesteps"][:, j], 1) for j in range(k)]
            return torch.stack(draws).mean(dim=0)

    def _rows(self, model: nn.Module, batch: dict[str, Tensor], noise: Tensor, timesteps: Tensor, k: int) -> Tensor:
        x = (batch["images"].repeat_interleave(k, dim=0) + noise).contiguous(memory_format=self.memory_format)
        text = batch["text"].repeat_interleave(k, dim=0)
        if self.one_text:
            text = torch.linspace(-1, 1, TOKENS * TEXT).view(1, TOKENS, TEXT).expand(len(x), -1, -1)
        predicted = FAMILIES[self.family].predict(model, x, timesteps, text)
        return (predicted.float() - noise).square().flatten(1).mean(dim=1)
