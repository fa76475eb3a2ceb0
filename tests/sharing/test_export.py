import contextlib
import dataclasses
import io
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from tiny_bases import BASES
from tiny_models import tiny_base_folder

from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import condition_table
from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.model_files import FROM_SCRATCH
from dp_peft_diffusion.privacy.promise import make_promise
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe
from dp_peft_diffusion.sharing import reloading
from dp_peft_diffusion.sharing.card import sample_arguments
from dp_peft_diffusion.sharing.export import export, public_base_name, shareable_recipe

ROWS = (10, 11)
PROMISE = make_promise(
    DPMechanism(sampling_prob=0.5, steps=4, expected_batch_size=10, num_examples=20), delta=1e-5, epsilon=3.0
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder as a run leaves it, with its base, adapter and recipe."""
    place = tmp_path_factory.mktemp("export")
    base = load_base(str(tiny_base_folder(place / "tiny-base")))
    spec = Adapter(rank=2, target_modules=("to_q",), class_code_rank=2, class_rows=ROWS)
    adapter = inject_adapter(base, spec, 2)
    for parameter in adapter.trainable.values():
        torch.nn.init.normal_(parameter, std=0.3)
    recipe = Recipe(
        model=Model(pretrained_model_name_or_path=base.name),
        data=Data(dataset_name=str(place / "secret-patients"), class_names=("left", "right")),
        adapter=spec,
        privacy=Privacy(epsilon=3.0, gamma=0.01),
    )
    folder = place / "run"
    (folder / "samples").mkdir(parents=True)
    for step in (0, 4):
        image_grid(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), 2).save(folder / "samples" / f"step-{step:04d}.png")
    table = condition_table(base, ROWS, recipe.data.class_names, "")
    facts = export(folder, recipe, base, table, adapter, PROMISE, "given by the user, declared public", "os", "deleted")
    return folder, base, adapter, recipe, facts


def export_text(place, folder):
    """Export a LoRA of Stable Diffusion; (base folder, certificate)."""
    base = load_base(str(place / "base"))
    spec = Adapter(rank=2, target_modules=("to_q",))
    adapter = inject_adapter(base, spec)
    for parameter in adapter.trainable.values():
        torch.nn.init.normal_(parameter, std=0.3)
    recipe = Recipe(
        model=Model(pretrained_model_name_or_path=base.name), adapter=spec, privacy=Privacy(epsilon=3.0, gamma=1)
    )
    recipe = dataclasses.replace(recipe, data=Data(dataset_name="x", prompt_template="a scan"))
    (folder / "samples").mkdir(parents=True)
    image_grid(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 2).save(folder / "samples" / "step-0004.png")
    table = condition_table(base, None, None, "a scan")
    return export(folder, recipe, base, table, adapter, PROMISE, "given by the user", "os", "deleted")


@pytest.fixture(scope="module")
def text_place(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    BASES["stable_diffusion_1"](place / "base")
    return place


@pytest.fixture(scope="module")
def text_export(text_place):
    """(folder, folder of the base, certificate, what was told)."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        facts = export_text(text_place, text_place / "run")
    return text_place / "run", text_place / "base", facts, told.getvalue()


@pytest.mark.parametrize("file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "samples/more.bin"])
def test_weights_that_were_not_certified_are_found_in_any_subfolder(exported, tmp_path, file):
    folder, *_ = exported
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    (more / file).parent.mkdir(exist_ok=True)
    (more / file).write_bytes(b"{}")
    failed = {name: text for name, ok, text in verify(more).levels if not ok}
    assert file in failed["files"] and "not certified" in failed["files"]


def test_whoever_may_read_the_certificate_may_read_the_weights(exported):
    folder, *_ = exported
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_an_exported_folder_verifies(exported):
    folder, *_, facts = exported
    assert verify(folder).ok
    assert json.loads((folder / "privacy.json").read_text()) == facts
    assert facts["guarantee"]["epsilon"] == 3.0 and facts["base"]["name"] == "./tiny-base"


def test_the_card_says_the_promise_in_words_and_names_no_folder_of_the_machine(exported):
    folder, _, _, _, facts = exported
    card = (folder / "README.md").read_text()
    assert facts["statement"] in card
    assert "step-0004.png" in card
    assert "secret-patients" not in card and str(folder.parent) not in card


def test_the_card_says_all_that_sampling_needs_and_the_folder_does_not_hold(exported):
    folder, base, _, recipe, _ = exported
    card = (folder / "README.md").read_text()
    assert "`dp-peft sample --adapter FOLDER --num_images 64 --base PATH/tiny-base`" in card
    shared = shareable_recipe(recipe)
    captions = dataclasses.replace(
        shared, data=Data(caption_column="text"), model=Model(pretrained_model_name_or_path="some/hub")
    )
    assert sample_arguments(captions, base) == " --prompt 'a photo of ...'"
    whole = dataclasses.replace(shared, adapter=Adapter(kind="full"))
    assert sample_arguments(whole, base) == "", "a net on pixels is its own base"
    assert "--base" in sample_arguments(whole, dataclasses.replace(base, vae=torch.nn.Identity()))


def test_no_exported_file_names_the_private_folder(exported):
    folder, *_ = exported
    for path in folder.rglob("*"):
        assert path.is_dir() or str(folder.parent).encode() not in path.read_bytes(), path.name


def test_the_shareable_recipe_keeps_everything_but_places(exported):
    _, _, _, recipe, _ = exported
    shared = shareable_recipe(recipe)
    assert shared.data.dataset_name != recipe.data.dataset_name
    assert dataclasses.replace(shared, data=recipe.data, model=recipe.model) == recipe


def test_page_and_card_are_certified_and_a_changed_page_is_found(exported, tmp_path):
    folder, *_, facts = exported
    assert {"README.md", "report.html"} <= set(facts["sha256"])
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "report.html").write_text((folder / "report.html").read_text() + " ")
    failed = {name: text for name, ok, text in verify(changed).levels if not ok}
    assert set(failed) == {"files"} and "report.html" in failed["files"]


def test_the_folder_of_a_text_conditional_base_holds_the_file_of_diffusers_and_says_its_promise(text_export):
    folder, base, facts, told = text_export
    assert "pytorch_lora_weights.safetensors" in facts["sha256"]
    report = verify(folder, base)
    assert report.ok and "bit for bit" in dict((name, text) for name, _, text in report.levels)["weights"]
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["dp_peft"])
    assert said["statement"] == facts["statement"] and said["base"]["sha256"] == facts["base"]["sha256"]
    assert "stock peft: 8 layers; stock diffusers: 8 layers; outputs differ by" in told


def test_an_export_that_does_not_reload_has_no_certificate(text_place, monkeypatch):
    def refuse(*_):
        raise RunError("the process was killed")

    monkeypatch.setattr(reloading, "in_fresh_process", refuse)
    with pytest.raises(RunError, match="was killed"):
        export_text(text_place, text_place / "failed")
    left = {path.name for path in (text_place / "failed").iterdir()}
    assert not left & {"privacy.json", "README.md", "report.html"}


@pytest.mark.parametrize("prefix", ["", FROM_SCRATCH])
def test_the_name_of_a_base_tells_no_folder_of_the_machine(tmp_path, prefix):
    assert public_base_name(f"{prefix}{tmp_path}") == f"{prefix}./{tmp_path.name}"
    assert public_base_name(f"{prefix}builtin:handwriting") == f"{prefix}builtin:handwriting"
