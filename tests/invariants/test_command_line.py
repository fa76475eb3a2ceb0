"""The commands one after another, as a new user types them, on a tiny base and images made here."""

import json

import pytest
from click.testing import CliRunner
from tiny_models import tiny_base_folder, tiny_image_folder

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.evaluation.utility import load_synthetic


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("user")
    tiny_base_folder(place / "base")
    tiny_image_folder(place / "images", {"dark": 20, "light": 220}, count=10)
    return place


@pytest.fixture(scope="module")
def arguments(place):
    return [
        "train", "--adapter", "lora", "--epsilon", "8", "--pretrained_model_name_or_path", place / "base",
        "--dataset-name", place / "images", "--output_dir", place / "runs" / "mine", "--train_batch_size", "10",
        "--max-train-steps", "2", "--target_modules", "to_q,to_out.0", "--sample_num_images", "4",
        "--sample_num_inference_steps", "2", "--micro_batch_size", "8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(place, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return place / "runs" / "mine", result


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, arguments):
    result = invoke(*arguments[:-2], "--output_dir", place / "runs" / "dry", "--dry_run")
    assert result.exit_code == 0, result.output
    for topic in ("Promise", "Mechanism", "Adapter", "Memory", "Time", "Public", "Writes", "Utility"):
        assert topic in result.output
    assert not (place / "runs" / "dry").exists() and not (place / "runs" / "dry.private").exists()


def test_train_ends_with_what_to_type_next(trained):
    folder, result = trained
    for command in ("dp-peft sample", "dp-peft verify", "dp-peft evaluate"):
        assert command in result.output
    assert (folder / "samples" / "step-0000.png").is_file() and (folder / "samples" / "step-0002.png").is_file()


def test_the_same_command_again_says_that_nothing_is_left_to_do(trained, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0 and "finished" in result.output


def test_verify_passes_and_fails_with_3_after_one_flipped_byte(trained, tmp_path):
    folder, _ = trained
    assert invoke("verify", folder).exit_code == 0
    weights = folder / "adapter_model.safetensors"
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert invoke("verify", folder).exit_code == 3
    finally:
        weights.write_bytes(original)


@pytest.mark.parametrize("form", [[], ["--parquet"]])
def test_sample_writes_images_of_the_wanted_classes(trained, place, form):
    folder, _ = trained
    out = place / f"samples{'-'.join(form)}"
    result = invoke(
        "sample", "--adapter", folder, "--num_images", 4, "--class_labels", "light", "--base", place / "base",
        "--output_dir", out, *form,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    images, labels = load_synthetic(out, ("dark", "light"))
    assert len(images) == 4 and set(labels) == {1}
    assert len(list((out / "images").glob("*.png"))) == (0 if form else 4)


def test_evaluate_tests_classifiers_on_real_images(trained, place):
    folder, _ = trained
    out = place / "for-evaluation"
    invoke("sample", "--adapter", folder, "--num_images", 40, "--base", place / "base", "--output_dir", out)
    result = invoke("evaluate", out, "--dataset_name", place / "images", "--split", "train", "--format", "json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert 0 <= facts["cnn"]["accuracy"] <= 1 and facts["covered_by_guarantee"] is False


def test_inspect_shows_tensors_and_certificate(trained):
    folder, _ = trained
    result = invoke("inspect", folder)
    assert result.exit_code == 0 and "lora_B" in result.output and "noise_multiplier" in result.output


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--epsilon", "0"], "epsilon"),
        (["--epsilon", "nan"], "epsilon"),
        (["--delta", "0.5"], "delta"),
        (["--adapter", "loha"], "lora"),
        (["--label_column", "none", "--image_column", "picture"], "picture"),
        (["--dataset_name", "no/such/folder"], "no/such/folder"),
        (["--pretrained_model_name_or_path", "builtin:nothing"], "builtin:nothing"),
        (["--target_modules", "to_qq"], "to_q"),
        (["--train_batch_size", "21"], "20"),
        (["--gradient_accumulation_steps", "2"], "micro_batch_size"),
        (["--max_train_stepz", "2"], "max_train_steps"),
    ],
)
def test_a_mistake_gets_a_clear_error_and_loses_nothing(place, arguments, extra, words):
    target = place / "runs" / "wrong"
    result = invoke(*arguments, "--output_dir", target, *extra, "--dry_run")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and words in result.output
    assert not target.exists() and not target.with_name("wrong.private").exists()
