"""Shareable folders become a model: several together, another base, and nothing opened because a stranger named it."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from tiny_adapters import LORA, NAMES, shared
from tiny_bases import BASES

from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.generation import generate, open_source
from dp_peft_diffusion.diffusion.merging import merge_adapters
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.recipe import Adapter, Data, Model, load_recipe, to_yaml
from tests.privacy import strangers

WITH_ROWS = dataclasses.replace(LORA, class_rows=(10, 11), class_code_rank=3)
PETS = dataclasses.replace(WITH_ROWS, class_rows=(12, 11))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where tiny bases lie; they are built in for as long as this module's tests run."""
    place = tmp_path_factory.mktemp("bases")
    for name in ("pixel_classes", "stable_diffusion_1"):
        BASES[name](place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_peft_diffusion.diffusion.base_folder.BUILTIN_BASES", place)
        yield place


@pytest.fixture(scope="module")
def first(place, tmp_path_factory):
    return shared(tmp_path_factory.mktemp("runs") / "first", place / "pixel_classes", WITH_ROWS, certified=True)


@pytest.fixture(scope="module")
def second(place, tmp_path_factory):
    data = Data(class_names=("cow", "dog"))
    return shared(tmp_path_factory.mktemp("runs") / "second", place / "pixel_classes", PETS, data, seed=1)


def test_several_adapters_make_one_model_that_shows_the_classes_of_the_first(place, first, second):
    source = open_source([first, second], weights=[0.5, 2.0])
    wanted = merge_adapters(load_base(str(place / "pixel_classes")).unet, [second, first], [2.0, 0.5]).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in source.base.unet.state_dict().items())
    assert source.labels == NAMES and source.rows == (10, 11)
    of_both = open_source([first, second], class_labels=["cow", "cat", "dog"])
    assert of_both.rows == (12, 10, 11)
    assert open_source([second, first]).labels == ("cow", "dog")


def test_unmerged_adapters_draw_the_same_images(first, second):
    merged, unmerged = (
        torch.cat([images for _, images in open_source([first, second], unmerged=way).batches(range(4))]).int()
        for way in (False, True)
    )
    assert (merged - unmerged).abs().max() <= 1
    alone = torch.cat([images for _, images in open_source(first).batches(range(4))]).int()
    assert (merged - alone).abs().max() > 1
    assert generate([first, second], num_images=1, weights=[0.0, 0.0])[1] == ["cat"]


def test_a_class_of_a_text_base_is_told_in_the_words_of_its_own_adapter(place, tmp_path):
    data = {name: Data(class_names=(name,), prompt_template=f"my {{label}}{name}") for name in ("a", "b")}
    folders = [shared(tmp_path / n, place / "stable_diffusion_1", data=d, seed=ord(n)) for n, d in data.items()]
    assert open_source(folders).prompts == ("my aa",)
    assert open_source(folders, class_labels=["b", "a"]).prompts == ("my bb", "my aa")


def test_classes_that_collide_and_whole_models_beside_others_are_refused(place, first, tmp_path):
    other = shared(tmp_path / "other", place / "pixel_classes", WITH_ROWS, Data(class_names=("1", "2")))
    with pytest.raises(UserError, match="both moved row 10 of the class table, for 'cat' and for '1'"):
        open_source([first, other])
    whole = shared(tmp_path / "whole", place / "pixel_classes", Adapter(kind="full", class_rows=(10, 11)))
    for folders, weights in (([whole, first], [1.0, 1.0]), ([first, whole], [1.0, 1.0]), ([whole], [0.5])):
        with pytest.raises(UserError, match="whole holds a whole model.*Take it alone, at weight 1"):
            open_source(folders, weights=weights)


def test_a_base_for_a_whole_model_that_needs_none_is_refused(place, tmp_path):
    whole = shared(tmp_path / "whole", place / "pixel_classes", Adapter(kind="full", class_rows=(10, 11)))
    with pytest.raises(UserError, match="whole holds a whole model, which is its own base. Leave out --base x"):
        open_source(whole, base="x")


@pytest.mark.parametrize(
    ("count", "weights", "said"),
    [
        (2, [1.0], "^weights"),
        (1, 0.5, "^weights"),
        (1, [], "^weights"),
        (1, [float("nan")], "^weights nan"),
        (0, None, "no adapter"),
    ],
)
def test_folders_without_weights_of_theirs_are_refused_before_a_base_is_looked_for(
    first, monkeypatch, count, weights, said
):
    monkeypatch.setattr("dp_peft_diffusion.diffusion.base_model.find_folder", lambda *_: pytest.fail("looked for"))
    with pytest.raises(UserError, match=said):
        generate([first] * count, weights=weights)


def test_a_stranger_cannot_have_a_file_read_as_a_revision(first, tmp_path, monkeypatch):
    folder = shutil.copytree(first, tmp_path / "run")
    recipe = load_recipe(folder / "recipe.yaml")
    named = dataclasses.replace(recipe, model=Model(pretrained_model_name_or_path="some/base", revision="/dev/zero"))
    (folder / "recipe.yaml").write_text(to_yaml(named))
    monkeypatch.setattr(
        "dp_peft_diffusion.diffusion.base_folder.snapshot_download", lambda *_, **__: pytest.fail("asked")
    )
    with pytest.raises(UserError, match="--base some/base"):
        open_source(folder)


@pytest.fixture
def other_base(place, tmp_path):
    """A base of the same shape and other weights."""
    folder = shutil.copytree(place / "pixel_classes", tmp_path / "other_base")
    base = load_base(str(folder))
    base.unet.conv_in.weight.data += 1
    base.unet.save_pretrained(folder / "unet")
    return folder


def test_another_base_is_warned_of_where_it_was_asked_for_and_refused_where_not(first, other_base, monkeypatch):
    old, new = load_base("builtin:pixel_classes").sha256[:12], load_base(str(other_base)).sha256[:12]
    said = rf"first was trained on ./pixel_classes, and \S+ is another base: weights {old} there, {new} here"
    with pytest.warns(UserWarning, match=f"{said}. The promise holds"):
        source = open_source(first, base=str(other_base))
    assert source.base.sha256.startswith(new)
    monkeypatch.setattr("dp_peft_diffusion.diffusion.base_folder.BUILTIN_BASES", other_base.parent)
    other_base.rename(other_base.with_name("pixel_classes"))
    with pytest.raises(UserError, match=f"{said}. Name the right one with --base; --base builtin:pixel_classes takes"):
        open_source(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=said):
            open_source(first, base="builtin:pixel_classes")


def test_a_base_of_another_shape_is_refused_however_it_was_named(first, place):
    with pytest.warns(UserWarning, match="another base"), pytest.raises(UserError, match="rows of a class table that"):
        open_source(first, base=str(place / "stable_diffusion_1"))


@pytest.mark.parametrize("name", ["/etc", "../x", "~/x", "builtin:../x", "here"])
def test_no_place_is_opened_because_a_stranger_named_it(first, tmp_path, monkeypatch, name):
    folder = shutil.copytree(first, tmp_path / "run")
    recipe = load_recipe(folder / "recipe.yaml")
    named = dataclasses.replace(recipe, model=Model(pretrained_model_name_or_path=name))
    (folder / "recipe.yaml").write_text(to_yaml(named))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for module in ("base_model", "opening"):
        asked = f"dp_peft_diffusion.diffusion.{module}.find_folder"
        monkeypatch.setattr(asked, lambda *_: pytest.fail("a folder was looked for"))
    with pytest.raises(UserError, match="--base"):
        open_source(folder)


def test_a_hostile_adapter_is_refused_before_its_base_is_looked_for(tmp_path, monkeypatch):
    folder = strangers.write_adapter(tmp_path / "run")
    (folder / "recipe.yaml").write_text("model: {pretrained_model_name_or_path: some/base}\nprivacy: {epsilon: 1}\n")
    strangers.write_config(folder, strangers.config(r=2_000_000))
    monkeypatch.setattr("dp_peft_diffusion.diffusion.base_model.find_folder", lambda *_: pytest.fail("fetched"))
    with pytest.raises(PrivacyError, match="r is 2000000"):
        open_source(folder)


def test_class_rows_beyond_the_table_of_the_base_are_refused(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "run")
    recipe = load_recipe(folder / "recipe.yaml")
    beyond = dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, class_rows=(10, 30)))
    (folder / "recipe.yaml").write_text(to_yaml(beyond))
    with pytest.raises(UserError, match="run has rows of a class table that builtin:pixel_classes lacks"):
        open_source(folder)
