"""The nets that are pretrained, and their noise schedules, as a recipe describes them."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dp_peft_diffusion.diffusion.schedules import LATENT_STD, PIXEL_STD
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import PretrainRecipe

WORD_STD = 0.3  # of the weights of a word at first: they should be heard beside those of its place


def build_unet(recipe: PretrainRecipe, sample_size: int, channels: int, table_rows: int | None) -> UNet2DModel:
    """A UNet of random weights on inputs (channels, sample_size, sample_size).

    table_rows: rows of its class table; None for a UNet without classes.
    """
    levels = range(len(recipe.block_out_channels))
    attention, resnet = recipe.attention_levels or (), recipe.resblock_updown
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=recipe.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if level in attention else down for level in levels),
        up_block_types=tuple("AttnUpBlock2D" if level in attention else up for level in reversed(levels)),
        downsample_type="resnet" if resnet else "conv",
        upsample_type="resnet" if resnet else "conv",
        resnet_time_scale_shift="scale_shift" if recipe.scale_shift_norm else "default",
        attention_head_dim=recipe.attention_head_dim,
        norm_num_groups=recipe.norm_num_groups,
        dropout=recipe.dropout,
        num_class_embeds=table_rows,
    )


def build_text_unet(recipe: PretrainRecipe, sample_size: int, channels: int) -> UNet2DConditionModel:
    """A UNet of random weights that attends to prompts, each token of which it is told in class_code_rank numbers.

    All text passes one layer, `encoder_hid_proj`: a LoRA there teaches words with few numbers.
    """
    levels = range(len(recipe.block_out_channels))
    attention = recipe.attention_levels or ()
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=recipe.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)),
        # diffusers calls the number of heads so
        attention_head_dim=tuple(max(1, width // recipe.attention_head_dim) for width in recipe.block_out_channels),
        norm_num_groups=recipe.norm_num_groups,
        resnet_time_scale_shift="scale_shift" if recipe.scale_shift_norm else "default",
        dropout=recipe.dropout,
        cross_attention_dim=recipe.class_code_rank,
        encoder_hid_dim=recipe.text_width,
        encoder_hid_dim_type="text_proj",
    )


def build_text_encoder(recipe: PretrainRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of random weights for the tokenizer's tokens; each of its answers has root mean square 1."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_width // 16,
        max_position_embeddings=recipe.text_tokens,
        projection_dim=recipe.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=WORD_STD)
    encoder.final_layer_norm.requires_grad_(False)
    return encoder


def build_autoencoder(recipe: PretrainRecipe) -> AutoencoderKL:
    """A KL autoencoder of random weights; each level but the first halves the side."""
    levels = range(len(recipe.block_out_channels))
    attention = recipe.attention_levels or ()
    down = ("AttnDownEncoderBlock2D" if level in attention else "DownEncoderBlock2D" for level in levels)
    up = ("AttnUpDecoderBlock2D" if level in attention else "UpDecoderBlock2D" for level in reversed(levels))
    return AutoencoderKL(
        in_channels=recipe.image_channels,
        out_channels=recipe.image_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=recipe.block_out_channels,
        layers_per_block=recipe.layers_per_block,
        latent_channels=recipe.latent_channels,
        norm_num_groups=recipe.norm_num_groups,
        sample_size=recipe.resolution,
    )


def build_scheduler(recipe: PretrainRecipe) -> DDPMScheduler | EDMEulerScheduler:
    """The noise schedule that the UNet is trained with."""
    latent = recipe.kind in ("latent", "captions")
    if recipe.prediction_type == "edm":
        return EDMEulerScheduler(sigma_data=LATENT_STD if latent else PIXEL_STD)
    return DDPMScheduler(
        beta_schedule=recipe.beta_schedule,
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        prediction_type=recipe.prediction_type,
        clip_sample=not latent,  # pixels end at -1 and 1, latents do not
    )


def latent_shape(vae: AutoencoderKL, recipe: PretrainRecipe) -> tuple[int, int]:
    """(channels, side) of the latents of the recipe's images.

    Raises:
        UserError: images of this kind or size do not go into the autoencoder, or its latents not into the UNet.
    """
    halvings, levels = 2 ** (len(vae.config.block_out_channels) - 1), 2 ** (len(recipe.block_out_channels) - 1)
    if vae.config.in_channels != recipe.image_channels:
        raise UserError(
            f"--vae {recipe.vae} takes images of {vae.config.in_channels} channels. Type --image_channels "
            f"{vae.config.in_channels}."
        )
    if recipe.resolution % (halvings * levels):
        raise UserError(
            f"--resolution {recipe.resolution} is not a multiple of {halvings * levels}: the autoencoder divides the "
            f"side by {halvings}, and {len(recipe.block_out_channels)} levels of --block_out_channels by {levels}."
        )
    return vae.config.latent_channels, recipe.resolution // halvings


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Unscaled latents (b, z, h, w): the means of the posteriors of images (b, c, side, side), in float32."""
    with torch.autocast(images.device.type, enabled=False):
        return vae.encode(images).latent_dist.mode()
