"""`kind: handwriting`: public characters, hard augmentation, and a class table of low rank."""

import math
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from dp_peft_diffusion.diffusion.base_model import BaseLayout
from dp_peft_diffusion.diffusion.glyphs import DIHEDRAL
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.denoising import denoising_loss
from dp_peft_diffusion.pretraining.folder import BASE, write_base
from dp_peft_diffusion.pretraining.networks import build_scheduler, build_unet
from dp_peft_diffusion.recipe import PretrainRecipe

CODE_NOISE = 0.2  # per coordinate, where a class code has root mean square 1


class ClassCodes(nn.Module):
    """A class table of low rank: row = null row + code / rms(code) @ directions.

    Every class lies on a sphere around the null row, and noise on the codes makes the net smooth
    between classes. A new class then needs `rank` numbers instead of a whole row, which is what
    private training of class rows is short of.
    """

    def __init__(self, codes: torch.Tensor, dim: int):
        super().__init__()
        num_classes, rank = codes.shape
        self.codes = nn.Parameter(codes)
        self.directions = nn.Parameter(torch.randn(rank, dim) / math.sqrt(rank))
        self.null = nn.Parameter(torch.zeros(dim))

    def unit_codes(self) -> torch.Tensor:
        """Codes with root mean square 1, (num_classes, rank)."""
        return self.codes * torch.rsqrt(self.codes.square().mean(dim=1, keepdim=True) + 1e-8)

    def forward(self, classes: torch.Tensor, dropped: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Rows (b, dim) of noisy codes; a dropped label is the null row."""
        codes = self.unit_codes()[classes] + CODE_NOISE * noise
        return self.null + torch.where(dropped[:, None], 0.0, codes) @ self.directions

    def table(self, num_spare: int) -> torch.Tensor:
        """The stock class table: public rows, the null row, and spare rows that start as the null row."""
        rows = self.null + self.unit_codes() @ self.directions
        return torch.cat([rows, self.null.expand(1 + num_spare, -1)]).detach()


class Handwriting:
    """Every character counts as eight classes: four quarter turns, each also mirrored."""

    folder = BASE

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images = Characters(recipe)
        self.scheduler = build_scheduler(recipe)
        self.objective = make_objective(self.scheduler)
        unet = self._new_unet()
        first = initial_codes(self.images.glyphs, self.images.labels, recipe.class_code_rank)
        codes = ClassCodes(first, unet.class_embedding.embedding_dim)
        unet.class_embedding = nn.Identity()  # rows come from `codes` while training
        self.trained = nn.ModuleDict({"unet": unet, "codes": codes}).to(device)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean denoising loss of one batch of augmented characters."""
        recipe, b = self.recipe, self.recipe.train_batch_size
        images, classes = self.images.draw(generator)
        clean = nn.functional.pixel_unshuffle(images, recipe.pixel_packing).to(self.device)
        dropped = torch.rand(b, generator=generator) < recipe.label_dropout
        code_noise = torch.randn(b, recipe.class_code_rank, generator=generator)
        rows = self.trained["codes"](*(tensor.to(self.device) for tensor in (classes, dropped, code_noise)))
        return denoising_loss(self.trained["unet"], self.objective, clean, generator, class_labels=rows)

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights as a base, and a grid of its samples."""
        recipe, null, unet = self.recipe, self.images.num_classes, self._new_unet()
        codes = ClassCodes(torch.zeros(null, recipe.class_code_rank), unet.class_embedding.embedding_dim)
        codes.load_state_dict({n.removeprefix("codes."): ema[n] for n in ema if n.startswith("codes.")})
        weights = {n.removeprefix("unet."): ema[n] for n in ema if n.startswith("unet.")}
        unet.load_state_dict({**weights, "class_embedding.weight": codes.table(recipe.spare_classes)})
        spare = (null + 1, null + 1 + recipe.spare_classes)
        layout = BaseLayout(recipe.pixel_packing, null, spare, recipe.class_code_rank)
        write_base(recipe, output_dir, unet, self.scheduler, layout, None, self.device)

    def _new_unet(self) -> UNet2DModel:
        recipe = self.recipe
        side, channels = recipe.resolution // recipe.pixel_packing, recipe.pixel_packing**2
        return build_unet(recipe, side, channels, self.images.num_classes + 1 + recipe.spare_classes)


def initial_codes(glyphs: torch.Tensor, characters: torch.Tensor, rank: int) -> torch.Tensor:
    """Codes (num_classes, rank) from the principal components of the mean images of the classes.

    Like characters start with like codes. Random codes teach the net nothing for thousands of steps:
    it learns to ignore them. Components count by the square root of their spread.
    """
    means = torch.stack([glyphs[characters == c].float().mean(dim=0) for c in range(int(characters.max()) + 1)])
    small = nn.functional.interpolate(means, size=(16, 16), mode="area")[:, 0]  # (characters, 16, 16)
    mirrored = [small, small.flip(2)]
    turned = torch.stack([torch.rot90(m, k, (1, 2)) for m in mirrored for k in range(DIHEDRAL // 2)], dim=1)
    offsets = turned.flatten(2).flatten(0, 1)  # (num_classes, 256), class = DIHEDRAL * character + turn
    left, spread, _ = torch.linalg.svd(offsets - offsets.mean(dim=0), full_matrices=False)
    codes = left[:, :rank] * spread[:rank].sqrt()
    return codes / codes.square().mean().sqrt()
