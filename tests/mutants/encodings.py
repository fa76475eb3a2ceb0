"""What looks at how records become the network's inputs: latents, captions, changed versions, the cache.

It takes a seed and raises AssertionError with a sentence.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from mutants.bookkeeping import scratch
from mutants.tiny_run import MEMORY, key_of
from tiny_bases import TOKENS, stable_diffusion_1
from tiny_models import tiny_image_folder

from dp_peft_diffusion.diffusion.augmentation import augment
from dp_peft_diffusion.diffusion.base_model import BaseModel, load_base
from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.recipe import Data


@functools.cache
def _base() -> BaseModel:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        return load_base(str(stable_diffusion_1(Path(folder) / "base")))


def encodings(seed: int) -> None:
    """A record is encoded alone, in one shape, scaled by the config; and read from a cache of these very records."""
    base, draw = _base(), torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, 16, 16, generator=draw) * 2 - 1
    scale, latents = base.vae.config.scaling_factor, base.encode(images)
    with torch.no_grad():
        means = torch.cat([base.vae.encode(image[None]).latent_dist.mode() for image in images])
    assert torch.equal(latents, means * scale), "a latent is not the autoencoder's mean, scaled by the config"
    assert torch.equal(base.encode(images[1:2]), latents[1:2]), "a latent depends on its company"
    prompts = ["a", "cat dog b c"]
    alone = [base.text.encode([prompt])["encoder_hidden_states"] for prompt in prompts]
    assert all(one.shape[1] == TOKENS for one in alone), "a caption is not padded to the longest there can be"
    assert torch.equal(base.text.encode(prompts)["encoder_hidden_states"], torch.cat(alone)), (
        "a caption's embedding depends on its company"
    )
    ids, names = np.array([4, 9, 2]), ("flip", "crop", "shift", "color")
    together = augment(images, names, key_of(seed), 3, ids, 2)
    for place in range(3):
        one = augment(images[place : place + 1], names, key_of(seed), 3, ids[place : place + 1], 2)
        assert torch.equal(one[0], together[place]), "a changed version depends on its place in the batch"
    with scratch() as folder:
        tiny_image_folder(folder / "images", {"dark": 60, "light": 190}, 2)
        data, pixels = Data(dataset_name=str(folder / "images")), PixelEncoder(8, 1)
        before = open_examples(data, pixels, folder / "cache").read([3]).clean
        (folder / "images" / "light" / "1.png").write_bytes((folder / "images" / "dark" / "0.png").read_bytes())
        after = open_examples(data, pixels, folder / "cache").read([3]).clean
    assert not torch.equal(before, after), "a cache of other images is read"
