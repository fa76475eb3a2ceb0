"""`dp-peft sample` and `inspect` on folders, with sampling itself replaced."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.cli.inspection import changes
from dp_peft_diffusion.recipe import load_recipe, recipe_path, to_yaml


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="dp-peft")


def refused(*words):
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


@pytest.fixture
def adapter(tmp_path):
    """A folder as a run leaves it: rank-2 LoRA of one module, a class row, a certificate."""
    folder = tmp_path / "run"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        "base_model.model.mid.to_q.lora_A.weight": rng.normal(size=(2, 5)).astype(np.float32),
        "base_model.model.mid.to_q.lora_B.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "base_model.model.class_embedding.token_adapter.trainable_tokens_delta": np.ones((10, 4), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"secret path": "/home/alice\x1b[2J"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    (folder / "privacy.json").write_text(json.dumps({"guarantee": {"epsilon": 1.0}}))
    recipe = load_recipe(recipe_path("digits"), {"data.class_names": ("cat", "dog", "1")})
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return SimpleNamespace(folder=folder, tensors=tensors)


def test_inspect_prints_every_metadata_byte_shape_norm_change_and_the_certificate(adapter):
    result = invoke("inspect", adapter.folder)
    assert result.exit_code == 0, result.output
    a, b, rows = adapter.tensors.values()
    for shown in ("secret path", "/home/alice", "[2, 5]", "[3, 2]", "[10, 4]", '"epsilon": 1.0', '"lora_alpha": 6'):
        assert shown in result.stdout
    for norm in (np.linalg.norm(a), np.linalg.norm(rows), 3 * np.linalg.norm(b @ a)):
        assert f"{norm:.4g}" in result.stdout
    assert "\x1b" not in result.stdout


def test_inspect_for_programs_holds_the_same(adapter):
    facts = json.loads(invoke("inspect", adapter.folder, "--format", "json").stdout)
    a, b, _ = adapter.tensors.values()
    weights = facts["safetensors"]["adapter_model.safetensors"]
    assert weights["changes"]["mid.to_q"] == pytest.approx(3 * np.linalg.norm(b.astype(float) @ a), rel=1e-6)
    assert weights["metadata"] == {"secret path": "/home/alice\x1b[2J"}
    assert set(weights["tensors"]) == set(adapter.tensors)
    files = {path.name: path.stat().st_size for path in adapter.folder.iterdir()}
    assert facts["files"] == files


def test_the_change_of_a_convolution_and_an_embedding_is_that_of_the_flattened_matrices():
    rng = np.random.default_rng(1)
    conv_a, conv_b = rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(5, 2, 1, 1))
    row_a, row_b = rng.normal(size=(2, 7)), rng.normal(size=(4, 2))
    arrays = {
        "c.lora_A.weight": conv_a,
        "c.lora_B.weight": conv_b,
        "e.lora_embedding_A": row_a,
        "e.lora_embedding_B": row_b,
        "lonely.lora_A.weight": row_a,
        "odd.lora_A.weight": np.zeros((0, 3)),
        "odd.lora_B.weight": np.zeros((3, 0)),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    found = changes(shapes, lambda name: arrays[name].reshape(len(arrays[name]), -1), scale=0.5)
    kernel = np.einsum("or,rihw->oihw", conv_b[:, :, 0, 0], conv_a)
    assert found == pytest.approx({"c": 0.5 * np.linalg.norm(kernel), "e": 0.5 * np.linalg.norm(row_b @ row_a)})


def test_inspect_refuses_what_is_no_run_folder(adapter, tmp_path):
    assert "not a folder" in refused("inspect", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors" in refused("inspect", tmp_path / "empty")
    for name, content, reason in (
        ("privacy.json", b"{", "not strict JSON"),
        ("adapter_model.safetensors", b"junk", "no safetensors file"),
    ):
        (adapter.folder / name).write_bytes(content)
        result = invoke("inspect", adapter.folder)
        assert result.exit_code == 3 and reason in result.stderr
        (adapter.folder / name).unlink()


@pytest.fixture
def generation(monkeypatch):
    """Sampling and writing replaced by records of what they are asked."""
    fake, files = ModuleType("generation"), ModuleType("image_files")
    fake.asked, fake.written, fake.checked = [], [], []

    def open_source(folder, **settings):
        fake.asked.append((folder, settings))
        return "source"

    fake.open_source, files.check_folder = open_source, fake.checked.append
    files.write_images = lambda folder, source, **numbers: fake.written.append((folder, source, numbers))
    monkeypatch.setitem(sys.modules, "dp_peft_diffusion.diffusion.generation", fake)
    monkeypatch.setitem(sys.modules, "dp_peft_diffusion.diffusion.image_files", files)
    return fake


def test_sample_passes_everything_on_and_leaves_the_rest_to_the_recipe(generation, adapter):
    result = invoke("sample", "--adapter", adapter.folder, "--num-images", 3)
    assert result.exit_code == 0, result.output
    settings = dict.fromkeys(("class_labels", "scheduler", "num_inference_steps", "guidance_scale", "base"))
    settings |= {"prompts": (), "seed": 0, "batch_size": None, "dtype": torch.float32}
    settings |= {"weights": (1.0,), "unmerged": False, "relabel": False}
    asked = generation.asked[0][1]
    assert asked.pop("device") in ("cpu", "cuda")
    assert generation.asked == [([adapter.folder], settings)]
    place = adapter.folder.with_name("run-samples")
    assert generation.checked == [place], "nothing is loaded for a folder that is refused"
    assert generation.written == [(place, "source", {"num_images": 3, "first_image": 0, "parquet": False})]
    assert str(place) in result.stdout


def test_class_labels_are_names_or_positions_and_a_name_comes_first(generation, adapter):
    invoke("sample", "--adapter", adapter.folder, "--class_labels", "dog, 0,1,2")
    assert generation.asked[0][1]["class_labels"] == ["dog", "cat", "1", "1"]


def test_options_of_sample_reach_what_they_are_for(generation, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two, three \n", encoding="utf-8")
    words = ["--prompt", "a, b", "--prompt", "c", "--prompts_file", tmp_path / "prompts.txt", "--batch_size", 2]
    words += ["--dtype", "bfloat16", "--first_image", 7, "--parquet", "--relabel", "--output_dir", tmp_path / "out"]
    words += [
        "--scheduler",
        "fidelity",
        "--num_inference_steps",
        9,
        "--guidance_scale",
        1.5,
        "--seed",
        4,
        "--base",
        "b",
    ]
    result = invoke("sample", "--adapter", adapter.folder, *words)
    assert result.exit_code == 0, result.output
    asked = generation.asked[0][1]
    assert asked["prompts"] == ("a, b", "c", "one", "two, three")
    assert (asked["batch_size"], asked["dtype"], asked["scheduler"]) == (2, torch.bfloat16, "fidelity")
    assert asked["relabel"] is True
    assert (asked["num_inference_steps"], asked["guidance_scale"], asked["seed"], asked["base"]) == (9, 1.5, 4, "b")
    numbers = {"num_images": 64, "first_image": 7, "parquet": True}
    assert generation.written == [(tmp_path / "out", "source", numbers)]


def test_several_adapters_are_sampled_together_each_at_its_weight(generation, adapter, tmp_path):
    other = shutil.copytree(adapter.folder, tmp_path / "other")
    recipe = load_recipe(other / "recipe.yaml", {"data.class_names": ("cow", "cat", "ant")})
    (other / "recipe.yaml").write_text(to_yaml(recipe))
    both = ["sample", "--adapter", adapter.folder, "--adapter", other]
    words = ["--adapter_weight", 0.5, "--adapter-weight", -2, "--unmerged", "--class_labels", "ant,3,0"]
    result = invoke(*both, *words)
    assert result.exit_code == 0, result.output
    folders, settings = generation.asked[0]
    assert folders == [adapter.folder, other] and settings["weights"] == (0.5, -2.0) and settings["unmerged"]
    assert settings["class_labels"] == ["ant", "cow", "cat"], "positions count through the first and then the others"
    assert "2 --adapter and 1 --adapter_weight" in refused(*both, "--adapter_weight", 1)
    assert "takes numbers" in refused(*both, "--adapter_weight", 1, "--adapter_weight", "nan")
    assert len(generation.asked) == 1


def test_an_adapter_on_the_hub_is_fetched_and_its_images_go_into_the_current_folder(
    generation, adapter, tmp_path, monkeypatch
):
    from dp_peft_diffusion.sharing import hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "local_folder", {"somebody/digits": adapter.folder}.__getitem__)
    assert invoke("sample", "--adapter", "somebody/digits", "--class_labels", "cat").exit_code == 0
    assert generation.asked[0][0] == [adapter.folder] and generation.written[0][0] == Path("digits-samples")


def test_warnings_of_a_model_are_one_line_on_stderr(generation, adapter, monkeypatch):
    def warned(folders, **settings):
        warnings.warn("another base", stacklevel=2)
        return "source"

    monkeypatch.setattr(generation, "open_source", warned)
    result = invoke("sample", "--adapter", adapter.folder)
    assert result.exit_code == 0 and "warning: another base" in result.stderr.splitlines()


def test_sample_refuses_bad_input(generation, adapter, tmp_path):
    base = ["sample", "--adapter", adapter.folder]
    assert "cat, dog, 1" in refused(*base, "--class_labels", "cow")
    assert "'7'" in refused(*base, "--class_labels", "7")
    assert "--num_images" in refused(*base, "--num_images", 0)
    assert "--guidance_scale" in refused(*base, "--guidance_scale", -1)
    assert "--seed" in refused(*base, "--seed", -1)
    assert "--dtype" in refused(*base, "--dtype", "float16")
    assert "another --seed" in refused(*base, "--first_image", 1_000_002, "--num_images", 2)
    assert "No such file" in refused(*base, "--prompts_file", tmp_path / "absent")
    for content in (b"\n \n", b"\xff"):
        (tmp_path / "prompts").write_bytes(content)
        assert "on each line" in refused(*base, "--prompts_file", tmp_path / "prompts")
    assert "recipe.yaml" in refused("sample", "--adapter", tmp_path, "--class_labels", "cat")
    assert generation.asked == generation.written == []


def test_sample_never_mixes_with_what_is_in_a_folder(adapter):
    before = sorted(adapter.folder.iterdir())
    assert "not empty" in refused("sample", "--adapter", adapter.folder, "--output_dir", adapter.folder)
    assert sorted(adapter.folder.iterdir()) == before


def test_classes_of_an_adapter_without_any_cannot_be_sampled(adapter):
    (adapter.folder / "recipe.yaml").write_text("privacy: {epsilon: 1}\n")
    assert "Leave out --class_labels" in refused("sample", "--adapter", adapter.folder, "--class_labels", "cat")


def test_the_folder_must_exist_as_a_run(adapter):
    Path(adapter.folder / "recipe.yaml").unlink()
    assert "cannot be read" in refused("sample", "--adapter", adapter.folder, "--class_labels", "cat")
