"""Tiny bases of every family on disk, made in process: what the Hub's bases are like, of a few thousand parameters.

BASES: name -> function that writes one into a folder and returns the folder. All images are 16x16.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dp_peft_diffusion.diffusion.image_codes import ENCODER, CodeEncoder

TOKENS, TEXT = 12, 8  # length and width of a prompt
# Byte-level BPE of lower-case letters and digits: each alone, and at the end of a word.
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


def tiny_unet2d(channels: int, num_class_embeds: int | None = None, side: int = 8) -> UNet2DModel:
    """A UNet2DModel with attention, of about 25,000 parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=num_class_embeds,
    )


def tiny_text_unet(pooled: int | None = None, width: int = TEXT) -> UNet2DConditionModel:
    """A UNet2DConditionModel of Stable Diffusion's kind; with `pooled`, of XL's."""
    torch.manual_seed(0)
    told = (
        {}
        if pooled is None
        else dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + pooled,
        )
    )
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=width,
        use_linear_projection=pooled is not None,
        **told,
    )


def tiny_autoencoder(kind: str = "kl", channels: int = 3) -> AutoencoderKL | VQModel:
    """An autoencoder from 16x16 images to 8x8 latents: of 4 channels ("kl"), or of 3 ("vq")."""
    torch.manual_seed(1)
    shared = dict(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    if kind == "vq":
        return VQModel(**shared, latent_channels=3, num_vq_embeddings=16, scaling_factor=1.0)
    return AutoencoderKL(**shared, latent_channels=4, sample_size=16, scaling_factor=0.5)


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of letters and two words, written to `folder` as the Hub's bases have it."""
    folder.mkdir(parents=True)
    pieces = [letter + end for end in ("", "</w>") for letter in _LETTERS] + ["".join(pair) for pair in _MERGES]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{' '.join(pair)}\n" for pair in _MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    names = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    names |= dict(pad_token="<|endoftext|>", model_max_length=TOKENS, tokenizer_class="CLIPTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_text_encoder(folder: Path, tokenizer: CLIPTokenizer, projection: int | None = None) -> None:
    """A CLIP text encoder of two layers; with `projection`, XL's second."""
    torch.manual_seed(2 if projection is None else 3)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).save_pretrained(folder)


def write(folder: Path, pipeline: str | None = None, index: dict | None = None, **parts: object) -> Path:
    """Parts of diffusers in their own folders, and model_index.json if the pipeline has a name."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    if pipeline is not None:
        listed = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **listed, **(index or {})}))
    return folder


def pixel(folder: Path) -> Path:
    """As google/ddpm-cifar10-32: unconditional, epsilon."""
    return write(folder, "DDPMPipeline", unet=tiny_unet2d(3, side=16), scheduler=DDPMScheduler())


def pixel_classes(folder: Path) -> Path:
    """As builtin:handwriting: grey pixels, packed; 9 public classes, a null row, 20 spare rows; v prediction."""
    write(folder, unet=tiny_unet2d(4, 30), scheduler=DDPMScheduler(prediction_type="v_prediction"))
    layout = {"pixel_packing": 2, "null_class": 9, "spare_classes": [10, 30], "class_code_rank": 4}
    (folder / "dp_peft_base.json").write_text(json.dumps(layout))
    return folder


def tiny_encoder(**config: object) -> CodeEncoder:
    """Codes of 4 numbers of grey 16x16 images, in the directions in which made-up ones vary most."""
    torch.manual_seed(4)
    shape = dict(code_size=4, sketch_size=2, row_size=32, resolution=16, block_out_channels=(8,), layers_per_block=1)
    encoder = CodeEncoder(**{**shape, "norm_num_groups": 2, **config})
    encoder.fit([public_images(64, encoder.config.image_channels, encoder.config.resolution)])
    return encoder.requires_grad_(False).eval()


def public_images(n: int, channels: int = 1, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Images (n, channels, side, side) in [-1, 1]: each a grey level, a slope and noise of its own."""
    draw = torch.Generator().manual_seed(seed)
    level, slope, noise = (torch.rand(n, channels, 1, 1, generator=draw) for _ in range(3))
    pixels = torch.randn(n, channels, side, side, generator=draw) * noise
    return (2 * level - 1 + (2 * slope - 1) * torch.linspace(-1, 1, side) + pixels).clamp(-1, 1)


def pixel_codes(folder: Path) -> Path:
    """As builtin:handwriting_codes: grey pixels, packed, told codes; a null row and 30 spare rows, all zeros."""
    unet = tiny_unet2d(4, 31)
    nn.init.zeros_(unet.class_embedding.weight)
    schedule = DDPMScheduler(prediction_type="v_prediction")
    write(folder, unet=unet, scheduler=schedule, **{ENCODER: tiny_encoder()})
    layout = {"pixel_packing": 2, "null_class": 0, "spare_classes": [1, 31], "class_code_rank": 4}
    (folder / "dp_peft_base.json").write_text(json.dumps(layout))
    return folder


def edm(folder: Path) -> Path:
    """Colour pixels, 10 spare class rows and a null row, EDM's preconditioning."""
    write(folder, unet=tiny_unet2d(3, 11, side=16), scheduler=EDMEulerScheduler(sigma_data=0.5))
    layout = {"pixel_packing": 1, "null_class": 10, "spare_classes": [0, 10], "class_code_rank": None}
    (folder / "dp_peft_base.json").write_text(json.dumps(layout))
    return folder


def latent(folder: Path) -> Path:
    """A UNet on the latents of an AutoencoderKL, with 3 public classes, a null row and 8 spare rows."""
    schedule = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    write(folder, unet=tiny_unet2d(4, 12), vae=tiny_autoencoder(), scheduler=schedule)
    layout = {"pixel_packing": 1, "null_class": 3, "spare_classes": [4, 12], "class_code_rank": None}
    (folder / "dp_peft_base.json").write_text(json.dumps(layout))
    return folder


def latent_vq(folder: Path) -> Path:
    """As CompVis/ldm-celebahq-256: unconditional, on the latents of a VQModel."""
    schedule = DDIMScheduler(clip_sample=False)
    return write(folder, "LDMPipeline", unet=tiny_unet2d(3), vqvae=tiny_autoencoder("vq"), scheduler=schedule)


def stable_diffusion_1(folder: Path) -> Path:
    """As stable-diffusion-v1-5: epsilon, one text encoder."""
    return _stable_diffusion(folder, PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True))


def stable_diffusion_2(folder: Path) -> Path:
    """As stable-diffusion-2-1: v prediction."""
    return _stable_diffusion(folder, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def stable_diffusion_xl(folder: Path) -> Path:
    """As stable-diffusion-xl-base-1.0: two text encoders, pooled text and sizes."""
    for which, projection in (("", None), ("_2", 6)):
        tiny_text_encoder(folder / f"text_encoder{which}", tiny_tokenizer(folder / f"tokenizer{which}"), projection)
    return write(
        folder,
        "StableDiffusionXLPipeline",
        {"force_zeros_for_empty_prompt": True, **_text_index("", "CLIPTextModel"), **_text_index("_2")},
        unet=tiny_text_unet(pooled=6, width=2 * TEXT),
        vae=tiny_autoencoder(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def _stable_diffusion(folder: Path, scheduler: object) -> Path:
    tiny_text_encoder(folder / "text_encoder", tiny_tokenizer(folder / "tokenizer"))
    nothing = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    index = {**nothing, **_text_index("", "CLIPTextModel")}
    parts = dict(unet=tiny_text_unet(), vae=tiny_autoencoder(), scheduler=scheduler)
    return write(folder, "StableDiffusionPipeline", index, **parts)


def _text_index(which: str, encoder: str = "CLIPTextModelWithProjection") -> dict:
    return {
        f"text_encoder{which}": ["transformers", encoder],
        f"tokenizer{which}": ["transformers", "CLIPTokenizer"],
    }


BASES: dict[str, Callable[[Path], Path]] = {
    each.__name__: each
    for each in (
        pixel,
        pixel_classes,
        pixel_codes,
        edm,
        latent,
        latent_vq,
        stable_diffusion_1,
        stable_diffusion_2,
        stable_diffusion_xl,
    )
}
