"""What `dp-peft pretrain` makes of a command line. Nothing is trained here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from test_documentation import check_command

from dp_peft_diffusion.cli import main


@pytest.fixture
def asked(monkeypatch):
    """(recipe, folder) of each pretraining that was asked for."""
    found, fake = [], ModuleType("pretraining")
    fake.pretrain = lambda recipe, folder: found.append((recipe, folder)) or folder / "made"
    monkeypatch.setitem(sys.modules, "dp_peft_diffusion.pretraining", fake)
    return found


def invoke(*words):
    return CliRunner().invoke(main, ["pretrain", *words], prog_name="dp-peft")


@pytest.mark.parametrize(
    ("words", "kind", "folder"),
    [
        (["--recipe", "imagenet64"], "latent", "runs/imagenet64-base"),
        (["--recipe", "imagenet64-vae"], "autoencoder", "runs/imagenet64-vae"),
        (["--kind", "pixel"], "pixel", "runs/birds-base"),
        (["--kind", "autoencoder"], "autoencoder", "runs/birds-vae"),
        (["--recipe", "handwriting-features"], "features", "runs/handwriting-features"),
        (["--kind", "features"], "features", "runs/birds-features"),
        (["--recipe", "handwriting", "--output_dir", "here"], "handwriting", "here"),
    ],
)
def test_each_kind_has_its_folder_and_says_before_and_after_that_it_is_not_private(words, kind, folder, asked):
    result = invoke(*words, "--dataset_name", "pictures/birds")
    assert result.exit_code == 0, result.output
    ((recipe, given),) = asked
    assert (recipe.kind, given) == (kind, Path(folder))
    assert result.stdout.count("NOT private") == 2 and f"{folder}/made" in result.stdout
    follow = result.stderr.splitlines()[-1].strip()
    check_command(follow)
    begin = {"autoencoder": "--vae", "features": "dp-peft evaluate"}.get(kind, "dp-peft train")
    assert begin in follow and "--dataset_name" in follow
    assert "--dataset_name pictures/birds" not in follow or kind == "autoencoder", "public images are no private ones"


def test_the_autoencoder_of_a_recipe_is_made_where_its_latent_recipe_looks(asked):
    for name in ("emnist-letters", "imagenet32", "imagenet64"):
        follow = invoke("--recipe", f"{name}-vae", "--dataset_name", "x").stderr.splitlines()[-1]
        assert f"--recipe {name} --vae" in follow
        invoke("--recipe", name, "--dataset_name", "x")
        (_, made), (latent, _) = asked[-2:]
        assert Path(latent.vae) == made


def test_help_warns_first():
    text = " ".join(invoke("--help").stdout.split())
    assert text.index("PUBLIC images. This is NOT private") < text.index("Options")


@pytest.mark.parametrize("words", [["--recipe", "imagenet64", "--config", "x.yaml"], [], ["--max_train_steps", "3"]])
def test_one_of_recipe_config_and_kind_is_needed(words, asked):
    result = invoke(*words, "--dataset_name", "x")
    assert result.exit_code == 2 and result.stderr.startswith("error: give one of --recipe, --config and --kind")
    assert asked == []
