"""Whole runs of an adapter without hooks and of a whole model, through the command line on a tiny base."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DModel
from tiny_models import tiny_base_folder, tiny_image_folder

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.diffusion.base_model import load_base


def invoke(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("zanzibar")
    tiny_base_folder(place / "tiny-base")
    tiny_image_folder(place / "images", {"left": 60, "right": 190}, count=6)
    return place


@pytest.fixture(scope="module", params=["full", "dora"])
def trained(place, request):
    """(kind, folder, what train printed), after two steps with class rows."""
    folder = place / f"run-{request.param}"
    output = invoke(
        "train", "--adapter", request.param, "--epsilon", "8", "--pretrained_model_name_or_path", place / "tiny-base",
        "--dataset_name", place / "images", "--output_dir", folder, "--train_batch_size", "12",
        "--max_train_steps", "2", "--noise_multiplicity", "1", "--rank", "2", "--micro_batch_size", "6",
        "--sample_num_images", "4", "--sample_num_inference_steps", "2",
    )  # fmt: skip
    return request.param, folder, output


def test_the_plan_names_what_is_adapted(trained):
    kind, _, output = trained
    (line,) = re.findall(r"^Adapter +(.*)$", output, re.M)
    assert line.startswith(f"{kind} on ")
    assert ("conv_in" if kind == "full" else "to_q") in line
    assert ("all of it trains" in output) == (kind == "full")


def test_the_folder_keeps_its_promise_and_one_flipped_byte_does_not(trained, tmp_path):
    kind, folder, _ = trained
    assert "epsilon 8" in invoke("verify", folder)
    weights = folder / ("unet/diffusion_pytorch_model.safetensors" if kind == "full" else "adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 3
    weights.write_bytes(whole)


def test_no_file_names_a_folder_of_the_machine(trained):
    _, folder, _ = trained
    for path in folder.rglob("*"):
        assert path.is_dir() or b"zanzibar" not in path.read_bytes(), path


def test_sample_inspect_and_evaluate_take_the_folder(trained, place, tmp_path):
    kind, folder, _ = trained
    base = [] if kind == "full" else ["--base", place / "tiny-base"]
    invoke("sample", "--adapter", folder, "--num_images", "4", "--output_dir", tmp_path / "images", *base)
    assert len(list((tmp_path / "images/images").glob("*.png"))) == 4
    assert ("unet/diffusion_pytorch_model.safetensors" if kind == "full" else "lora_magnitude") in invoke(
        "inspect", folder
    )
    real = ["--dataset_name", place / "images", "--split", "train"]
    assert "small CNN" in invoke("evaluate", folder, *real, "--num_images", "8", *base)


def test_a_whole_model_is_a_base_and_its_card_says_how_to_load_it(trained):
    kind, folder, _ = trained
    card = (folder / "README.md").read_text()
    snippet, *_ = re.findall(r"```python\n(.*?)```", card, re.S)
    assert ("finetune" in card) == (kind == "full") and ("PeftModel" in snippet) == (kind != "full")
    if kind == "full":
        found: dict = {}
        exec(snippet.replace('"FOLDER"', repr(str(folder))), found)
        base = load_base(str(folder))
        assert torch.equal(found["unet"].conv_in.weight, base.unet.conv_in.weight)
        assert base.layout.spare_classes == (12, 30) and base.layout.null_class == 9
        assert isinstance(UNet2DModel.from_pretrained(folder, subfolder="unet"), UNet2DModel)
        assert json.loads((folder / "privacy.json").read_text())["base"]["name"] == "./tiny-base"


def test_a_whole_model_moves_private_class_rows_and_no_others(trained, place):
    kind, folder, _ = trained
    if kind == "full":
        before, after = (load_base(str(path)).unet.class_embedding.weight for path in (place / "tiny-base", folder))
        assert (before != after).any(dim=1).nonzero().flatten().tolist() == [10, 11]
