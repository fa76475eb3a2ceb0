"""With the images and an escrowed key, training comes out bit for bit; without either, nothing is claimed."""

import json
import shutil
import stat

import pytest
from click.testing import CliRunner
from tiny_runs import changed, tiny_recipe

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.replay import replay
from dp_peft_diffusion.runs import escrow
from dp_peft_diffusion.training import prepare, run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def escrowed(recipe, tmp_path_factory):
    """(shareable folder, file with its key)."""
    folder = tmp_path_factory.mktemp("escrowed")
    return run(prepare(recipe, folder / "run"), escrow_key=folder / "key.json").folder, folder / "key.json"


def test_a_replay_gives_the_certified_weights_and_leaves_nothing_behind(recipe, escrowed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    places = (recipe.data.dataset_name, recipe.model.pretrained_model_name_or_path)
    sentence = replay(escrowed[0], escrowed[1], *places)
    assert "adapter_model.safetensors came out bit for bit" in sentence
    assert list(tmp_path.iterdir()) == []


def test_verify_replays_through_the_command_line(recipe, escrowed, tmp_path):
    folder, key = escrowed
    base = ("--base", recipe.model.pretrained_model_name_or_path)
    words = ["verify", str(folder), "--escrow_key", str(key), "--dataset_name", recipe.data.dataset_name, *base]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0 and "✓ replay" in shown.stdout, shown.output
    shutil.copytree(recipe.data.dataset_name, tmp_path / "other")
    next((tmp_path / "other").rglob("*.png")).write_bytes(b"")
    words[words.index(recipe.data.dataset_name)] = str(tmp_path / "other")
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 3 and "✗ replay" in refused.stdout and "the images changed" in refused.stdout
    alone = CliRunner().invoke(main, ["verify", str(folder), "--escrow_key", str(key)])
    assert alone.exit_code == 2 and "--dataset_name" in alone.stderr


def test_images_moved_elsewhere_replay_and_other_images_do_not(recipe, escrowed, tmp_path):
    base = recipe.model.pretrained_model_name_or_path
    shutil.copytree(recipe.data.dataset_name, tmp_path / "moved")
    shutil.copytree(base, tmp_path / "renamed base")
    replay(*escrowed, str(tmp_path / "moved"), str(tmp_path / "renamed base"))
    next((tmp_path / "moved").rglob("*.png")).write_bytes(b"")
    with pytest.raises(PrivacyError, match="not what was trained with: the images changed"):
        replay(*escrowed, str(tmp_path / "moved"), base)


def test_weights_that_were_not_trained_with_this_key_are_found(recipe, escrowed, tmp_path):
    places = (recipe.data.dataset_name, recipe.model.pretrained_model_name_or_path)
    other = run(prepare(recipe, tmp_path / "other"), escrow_key=tmp_path / "other.json").folder
    with pytest.raises(PrivacyError, match="came out different: adapter_model.safetensors"):
        replay(other, escrowed[1], *places)
    document = json.loads((other / "recipe.yaml").with_name("privacy.json").read_text())
    assert document["key_after_export"] == "escrowed"


def test_a_run_of_an_earlier_epsilon_replays_from_the_certified_mechanism(recipe, tmp_path):
    """--epsilon is calibrated again in training; a replay takes what was certified."""
    recipe = changed(recipe, "privacy", noise_multiplier=None, epsilon=5.0)
    recipe = changed(recipe, "train", train_batch_size=10)
    folder = run(prepare(recipe, tmp_path / "run"), escrow_key=tmp_path / "key.json").folder
    replay(folder, tmp_path / "key.json", recipe.data.dataset_name, recipe.model.pretrained_model_name_or_path)


def test_the_certificate_says_what_becomes_of_the_key_and_verify_repeats_it(escrowed):
    document = json.loads((escrowed[0] / "privacy.json").read_text())
    assert document["key_source"] == "os" and document["key_after_export"] == "escrowed"
    report = verify(escrowed[0])
    assert report.ok and "escrow" in {name: text for name, _, text in report.levels}["key"]
    assert stat.S_IMODE(escrowed[1].stat().st_mode) == 0o600


def test_an_escrowed_key_is_not_put_where_it_is_shared_lost_or_overwrites_something(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    for place, reason in (
        (tmp_path / "run" / "key.json", "to be shared"),
        (tmp_path / "nowhere" / "key.json", "no folder"),
        (tmp_path / "thesis.txt", "no key"),
    ):
        with pytest.raises(UserError, match=reason):
            escrow.check_place(place, tmp_path / "run")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    escrow.check_place(tmp_path / "key.json", tmp_path / "run")


def test_the_key_of_another_run_is_not_overwritten(tmp_path):
    mine = escrow.EscrowedKey(bytes(16), 1, {"code": "a"})
    escrow.write_escrowed_key(tmp_path / "key.json", mine)
    assert escrow.read_escrowed_key(tmp_path / "key.json") == mine
    escrow.write_escrowed_key(tmp_path / "key.json", mine._replace(attempt=2))
    assert escrow.read_escrowed_key(tmp_path / "key.json").attempt == 2
    with pytest.raises(UserError, match="key of another run"):
        escrow.write_escrowed_key(tmp_path / "key.json", mine._replace(key=bytes(15) + b"\x01"))
    for content in ("", "[]", '{"schema": "another"}'):
        (tmp_path / "key.json").write_text(content)
        with pytest.raises(UserError, match="no key that --escrow_key wrote"):
            escrow.read_escrowed_key(tmp_path / "key.json")
