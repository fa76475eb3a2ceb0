"""Images from shareable folders of every family: what they show, and that each can be made again alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_adapters import LORA, NAMES, SAMPLE, shared
from tiny_bases import BASES

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.generation import class_indices, generate, open_source
from dp_peft_diffusion.diffusion.merging import load_whole_model
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, load_recipe, to_yaml
from dp_peft_diffusion.sharing.export import certify
from tests.privacy.folders import promise


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """Name -> folder of a tiny base, each made once, and built in for as long."""
    made, place = {}, tmp_path_factory.mktemp("bases")

    def get(name):
        if name not in made:
            made[name] = BASES[name](place / name)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_peft_diffusion.diffusion.base_folder.BUILTIN_BASES", place)
        yield get


def rewrite(folder, **sections):
    """Other sections in the folder's recipe."""
    recipe = dataclasses.replace(load_recipe(folder / "recipe.yaml"), **sections)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))


def arrays(images):
    return np.stack([np.array(image) for image in images]).astype(int)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, base_folder):
    """Class rows 10 and 11 of a pixel base."""
    spec = dataclasses.replace(LORA, class_rows=(10, 11))
    return shared(tmp_path_factory.mktemp("runs") / "labelled", base_folder("pixel_classes"), spec)


@pytest.fixture(scope="module")
def worded(tmp_path_factory, base_folder):
    """A Stable Diffusion with classes, which are prompts to it."""
    data = Data(class_names=NAMES, prompt_template="one {label}")
    return shared(tmp_path_factory.mktemp("runs") / "worded", base_folder("stable_diffusion_1"), data=data)


@pytest.mark.parametrize("scheduler", ["utility", "fidelity"])
@pytest.mark.parametrize("run", ["labelled", "worded"])
def test_any_image_can_be_made_again_alone(run, scheduler, request):
    folder = request.getfixturevalue(run)
    together, labels = generate(folder, num_images=5, seed=2, scheduler=scheduler)
    assert labels == ["cat", "dog", "cat", "dog", "cat"]
    for i in (0, 3):
        (alone,), label = generate(folder, num_images=1, first_image=i, seed=2, scheduler=scheduler, batch_size=1)
        assert np.abs(arrays([alone]) - arrays(together)[i]).max() <= 1 and label == [labels[i]]
    assert np.abs(arrays(together)[0] - arrays(together)[2]).max() > 1, "the same class, another number"


def test_classes_of_a_class_base_are_its_rows_and_balanced(labelled):
    source = open_source(labelled)
    assert source.conditions(range(3, 8))["class_labels"].tolist() == [11, 10, 11, 10, 11]
    assert [source.told(i) for i in range(2)] == [{"label": "cat"}, {"label": "dog"}]
    assert open_source(labelled, class_labels=["dog"]).conditions(range(2))["class_labels"].tolist() == [11, 11]


def test_settings_left_out_are_those_of_the_recipe_and_given_ones_win(labelled):
    left, given = open_source(labelled), open_source(labelled, guidance_scale=0.0, scheduler="ddpm", seed=9)
    assert (left.sample.guidance_scale, left.sample.num_inference_steps, left.sample.scheduler) == (2.0, 2, "fidelity")
    assert (given.sample.guidance_scale, given.sample.scheduler, given.sample.seed) == (0.0, "ddpm", 9)


def test_classes_of_a_text_base_are_prompts_made_by_the_template(worded):
    source = open_source(worded)
    assert source.told(0) == {"label": "cat", "text": "one cat"} and source.told(1)["text"] == "one dog"
    expected = source.base.text.encode(["one dog", "one cat", "one dog"])["encoder_hidden_states"]
    assert torch.equal(source.conditions(range(1, 4))["encoder_hidden_states"], expected)
    only_dogs = open_source(worded, class_labels=["dog"])
    assert only_dogs.told(0) == only_dogs.told(1) == {"label": "dog", "text": "one dog"}


def test_prompts_that_are_given_win_over_classes(worded):
    source = open_source(worded, prompts=["a cat", "dog", "a cat"])
    assert [source.told(i) for i in range(4)] == [{"text": text} for text in ("a cat", "dog", "a cat", "a cat")]
    images, labels = generate(worded, num_images=2, prompts=["a cat", "dog"])
    assert labels is None and len(images) == 2
    with pytest.raises(UserError, match="--class_labels and --prompt"):
        open_source(worded, prompts=["a cat"], class_labels=["cat"])


def test_each_prompt_is_encoded_once_for_a_batch(worded, monkeypatch):
    source, asked = open_source(worded), []
    encode = type(source.base.text).encode
    monkeypatch.setattr(
        type(source.base.text), "encode", lambda self, prompts: asked.append(prompts) or encode(self, prompts)
    )
    assert len(source.conditions(range(50))["encoder_hidden_states"]) == 50
    assert asked == [["one cat", "one dog"]]


def test_an_adapter_of_captions_shows_public_prompts_only(tmp_path, base_folder):
    data = Data(caption_column="words")
    folder = shared(tmp_path / "run", base_folder("stable_diffusion_1"), data=data)
    with pytest.raises(UserError, match="captions, which are private.*--prompt"):
        open_source(folder)
    assert open_source(folder, prompts=["a cat"]).told(5) == {"text": "a cat"}
    public = dataclasses.replace(SAMPLE, prompts=("a", "b"))
    rewrite(folder, data=data, sample=public)
    assert open_source(folder).told(1) == {"text": "b"}
    rewrite(folder, data=Data(label_column=None, prompt_template="a scan"), sample=SAMPLE)
    assert open_source(folder).prompts == ("a scan",)


def test_prompts_and_classes_are_refused_where_they_mean_nothing(labelled, tmp_path, base_folder):
    with pytest.raises(UserError, match="reads no text"):
        open_source(labelled, prompts=["a cat"])
    unlabelled = shared(tmp_path / "run", base_folder("pixel"), data=Data(label_column=None))
    with pytest.raises(UserError, match="no classes"):
        open_source(unlabelled, class_labels=["cat"])
    source = open_source(unlabelled, guidance_scale=1.0)
    assert source.conditions(range(2)) == {} and source.told(0) == {}
    assert generate(unlabelled, num_images=1, guidance_scale=1.0)[1] is None


@pytest.mark.parametrize(("name", "given"), [("latent", False), ("latent_vq", False), ("latent_vq", True)])
def test_a_whole_model_takes_the_autoencoder_of_the_base_that_it_was_trained_on(name, given, tmp_path, base_folder):
    place = base_folder(name)
    data, sample = Data(label_column=None), dataclasses.replace(SAMPLE, guidance_scale=1.0)
    folder = shared(tmp_path / "run", place, Adapter(kind="full"), data, sample)
    source = open_source(folder, base=str(place) if given else None)
    assert source.base.is_latent and source.base.resolution == 16
    with pytest.raises(UserError, match="denoises latents and has no autoencoder"):
        load_base(str(folder))
    trained = load_whole_model(folder).unet.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in source.base.unet.state_dict().items())
    images, _ = generate(folder, num_images=1, base=str(place) if given else None)
    assert images[0].size == (16, 16) and images[0].mode == "RGB"


def test_a_whole_model_on_latents_asks_for_an_autoencoder_that_fits(tmp_path, base_folder):
    folder = shared(tmp_path / "run", base_folder("latent_vq"), Adapter(kind="full"), Data(label_column=None))
    with pytest.raises(UserError, match="no autoencoder lies there"):
        open_source(folder, base=str(base_folder("pixel")))
    with pytest.raises(UserError, match="autoencoder makes 4 channels and its UNet takes 3"):
        open_source(folder, base=str(base_folder("latent")))
    rewrite(folder, model=Model(pretrained_model_name_or_path="./mine"))
    with pytest.raises(UserError, match="--base PATH/mine"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_certified_folder_takes_no_other_autoencoder(kind, tmp_path, base_folder):
    place = base_folder("latent_vq")
    spec = dataclasses.replace(LORA, kind=kind, target_modules=("to_q",) if kind == "lora" else None)
    folder = shared(tmp_path / "run", place, spec, Data(label_column=None))
    recipe = dataclasses.replace(load_recipe(folder / "recipe.yaml"), privacy=Privacy(epsilon=1.0, gamma=0.01))
    facts = certify(folder, recipe, load_base(str(place)), promise(), "given", "os", "deleted")
    certificate.write(folder, facts)
    same, other = (shutil.copytree(place, tmp_path / name) for name in ("same", "other"))
    assert open_source(folder, base=str(same)).base.is_latent
    config = json.loads((other / "vqvae" / "config.json").read_text())
    (other / "vqvae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 5.0}))
    with pytest.warns(UserWarning, match="trained on ./latent_vq, and .*other is another base: autoencoder, text"):
        assert open_source(folder, base=str(other)).base.vae.config.scaling_factor == 5.0
    del facts["base"]["parts_sha256"]  # a certificate of before
    certificate.write(folder, facts)
    assert open_source(folder, base=str(other)).base.is_latent


def test_a_whole_model_of_pixels_needs_no_base(tmp_path, base_folder):
    place = base_folder("pixel_classes")
    spec = Adapter(kind="full", class_rows=(10, 11))
    folder = shared(tmp_path / "run", place, spec)
    rewrite(folder, model=Model(pretrained_model_name_or_path="./elsewhere"))
    images, labels = generate(folder, num_images=2)
    assert labels == list(NAMES) and images[0].size == (16, 16)


def test_an_adapter_whose_base_lies_elsewhere_asks_for_it(labelled, tmp_path, base_folder):
    moved = shutil.copytree(labelled, tmp_path / "run")
    rewrite(moved, model=Model(pretrained_model_name_or_path="./mine"))
    with pytest.raises(UserError, match="--base PATH/mine"):
        open_source(moved)
    there = generate(moved, num_images=2, base=str(base_folder("pixel_classes")))[0]
    assert np.array_equal(arrays(there), arrays(generate(labelled, num_images=2)[0]))


def test_a_class_is_looked_up_by_name_and_not_by_walking_through_all():
    class Names(list):
        def __contains__(self, _):
            pytest.fail("walked")

        def index(self, *_):
            pytest.fail("walked")

    names = Names(map(str, range(1000)))
    assert class_indices(names, None, 1000) == class_indices(names, list(names), 1000) == list(range(1000))


def test_labels_are_taken_in_turn_and_unknown_ones_refused():
    assert class_indices(["a", "b", "c"], None, 5) == [0, 1, 2, 0, 1]
    assert class_indices(["a", "b", "c"], ["c", "a"], 3) == [2, 0, 2]
    assert class_indices(["a", "b"], ["b"] * 3, 3) == [1, 1, 1]
    with pytest.raises(UserError, match="'d'"):
        class_indices(["a", "b", "c"], ["d"], 1)
