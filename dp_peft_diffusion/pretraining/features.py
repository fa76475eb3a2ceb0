"""`kind: features`: a small net learns to tell classes of public images apart, and is kept without its last layer."""

from pathlib import Path

import torch
from torch import nn

from dp_peft_diffusion.diffusion.feature_net import FeatureNet
from dp_peft_diffusion.durable import make_weights_readable
from dp_peft_diffusion.pretraining.autoencoder import open_images
from dp_peft_diffusion.recipe import PretrainRecipe

FEATURES = "features"  # sub-folder of the output folder
README = """# Made by `dp-peft pretrain`: NOT private

These weights were trained on {images}, taken as PUBLIC images, without any protection. Whoever has the weights may find
those images in them. No epsilon belongs to this folder. If the images were not public, delete it.

It holds a net that gives {features} features of {side} x {side} {colour} images. `dp-peft evaluate` compares synthetic
with real images in such features. The distances have the name of these features, and none of them is an FID.
"""


class Recognition:
    """`kind: features`. Characters count as eight classes each, since 6 and 9 must not look alike."""

    folder = FEATURES

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images = open_images(recipe)
        head = nn.Linear(recipe.block_out_channels[-1], self.images.num_classes)
        self.trained = nn.ModuleDict({"net": self._new_net(), "head": head}).to(device)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean cross-entropy of the classes of one batch."""
        images, classes = self.images.draw(generator)
        told = self.trained["head"](self.trained["net"](images.to(self.device)))
        return nn.functional.cross_entropy(told, classes.to(self.device))

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights without the last layer, which only knows the public classes."""
        net, recipe = self._new_net(), self.recipe
        net.load_state_dict({name.removeprefix("net."): ema[name] for name in ema if name.startswith("net.")})
        net.save_pretrained(output_dir / self.folder)
        make_weights_readable(output_dir / self.folder)
        colour = "grey" if recipe.image_channels == 1 else "colour"
        images, features = Path(recipe.dataset_name).name, recipe.block_out_channels[-1]
        text = README.format(images=images, features=features, side=recipe.resolution, colour=colour)
        (output_dir / self.folder / "README.md").write_text(text)

    def _new_net(self) -> FeatureNet:
        recipe = self.recipe
        return FeatureNet(
            resolution=recipe.resolution,
            image_channels=recipe.image_channels,
            pixel_packing=recipe.pixel_packing,
            block_out_channels=recipe.block_out_channels,
            layers_per_block=recipe.layers_per_block,
            norm_num_groups=recipe.norm_num_groups,
            trained_on=Path(recipe.dataset_name).name,  # not where it lay on somebody's machine
        )
