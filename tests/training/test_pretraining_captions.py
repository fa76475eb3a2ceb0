"""Pretraining on public images with captions: words, codes, the pipeline that comes out, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_documentation import check_command, command_lines
from transformers import CLIPTokenizer

from dp_peft_diffusion.diffusion.base_model import BUILTIN_BASES, load_base
from dp_peft_diffusion.diffusion.glyphs import DIHEDRAL
from dp_peft_diffusion.diffusion.image_codes import on_canvas
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining import folder, loop, pretrain
from dp_peft_diffusion.pretraining.captions import TEXT_NOISE, drop, nonsense
from dp_peft_diffusion.pretraining.characters import Characters
from dp_peft_diffusion.pretraining.checkpoints import write_checkpoint
from dp_peft_diffusion.pretraining.codes import Sketch, known_codes
from dp_peft_diffusion.pretraining.denoising import denoising_loss
from dp_peft_diffusion.pretraining.images import PublicImages
from dp_peft_diffusion.pretraining.networks import build_autoencoder, encode
from dp_peft_diffusion.pretraining.vocabulary import END, make_tokenizer, write_vocabulary
from dp_peft_diffusion.recipe import PretrainRecipe, load_pretrain_recipe, recipe_path, validate

CAPTIONS = ["Old Greek character12, turned left", "Korean character03, mirrored", "Korean"]


@pytest.fixture
def letters(tmp_path):
    """Two characters, dark on light, three drawings each: an L, and a ring."""
    for kind in ("Old_Greek", "Korean"):
        (tmp_path / "letters" / kind).mkdir(parents=True)
        for copy in range(3):
            image = Image.new("L", (40, 40), 255)
            draw = ImageDraw.Draw(image)
            if kind == "Old_Greek":
                draw.line((10, 8, 10, 30, 24 + copy, 30), width=3)
            else:
                draw.ellipse((8, 8 + copy, 32, 32), outline=0, width=3)
            image.save(tmp_path / "letters" / kind / f"{copy}.png")
    return str(tmp_path / "letters")


@pytest.fixture
def recipe(letters, tmp_path):
    """Captions on written characters, with the autoencoder that it needs."""
    autoencoder = PretrainRecipe(
        kind="autoencoder", dataset_name=letters, resolution=16, image_channels=1, characters=True, invert=True,
        latent_channels=4, block_out_channels=(4, 8), norm_num_groups=4,
        train_batch_size=4, max_train_steps=1, lr_warmup_steps=1,
    )  # fmt: skip
    build_autoencoder(autoencoder).save_pretrained(tmp_path / "vae")
    return validate(
        dataclasses.replace(
            autoencoder,
            kind="captions",
            vae=str(tmp_path / "vae"),
            latent_channels=3,
            block_out_channels=(8, 16),
            attention_levels=(0,),
            class_code_rank=6,
            spare_words=("digit", "zero"),
            text_width=16,
            text_layers=1,
            text_tokens=16,
            max_train_steps=4,
        )  # fmt: skip
    )


@pytest.fixture
def no_grid(monkeypatch):
    """Bases are written without samples, which take most of the time."""
    monkeypatch.setattr(folder, "sample_images", lambda *_, num_images, **__: torch.zeros(num_images, 1, 16, 16).byte())


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Codes of classes are known from fewer images, which is what takes the time."""
    monkeypatch.setattr("dp_peft_diffusion.pretraining.codes.IMAGES_FOR_CODES", 512)


@pytest.fixture
def task(recipe):
    torch.manual_seed(0)
    return loop.make_task(recipe, torch.device("cpu"))


def test_a_base_of_captions_is_a_stable_diffusion_pipeline_and_a_base_to_train_on(recipe, tmp_path):
    made = pretrain(recipe, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(made)
    pipeline.set_progress_bar_config(disable=True)
    one = pipeline("korean", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert (one.size, one.mode) == ((16, 16), "L") and pipeline.scheduler.config.prediction_type == "v_prediction"

    base = load_base(str(made))
    assert (base.is_latent, base.resolution, base.image_channels) == (True, 16, 1)
    prompts = ["korean", "the digit 3"]
    with torch.no_grad():
        ours = base.text.encode(prompts)["encoder_hidden_states"]
        stock = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    assert ours.shape == (2, 16, 16) and torch.allclose(ours, stock, atol=1e-6)
    assert Image.open(tmp_path / "out" / "samples.png").size == (2 * (8 * 17 + 1),) * 2  # 32 images above their samples


def test_what_is_written_tells_the_unet_what_training_told_it(recipe, tmp_path, no_grid):
    made = pretrain(dataclasses.replace(recipe, ema_decay=0.0), tmp_path / "out")  # the average is the last
    kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
    base, task = load_base(str(made)), loop.make_task(recipe, torch.device("cpu"))
    task.trained.load_state_dict({n.removeprefix("model."): v for n, v in kept.items() if n.startswith("model.")})
    hidden = base.text.encode(["korean, mirrored"])["encoder_hidden_states"]
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        said = task.trained["text"](task.tokens(["korean, mirrored"])).last_hidden_state
        assert torch.allclose(said, hidden, atol=1e-6) and torch.allclose(
            said.square().mean(dim=2), torch.ones(1, 16), atol=1e-3
        )
        expected = task.trained["unet"].eval()(noisy, times, task.trained["code"](said)).sample
        assert torch.allclose(base.unet(noisy, times, hidden).sample, expected, atol=1e-6)
        assert not torch.allclose(base.unet(noisy, times, 0 * hidden).sample, expected, atol=1e-6)


def test_an_interrupted_pretraining_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch, no_grid):
    recipe = dataclasses.replace(recipe, checkpointing_steps=2)

    def all_weights(made):
        return {
            f"{part.parent.name}.{n}": v for part in made.rglob("*.safetensors") for n, v in load_file(part).items()
        }

    whole = all_weights(pretrain(recipe, tmp_path / "whole"))

    def stop(*arguments):
        write_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "halves")
    halfway = all_weights(tmp_path / "halves" / "base")
    resumed = all_weights(pretrain(recipe, tmp_path / "halves"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for part in ("unet", "text_encoder"):
        assert any(not torch.equal(whole[n], halfway[n]) for n in whole if n.startswith(part))


def test_the_loss_is_that_of_denoising_of_codes_and_of_words_where_prompts_have_ended(task):
    generator, net = torch.Generator().manual_seed(5), task.trained
    images, classes = task.images.draw(generator)
    more = task.known[torch.randint(len(task.known), (12,), generator=generator)]
    classes = torch.cat([classes, more])
    names = [task.images.captions[c] for c in classes]
    captions, kept = drop(names, task.recipe, generator)
    captions[0], kept[0] = "", False
    noise = torch.randn(16, 1, 16, generator=generator)
    codes, unlike, forgotten = [], [], []
    for index, (caption, row) in enumerate(zip(captions, noise, strict=True)):
        own = net["sketch"](on_canvas(images[index : index + 1]))  # (1, rank), or (0, rank) without its image
        sketch = (own.sum(dim=0) + task.sums[classes[index]]) / (len(own) + task.counts[classes[index]])
        sketch = sketch if kept[index] else torch.zeros(6)
        words = task.tokenizer(caption).input_ids[1:-1]
        tokens = task.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        said = net["text"](tokens).last_hidden_state[0] + TEXT_NOISE * row
        bag = sum((task.words[word] for word in words), torch.zeros(32)) / max(1, len(words)) ** 0.5
        codes.append(net["code"](said))
        for token in range(len(words) + 1, 16):
            unlike.append((codes[-1][token] - sketch).square().mean())
            forgotten.append((net["recall"](said[token]) - bag).square().mean())
    latents = task.vae.config.scaling_factor * encode(task.vae, images)
    told = torch.stack(codes[:4])
    error = denoising_loss(net["unet"], task.objective, latents, generator, encoder_hidden_states=told)
    expected = error + torch.stack(unlike).mean() + torch.stack(forgotten).mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_peft_diffusion.pretraining.captions.drop", lambda *asked: drop(*asked) and (captions, kept))
        assert task.loss(torch.Generator().manual_seed(5)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_the_net_learns_to_listen(recipe):
    """After some updates the loss with the captions of other images is higher than with their own."""
    torch.manual_seed(0)
    task = loop.make_task(dataclasses.replace(recipe, train_batch_size=32), torch.device("cpu"))
    optimizer = torch.optim.Adam(task.trained.parameters(), lr=3e-3)
    for step in range(300):
        loop.update(task.recipe, task, optimizer, step)
    swapped = task.images.captions[DIHEDRAL:] + task.images.captions[:DIHEDRAL]
    losses = {}
    for name, captions in (("own", task.images.captions), ("others", swapped)):
        task.images.captions = captions
        with torch.no_grad():
            losses[name] = sum(task.loss(torch.Generator().manual_seed(s)).item() for s in range(20))
    assert losses["others"] > 1.1 * losses["own"]


def test_every_word_of_the_captions_is_one_token_and_other_words_fall_into_letters():
    tokenizer = make_tokenizer(CAPTIONS, ("seven", "left"), 16)
    pieces = [piece.removesuffix("</w>") for piece in tokenizer.tokenize("Korean character12, turned left")]
    assert pieces == ["korean", "character", "1", "2", ",", "turned", "left"]
    assert tokenizer.tokenize("Seven dig 3") == ["seven</w>", "d", "i", "g</w>", "3</w>"]
    for prompt in ("zwölf", "数字 三", "\N{SNOWMAN} \x00", "<|startoftext|"):
        assert END not in tokenizer.tokenize(prompt) and tokenizer.tokenize(prompt)
    assert len({tuple(tokenizer(prompt).input_ids) for prompt in "0123456789"}) == 10


def test_vocabulary_and_merges_alone_are_the_same_tokenizer(tmp_path):
    tokenizer = make_tokenizer(CAPTIONS, (), 16)
    tokenizer.save_pretrained(tmp_path)
    write_vocabulary(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    read = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in (*CAPTIONS, "the digit 3", "zwölf"):
        both = [each(prompt, padding="max_length", truncation=True).input_ids for each in (tokenizer, read)]
        assert both[0] == both[1] and len(both[0]) == 16
    assert json.loads((tmp_path / "vocab.json").read_text())[END] == tokenizer.eos_token_id


def test_a_caption_that_would_be_cut_is_refused_with_its_length():
    needed = len(make_tokenizer(CAPTIONS, (), 16)(CAPTIONS[0]).input_ids)
    make_tokenizer(CAPTIONS, (), needed)
    with pytest.raises(UserError, match=f"cuts the caption 'Old Greek .*Type {needed}"):
        make_tokenizer(CAPTIONS, (), needed - 1)


def test_a_share_of_the_captions_says_nothing_and_half_of_that_are_words_without_meaning():
    captions, n, spare = ["korean"] * 20_000, 20_000, ("digit", "seventeen")
    recipe = PretrainRecipe(dataset_name="x", label_dropout=0.2, spare_words=spare)
    told, marked = drop(captions, recipe, torch.Generator().manual_seed(0))
    assert marked.tolist() == [caption == "korean" for caption in told]
    empty, kept = told.count(""), told.count("korean")
    assert abs(empty - 0.1 * n) < 5 * (n * 0.09) ** 0.5 and abs(kept - 0.8 * n) < 5 * (n * 0.16) ** 0.5
    words = [caption.split() for caption in told if caption not in ("", "korean")]
    assert {len(each) for each in words} == {1, 2, 3, 4}
    said = {word for each in words for word in each}
    assert {*spare, *"0123456789"} < said
    assert all(len(word) <= 6 and word.isalpha() for word in said - {*spare, *"0123456789"})
    assert nonsense((), torch.Generator().manual_seed(3)) == nonsense((), torch.Generator().manual_seed(3))
    nothing = dataclasses.replace(recipe, label_dropout=0.0)
    assert drop(captions[:5], nothing, torch.Generator().manual_seed(0))[0] == captions[:5]


def test_codes_are_principal_components_that_count_by_the_root_of_their_spread():
    images = torch.rand(300, 1, 16, 16, generator=torch.Generator().manual_seed(0)) ** 2
    images[:, :, :8] *= 3 * torch.rand(300, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    pixels = images.flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    spread = values[::-1][:5] ** 0.5
    codes = Sketch(on_canvas(images), 5)(on_canvas(images)).double().numpy()
    expected = (pixels - pixels.mean(0)) @ vectors[:, ::-1][:, :5] / np.sqrt(spread * spread.mean())
    signs = np.sign((codes * expected).sum(0))
    assert np.allclose(codes, expected * signs, atol=2e-3)
    assert (codes**2).mean() == pytest.approx(1, abs=1e-3)


def test_the_mean_codes_of_classes_tell_images_apart(letters):
    recipe = PretrainRecipe(
        kind="captions", dataset_name=letters, image_channels=1, characters=True, invert=True, vae="x",
        class_code_rank=4, train_batch_size=64,
    )  # fmt: skip
    images = Characters(recipe)
    sketch, sums, counts = known_codes(images, recipe, torch.Generator().manual_seed(0))
    assert counts.sum() == 512 and (counts > 8).all()
    drawn, classes = images.draw(torch.Generator().manual_seed(1))
    codes = sums / counts[:, None]
    assert ((counts / counts.sum()) @ codes.square().mean(dim=1)).item() == pytest.approx(1, abs=1e-4)
    nearest = torch.cdist(sketch(on_canvas(drawn)), codes).argmin(dim=1)
    assert (nearest == classes).float().mean() > 0.25  # of 16 classes, of which most look like another


def test_captions_of_characters_say_how_each_class_is_turned(letters):
    recipe = PretrainRecipe(
        kind="captions", dataset_name=letters, image_channels=1, characters=True, invert=True, vae="x",
        prompt_template="the letter {label}", train_batch_size=256,
    )  # fmt: skip
    images = Characters(recipe)
    assert images.num_classes == len(images.captions) == 2 * DIHEDRAL
    assert images.captions[0] == "the letter Korean" and images.captions[1] == "the letter Korean, turned left"
    assert images.captions[DIHEDRAL + 7] == "the letter Old Greek, mirrored, turned right"
    assert images.captions_of(torch.tensor([0, 5])) == ["the letter Korean", "the letter Old Greek"]
    drawn, classes = images.draw(torch.Generator().manual_seed(0))
    means = {c: drawn[classes == DIHEDRAL + c, 0].mean(dim=0) for c in (0, 1)}  # of the L
    low_left, low_right = (slice(16, 32), slice(0, 16)), (slice(16, 32), slice(16, 32))
    up_right = (slice(0, 16), slice(16, 32))
    assert means[0][low_left].sum() > means[0][low_right].sum() > means[0][up_right].sum()  # its corner is low left
    assert means[1][low_right].sum() > means[1][up_right].sum()  # turned left the corner is low right


def test_characters_are_read_alike_every_time_and_turned_only_when_drawn(letters):
    recipe = PretrainRecipe(
        kind="autoencoder", dataset_name=letters, image_channels=1, characters=True, invert=True, train_batch_size=64
    )
    images = Characters(recipe)
    ids = torch.tensor([4, 0])
    assert torch.equal(images.read(ids), images.read(ids)) and images.read(ids).shape == (2, 1, 32, 32)
    first, classes = images.draw(torch.Generator().manual_seed(1))
    again, _ = images.draw(torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and len(classes.unique()) > DIHEDRAL
    assert first.min() >= -1 and first.max() <= 1 and first.max() > 0.5


def test_captions_come_from_a_column_of_their_own_or_from_class_names(tmp_path, letters):
    folder = tmp_path / "told"
    folder.mkdir()
    texts = ["a red square", "a blue square", "nothing"]
    for index in range(3):
        Image.new("RGB", (16, 16), (80 * index, 0, 0)).save(folder / f"{index}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    recipe = PretrainRecipe(kind="captions", dataset_name=str(folder), caption_column="text", resolution=16, vae="x")
    images = PublicImages(validate(recipe))
    assert images.captions_of(torch.tensor([2, 0])) == ["nothing", "a red square"]
    pixels, labels = images.draw(torch.Generator().manual_seed(0))
    found = ((pixels[:, 0].mean(dim=(1, 2)) + 1) * 127.5 / 80).round().long()
    assert torch.equal(found, labels)  # so that each image has its own caption
    named = PublicImages(PretrainRecipe(kind="captions", dataset_name=letters, prompt_template="an {label}", vae="x"))
    assert named.captions == ["an Korean", "an Old Greek"]
    with pytest.raises(UserError, match="no column 'caption'"):
        PublicImages(dataclasses.replace(recipe, caption_column="caption"))


def test_what_is_left_behind_says_that_it_is_not_private_and_how_to_go_on(recipe, tmp_path, no_grid):
    text = (pretrain(dataclasses.replace(recipe, max_train_steps=1), tmp_path / "out") / "README.md").read_text()
    autoencoder = dataclasses.replace(
        recipe, kind="autoencoder", vae=None, spare_words=None, attention_levels=None, max_train_steps=1
    )
    first = (pretrain(autoencoder, tmp_path / "first") / "README.md").read_text()
    assert "NOT private" in text and "StableDiffusionPipeline" in text and "--kind captions --characters" in first
    for line in command_lines(text) | command_lines(first):
        check_command(line)
    for path in (*(tmp_path / "out" / "base").rglob("*.json"), *(tmp_path / "out" / "base").rglob("*.md")):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vae": None}, "--kind captions needs the autoencoder"),
        ({"label_column": None, "characters": False, "invert": False}, "--caption_column, or --label_column"),
        ({"caption_column": "text"}, "--characters takes grey characters with labels"),
        ({"image_channels": 3}, "--characters takes grey characters"),
        ({"characters": False}, "--invert .* belongs to --characters"),
        ({"prompt_template": "a letter"}, "holds {label} once"),
        ({"text_width": 24}, "multiple of 16"),
        ({"kind": "autoencoder", "vae": None, "spare_words": ("a",)}, "--spare_words .* belongs to --kind captions"),
        ({"random_flip": True}, "--characters cuts and mirrors"),
        ({"kind": "latent", "class_code_rank": 16, "text_width": 64, "text_layers": 2}, "belongs to --kind"),
        ({"pixel_packing": 2}, "--pixel_packing .* belongs to --kind handwriting or pixel"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, told):
    recipe = PretrainRecipe(
        kind="captions", dataset_name="x", vae="y", image_channels=1, characters=True, invert=True,
        block_out_channels=(8, 16),
    )  # fmt: skip
    validate(recipe)
    with pytest.raises(UserError, match=told):
        validate(dataclasses.replace(recipe, **changes))


def test_the_builtin_base_is_small_and_what_its_recipe_makes():
    place = BUILTIN_BASES / "handwriting_captions"
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) <= 12_000_000
    recipe = load_pretrain_recipe(recipe_path("handwriting-captions"), {"dataset_name": "letters"})
    pipe = StableDiffusionPipeline.from_pretrained(place)
    assert tuple(pipe.unet.config.block_out_channels) == recipe.block_out_channels
    assert (pipe.unet.config.cross_attention_dim, pipe.unet.config.sample_size) == (recipe.class_code_rank, 8)
    assert pipe.text_encoder.config.num_hidden_layers == recipe.text_layers
    assert pipe.scheduler.config.prediction_type == recipe.prediction_type
    words = [pipe.tokenizer(word).input_ids[1:-1] for word in recipe.spare_words]
    assert all(len(tokens) == 1 for tokens in words) and len({tokens[0] for tokens in words}) == len(words)
    assert load_base("builtin:handwriting_captions").text is not None


def test_the_builtin_base_draws_what_its_prompt_says():
    pipe = StableDiffusionPipeline.from_pretrained(BUILTIN_BASES / "handwriting_captions")
    pipe.set_progress_bar_config(disable=True)

    def drawn(prompt, seed):
        generator = torch.Generator().manual_seed(seed)
        pictures = pipe([prompt] * 8, num_inference_steps=10, guidance_scale=2.0, generator=generator).images
        assert {(picture.mode, picture.size) for picture in pictures} == {("L", (32, 32))}
        return np.mean([np.asarray(picture, float) for picture in pictures], axis=0)

    names = ["Korean character12", "Korean character12, turned left"]
    first, again = ([drawn(name, seed) for name in names] for seed in (0, 1))
    same = [np.abs(a - b).mean() for a, b in zip(first, again, strict=True)]
    other = np.abs(first[0] - first[1]).mean()
    assert max(same) < other
    assert np.abs(first[1] - np.rot90(first[0])).mean() < other  # turned left is what it says
