"""`kind: codes`: a UNet learns to draw the image whose code it is told."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from dp_peft_diffusion.diffusion.base_folder import load_part, read_settings
from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel, save_base
from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.diffusion.image_codes import ENCODER, CodeEncoder
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.diffusion.samplers import sample_images
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.denoising import denoising_loss
from dp_peft_diffusion.pretraining.folder import BASE, finished_base, to_bytes, write_pairs
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import build_scheduler, build_unet
from dp_peft_diffusion.privacy.model_files import BUILTIN_BASES
from dp_peft_diffusion.recipe import PretrainRecipe

CODE_NOISE = 0.25  # per coordinate, where codes have root mean square 1: the net draws well between public codes
BATCHES_FOR_CODES = 80  # of public images, from which the directions of codes are taken
SKETCH_SHARE = 4  # one in so many numbers of a code is of the sketch
PAIRS = 32  # images above what is drawn of their codes, in the grid
BUILTIN = "builtin:"


class Codes:
    """The encoder is a feature net that stays as it is; how its codes become rows trains together with the UNet.

    The class table has the null row and spare rows, all of them zeros: the UNet is told rows while it trains.
    """

    folder = BASE

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images = Characters(recipe, soften=False) if recipe.characters else PublicImages(recipe)
        self.scheduler = build_scheduler(recipe)
        self.objective = make_objective(self.scheduler)
        unet = self._new_unet()
        self.encoder = make_encoder(recipe, unet.class_embedding.embedding_dim)
        generator = torch.Generator().manual_seed(recipe.seed)
        self.encoder.fit([self.images.draw(generator)[0] for _ in range(BATCHES_FOR_CODES)])
        unet.class_embedding = nn.Identity()  # rows come from the encoder while training
        self.trained = nn.ModuleDict({"unet": unet, "encoder": self.encoder}).to(device)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean denoising loss of one batch, each image with its own noisy code, or none."""
        recipe, encoder = self.recipe, self.encoder
        images, _ = self.images.draw(generator)
        with torch.no_grad():
            codes = encoder(images.to(self.device))  # (b, d)
        noise = CODE_NOISE * torch.randn(codes.shape, generator=generator) * codes.shape[1] ** -0.5
        kept = torch.rand(len(codes), 1, generator=generator) >= recipe.label_dropout
        rows = kept.to(self.device) * encoder.rows(codes + noise.to(self.device))
        clean = F.pixel_unshuffle(images, recipe.pixel_packing).to(self.device)
        return denoising_loss(self.trained["unet"], self.objective, clean, generator, class_labels=rows)

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights as a base, and a grid of public images above what is drawn of their codes."""
        recipe, unet = self.recipe, self._new_unet()
        weights = {n.removeprefix("unet."): ema[n] for n in ema if n.startswith("unet.")}
        table = torch.zeros_like(unet.class_embedding.weight)
        unet.load_state_dict({**weights, "class_embedding.weight": table})
        encoder = CodeEncoder.from_config(self.encoder.config)
        encoder.load_state_dict({n.removeprefix("encoder."): ema[n] for n in ema if n.startswith("encoder.")})
        encoder.save_pretrained(output_dir / BASE / ENCODER)
        layout = BaseLayout(recipe.pixel_packing, 0, (1, 1 + recipe.spare_classes), recipe.class_code_rank)
        save_base(output_dir / BASE, unet, self.scheduler, layout)
        self._write_grid(finished_base(recipe, output_dir, self.device), output_dir)

    def _write_grid(self, base: BaseModel, output_dir: Path) -> None:
        assert base.codes is not None  # as it was written
        base.unet.class_embedding = nn.Identity()  # it is told rows that are in no table
        generator, batches = torch.Generator().manual_seed(0), -(-PAIRS // self.recipe.train_batch_size)
        images = torch.cat([self.images.draw(generator)[0] for _ in range(batches)])[:PAIRS].to(self.device)
        with torch.no_grad():
            told = {"class_labels": base.codes.rows(base.codes(images))}
        drawn = sample_images(base, told, num_images=len(images), seed=0, scheduler="fidelity", device=self.device)
        write_pairs(to_bytes(images), drawn, output_dir)

    def _new_unet(self) -> UNet2DModel:
        recipe = self.recipe
        side, channels = recipe.resolution // recipe.pixel_packing, recipe.image_channels * recipe.pixel_packing**2
        return build_unet(recipe, side, channels, 1 + recipe.spare_classes)


def make_encoder(recipe: PretrainRecipe, row_size: int) -> CodeEncoder:
    """An encoder on the recipe's feature net, which is frozen; where its codes point is not known yet.

    Raises:
        UserError: there is no such net, it takes other images, or it has fewer features than codes have numbers.
    """
    name = str(recipe.features)
    folder = BUILTIN_BASES / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name)
    settings = read_settings(folder / "config.json")
    if settings is None or settings.get("_class_name") != FeatureNet.__name__:
        raise UserError(
            f"--features {name!r} holds no net made by dp-peft pretrain --kind features. Type for example --features "
            f"{BUILTIN}handwriting_features, or make one."
        )
    net = load_part(FeatureNet, folder, name)
    of_net = {key: net.config[key] for key in ("resolution", "image_channels")}
    if of_net != (wanted := {key: getattr(recipe, key) for key in of_net}):
        raise UserError(f"--features {name!r} takes images of {of_net}, and the recipe says {wanted}. Make them agree.")
    size, features = recipe.class_code_rank, net.config.block_out_channels[-1]
    sketch_size = size // SKETCH_SHARE
    if not 0 < sketch_size <= size - sketch_size <= features:
        raise UserError(
            f"--class_code_rank {size}: a quarter of a code is a sketch, the rest are features, of which --features "
            f"{name!r} has {features}. Take {SKETCH_SHARE} to {features + features // (SKETCH_SHARE - 1)}."
        )
    shape = {key: value for key, value in net.config.items() if not key.startswith("_")}
    encoder = CodeEncoder(code_size=size, sketch_size=sketch_size, row_size=row_size, **shape)
    encoder.features.load_state_dict(net.state_dict())
    encoder.features.requires_grad_(False)
    encoder.shown.requires_grad_(False)
    encoder.sketch.requires_grad_(False)
    return encoder
