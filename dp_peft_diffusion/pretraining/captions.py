"""`kind: captions`: a small Stable Diffusion: a text encoder and a UNet on latents learn images with their captions."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from dp_peft_diffusion.diffusion.image_codes import on_canvas
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.pretraining.autoencoder import load_autoencoder, open_images
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.codes import known_codes
from dp_peft_diffusion.pretraining.denoising import denoising_loss
from dp_peft_diffusion.pretraining.folder import BASE, to_bytes, write_pipeline
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import (
    build_scheduler,
    build_text_encoder,
    build_text_unet,
    encode,
    latent_shape,
)
from dp_peft_diffusion.pretraining.vocabulary import make_tokenizer
from dp_peft_diffusion.recipe import PretrainRecipe

TEXT_NOISE = 0.3  # per coordinate of what the text encoder says, which has root mean square 1
READ_MORE = 3  # captions that the text encoder reads besides those of the images, for each of these
WORD_CODE = 32  # numbers that stand for a word, at random
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


class Captions:
    """The text encoder also learns what the image of a caption looks like, and to tell all words apart.

    From random weights a UNet ignores what it is told for thousands of updates, since it says nothing. So a layer of
    the UNet, `encoder_hid_proj`, gives a prompt's code: `class_code_rank` numbers that say from the first hundreds of
    updates on what the image looks like. Noise makes the net smooth between codes, and keeps room in what the text
    encoder says for words that mean nothing yet: an adapter of that layer gives them a meaning.
    """

    folder = BASE

    def __init__(self, recipe: PretrainRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.images: PublicImages | Characters = open_images(recipe)
        self.vae = load_autoencoder(str(recipe.vae)).to(device)
        self.scheduler = build_scheduler(recipe)
        self.objective = make_objective(self.scheduler)
        self.tokenizer = make_tokenizer(self.images.captions, recipe.spare_words or (), recipe.text_tokens)
        unet, text = self._new_nets()
        code, unet.encoder_hid_proj = unet.encoder_hid_proj, nn.Identity()  # noise comes before it while training
        generator = torch.Generator().manual_seed(recipe.seed)
        sketch, self.sums, self.counts = known_codes(self.images, recipe, generator)
        self.known = self.counts.nonzero().flatten()
        recall = nn.Linear(recipe.text_width, WORD_CODE)
        nets = {"unet": unet, "text": text, "code": code, "sketch": sketch, "recall": recall}
        self.trained = nn.ModuleDict(nets).to(device)
        self.words = torch.randn(len(self.tokenizer), WORD_CODE, generator=generator).to(device)
        self.words[self.tokenizer.all_special_ids] = 0

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean denoising loss of one batch, and the errors of what its captions say of the images and of themselves."""
        images, classes = self.images.draw(generator)
        images = images.to(self.device)
        others = self.known[torch.randint(len(self.known), (READ_MORE * len(classes),), generator=generator)]
        read = torch.cat([classes, others])
        captions, kept = drop([self.images.captions[c] for c in read.tolist()], self.recipe, generator)
        tokens = self.tokens(captions)
        hidden = self.trained["text"](tokens).last_hidden_state  # (b + others, T, D)
        hidden = hidden + TEXT_NOISE * torch.randn(len(hidden), 1, hidden.shape[2], generator=generator).to(self.device)
        codes, ended = self.trained["code"](hidden), tokens == self.tokenizer.eos_token_id
        unlike = _error(codes, self.true_codes(images, read, kept), ended)
        forgotten = _error(self.trained["recall"](hidden), self.word_codes(tokens), ended)
        told = codes[: len(classes)]
        clean = self.vae.config.scaling_factor * encode(self.vae, images)
        error = denoising_loss(self.trained["unet"], self.objective, clean, generator, encoder_hidden_states=told)
        return error + unlike + forgotten

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Token ids of captions, (b, T)."""
        found = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return found.input_ids.to(self.device)

    def word_codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """What stands for the words of prompts, (b, WORD_CODE): the sum of random numbers of each, at unit variance."""
        words = self.words[tokens]  # (b, T, WORD_CODE)
        return words.sum(dim=1) / words.any(dim=2).sum(dim=1, keepdim=True).clamp(min=1).sqrt()

    def true_codes(self, images: torch.Tensor, read: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """What captions should say, (n, rank): the mean code of their class; nothing where they are not kept.

        images: of the first of `read`, the classes of the captions; they count beside those known before.
        """
        sums, counts = self.sums[read].to(self.device), self.counts[read].to(self.device)
        sums[: len(images)] += self.trained["sketch"](on_canvas(images))
        counts[: len(images)] += 1
        return sums * (kept.to(self.device) / counts)[:, None]

    def export(self, ema: dict[str, torch.Tensor], output_dir: Path) -> None:
        """Write the averaged weights as a StableDiffusionPipeline, and a grid of images above samples of theirs."""
        unet, text = self._new_nets()
        for net, part in ((unet, "unet"), (text, "text"), (unet.encoder_hid_proj, "code")):
            weights = {name.removeprefix(f"{part}."): ema[name] for name in ema if name.startswith(f"{part}.")}
            net.load_state_dict(weights, strict=part != "unet")  # whose text layer comes last
        shown = torch.arange(32) * len(self.images) // 32
        pictures, captions = to_bytes(self.images.read(shown)), self.images.captions_of(shown)
        scheduler = DDIMScheduler.from_config(self.scheduler.config, steps_offset=1, set_alpha_to_one=False)
        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=text, tokenizer=self.tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        write_pipeline(self.recipe, output_dir, pipeline, pictures, captions, self.device)

    def _new_nets(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        channels, side = latent_shape(self.vae, self.recipe)
        return build_text_unet(self.recipe, side, channels), build_text_encoder(self.recipe, self.tokenizer)


def _error(said: torch.Tensor, true: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """Mean squared error of (b, T, n) from (b, n) over the tokens that have seen all of their prompt."""
    return ((said - true[:, None]).square().mean(dim=2) * ended).sum() / ended.sum()


def drop(captions: list[str], recipe: PretrainRecipe, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
    """Captions, of which about `label_dropout` say nothing: half of these are empty, half words without a meaning.

    So words that the base does not know draw no image in particular, and a private class can take them.
    Also tells which are kept, (b,).
    """
    share, chance = recipe.label_dropout, torch.rand(len(captions), generator=generator)
    told = [
        caption if draw > share else "" if draw > share / 2 else nonsense(recipe.spare_words or (), generator)
        for caption, draw in zip(captions, chance.tolist(), strict=True)
    ]
    return told, chance > share


def nonsense(spare_words: tuple[str, ...], generator: torch.Generator) -> str:
    """One to four words: spare ones, digits, and up to six random letters."""

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def word() -> str:
        known = (*spare_words, *DIGITS)
        if below(3):
            return known[below(len(known))]
        return "".join(LETTERS[below(26)] for _ in range(1 + below(6)))

    return " ".join(word() for _ in range(1 + below(4)))
