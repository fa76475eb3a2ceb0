"""What the README tells a new user to type, on the real base and the real digits; shortened, and whole as `slow`."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from dp_peft_diffusion.cli import main

README = Path(__file__).parents[2] / "README.md"
SHORT = "--max_train_steps 1 --noise_multiplicity 1 --sample_num_images 10 --sample_num_inference_steps 2"


def invoke(command):
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the first command leaves, after one step instead of all."""
    folder = tmp_path_factory.mktemp("first") / "runs" / "digits-eps1"
    output = invoke(f"dp-peft train --adapter lora --epsilon 1 --output_dir {folder} {SHORT}")
    assert "160 trainable" in output and "1,437" in output
    return folder


def test_the_commands_that_follow_the_first_one_run(folder):
    invoke(f"dp-peft sample --adapter {folder} --num_images 20 --num_inference_steps 2 --output_dir {folder}-samples")
    assert "epsilon 1" in invoke(f"dp-peft verify {folder}")
    assert "small CNN" in invoke(f"dp-peft evaluate {folder}-samples --dataset_name builtin:digits")
    assert "lora_embedding_A" in invoke(f"dp-peft inspect {folder}")


def test_the_snippet_for_stock_tools_gives_ten_digits(folder):
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "PeftModel" in code)
    assert "runs/digits-eps1" in snippet and "set_timesteps(25)" in snippet
    found: dict = {}
    exec(snippet.replace("runs/digits-eps1", str(folder)).replace("set_timesteps(25)", "set_timesteps(2)"), found)
    assert found["images"].shape == (10, 1, 32, 32)


def test_the_card_lists_the_class_rows_that_the_snippet_uses(folder):
    rows = ", ".join(str(row) for row in range(1937, 1947))
    assert f"class_rows = [{rows}]" in (folder / "README.md").read_text()
    assert "torch.arange(1937, 1947)" in README.read_text()


def test_the_plan_commands_print_their_tables():
    assert "noise" in invoke(
        "dp-peft plan --num_examples 60000 --epsilon 1 --train_batch_size 1024 --max_train_steps 100"
    )
    output = invoke(
        "dp-peft plan --num_examples 60000 --noise_multiplier 4 --train_batch_size 1024 --max_train_steps 500"
    )
    assert "epsilon" in output.lower()


@pytest.mark.slow
def test_the_first_command_as_it_stands_gives_digits_a_classifier_can_learn_from(tmp_path):
    """About four minutes on two cores. The aim is 60 %; docs/explanation/results.md has what was measured."""
    folder = tmp_path / "digits-eps1"
    invoke(f"dp-peft train --adapter lora --epsilon 1 --output_dir {folder}")
    invoke(f"dp-peft sample --adapter {folder} --num_images 2000 --output_dir {folder}-samples")
    output = invoke(
        f"dp-peft evaluate {folder}-samples --dataset_name builtin:digits --split choose --evaluation_resolution 8"
    )
    accuracies = [float(value) for value in re.findall(r"([\d.]+) % \(one seed", output)]
    assert max(accuracies) >= 60
