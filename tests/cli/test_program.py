"""The program as a whole: help, light imports, `env`, and the package's lazy names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import dp_peft_diffusion
from dp_peft_diffusion import environment
from dp_peft_diffusion.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "pretrain", "sample", "verify", "inspect", "plan", "evaluate", "bench", "env", "recipes", "spent")
HEAVY = {"torch", "torchvision", "diffusers", "peft", "transformers", "accelerate", "datasets", "opacus"}


def invoke(*words):
    return CliRunner().invoke(main, list(words), prog_name="dp-peft")


def modules_after(*words, exit_codes=(0,)):
    """Top-level modules that a process of its own has imported after running a command."""
    return modules_after_all([words], exit_codes)


def modules_after_all(commands, exit_codes=(0,)):
    """The same after several commands, one after the other."""
    code = (
        "import sys, json\nfrom dp_peft_diffusion.cli import main\ncodes = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words, prog_name='dp-peft')\n"
        "    except SystemExit as end:\n        codes.append(end.code)\n"
        "print(json.dumps([codes, sorted({name.split('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    ended = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True)
    codes, modules = json.loads(ended.stderr.splitlines()[-1])
    assert len(codes) == len(commands) and set(codes) <= set(exit_codes), ended.stderr
    return set(modules)


@pytest.mark.parametrize("switch", ["-h", "--help"])
def test_help_lists_every_command_on_one_screen(switch):
    result = invoke(switch)
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE), name
    assert len(result.stdout.splitlines()) <= 24
    assert "..." not in result.stdout.split("Commands:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_its_options(name):
    result = invoke(name, "-h")
    assert result.exit_code == 0
    command = main.commands[name]
    context = click.Context(command, info_name=name)
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in result.stdout


def test_no_command_at_all_shows_the_help():
    result = invoke()
    assert result.exit_code == 2 and "train" in result.output


PLAN = [
    "plan",
    "--num_examples",
    "100",
    "--noise_multiplier",
    "5",
    "--train_batch_size",
    "50",
    "--max_train_steps",
    "1",
]


@pytest.mark.parametrize("words", [["env"], PLAN])
def test_light_commands_import_nothing_heavy(words):
    assert not HEAVY & modules_after(*words)  # `env` tries the real pair, in a process of its own


def test_no_help_imports_anything_heavy():
    assert not HEAVY & modules_after_all([["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])


def test_verify_and_inspect_import_nothing_heavy(tmp_path):
    assert not HEAVY & modules_after("verify", tmp_path, exit_codes=(3,))
    save_file({"x": np.ones(1)}, tmp_path / "x.safetensors")
    assert not HEAVY & modules_after("inspect", tmp_path)


def test_help_does_not_even_import_numpy():
    assert not {"numpy", "safetensors", "dp_accounting", "yaml.cyaml"} & modules_after("--help")


def test_the_list_of_imports_is_that_of_the_command():
    assert {"click", "yaml"} <= modules_after("--help")
    assert "numpy" in modules_after("inspect", "absent", exit_codes=(2,))


PAIR = {"ok": True, "device": "cpu", "error": None, "install": None}


def test_env_prints_versions_and_the_pair(monkeypatch):
    monkeypatch.setattr(environment, "check_pair", lambda: PAIR)
    result = invoke("env")
    assert result.exit_code == 0
    assert re.search(rf"^click +{re.escape(environment.installed('click'))}$", result.stdout, re.MULTILINE)
    assert "a pair, on cpu" in result.stdout
    facts = json.loads(invoke("env", "--format", "json").stdout)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["pair"] == PAIR


def test_env_tells_how_to_mend_a_broken_pair(monkeypatch):
    monkeypatch.setattr(environment, "PAIR_CHECK", "raise RuntimeError('operator torchvision::nms does not exist')")
    result = invoke("env")
    assert result.exit_code == 1
    assert "operator torchvision::nms does not exist" in result.stderr
    assert f"pip install --force-reinstall {environment.TESTED_PAIR}" in result.stderr


@pytest.mark.parametrize(
    ("torch", "torchvision", "named"),
    [("2.9.0+cpu", "0.24.0", True), ("2.9.0", "0.24.0+cu128", True), ("2.9.0", "0.24.0", False), (None, None, False)],
)
def test_both_of_a_pair_come_from_one_source(torch, torchvision, named):
    command = environment.pair_command(torch, torchvision)
    assert environment.TESTED_PAIR in command
    assert ("--index-url" in command) == named


def test_the_tested_pair_is_the_one_that_constraints_pin():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(environment.TESTED_PAIR.split()) <= set(pinned)


def test_a_package_that_is_not_there_has_no_version():
    assert environment.installed("no-such-distribution-here") is None


def test_the_package_offers_its_names_without_importing_their_rooms():
    names = {"DPMechanism", "PerSampleClipper", "Recipe", "inject_adapter", "load_adapter", "merge_adapter"}
    names |= {"train", "generate", "verify"}
    assert set(dp_peft_diffusion.__all__) == names <= set(dir(dp_peft_diffusion))
    code = "import sys, dp_peft_diffusion; dp_peft_diffusion.Recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", dp_peft_diffusion.__all__)
def test_every_offered_name_is_there(name):
    assert getattr(dp_peft_diffusion, name).__name__ == name


def test_a_name_that_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        getattr(dp_peft_diffusion, "nothing_like_it")  # noqa: B009


def test_a_pretraining_that_is_stopped_says_how_to_go_on(monkeypatch, tmp_path):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dp_peft_diffusion.pretraining.pretrain", stopped)
    words = ("pretrain", "--kind", "pixel", "--dataset_name", "x", "--output_dir", str(tmp_path / "out"))
    result = invoke(*words)
    assert result.exit_code == 130 and "same command" in result.stderr
