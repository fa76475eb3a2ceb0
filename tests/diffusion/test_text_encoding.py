import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import BASES, TEXT, TOKENS

from dp_peft_diffusion.diffusion.text_encoding import load_text_encoders

PROMPTS = ["a cat", "", "Dog 42!", "a cat and a dog and a cat and a dog", "une pièce — 猫\n\t\x00 ok"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return {name: BASES[name](place / name) for name in ("stable_diffusion_1", "stable_diffusion_xl")}


@pytest.fixture(scope="module")
def encoders(folders):
    """Name of a family -> its text encoders."""
    indices = {name: json.loads((folder / "model_index.json").read_text()) for name, folder in folders.items()}
    return {name: load_text_encoders(folder, indices[name], name) for name, folder in folders.items()}


def test_stable_diffusion_prompts_are_encoded_as_by_its_pipeline(folders, encoders):
    pipeline = StableDiffusionPipeline.from_pretrained(folders["stable_diffusion_1"])
    with torch.no_grad():
        hidden, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    ours = encoders["stable_diffusion_1"]
    encoded = ours.encode(PROMPTS)
    assert set(encoded) == {"encoder_hidden_states"} and hidden.shape == (len(PROMPTS), TOKENS, TEXT)
    assert torch.allclose(encoded["encoder_hidden_states"], hidden, atol=1e-5)
    assert torch.allclose(ours.null["encoder_hidden_states"], null[:1], atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_xl_prompts_are_encoded_as_by_its_pipeline(folders, zeros):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["stable_diffusion_xl"])
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        hidden, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
    ours = load_text_encoders(folders["stable_diffusion_xl"], {"force_zeros_for_empty_prompt": zeros}, "xl")
    encoded = ours.encode(PROMPTS)
    assert torch.allclose(encoded["encoder_hidden_states"], hidden, atol=1e-5)
    assert torch.allclose(encoded["text_embeds"], pooled, atol=1e-5)
    assert torch.allclose(ours.null["encoder_hidden_states"], null[:1], atol=1e-5)
    assert torch.allclose(ours.null["text_embeds"], null_pooled[:1], atol=1e-5)
    assert bool(ours.null["text_embeds"].any()) != zeros


@pytest.mark.parametrize("family", ["stable_diffusion_1", "stable_diffusion_xl"])
def test_a_prompt_has_the_same_embedding_whatever_its_neighbours(encoders, family):
    together = encoders[family].encode(PROMPTS)
    backwards = encoders[family].encode(PROMPTS[::-1])
    for row, prompt in enumerate(PROMPTS):
        for name, alone in encoders[family].encode([prompt]).items():
            assert torch.equal(together[name][row], alone[0])
            assert torch.equal(backwards[name][len(PROMPTS) - 1 - row], alone[0])


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_every_text_has_an_embedding_of_one_shape(encoders, text):
    encoded = encoders["stable_diffusion_xl"].encode([text])
    assert encoded["encoder_hidden_states"].shape == (1, TOKENS, 2 * TEXT) and encoded["text_embeds"].shape == (1, 6)
    assert all(torch.isfinite(value).all() for value in encoded.values())


def test_a_text_that_is_none_is_refused_and_a_long_one_is_cut(encoders):
    ours = encoders["stable_diffusion_1"]
    with pytest.raises(UnicodeEncodeError):
        ours.encode(["half a character: \ud800"])
    long = "cat " * TOKENS
    cut = ours.encode([long, long * 100])["encoder_hidden_states"]
    assert torch.equal(cut[0], cut[1])
