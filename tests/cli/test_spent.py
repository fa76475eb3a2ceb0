"""`dp-peft spent`: what a data set has given away, as a user sees it."""

import json

import pytest
from click.testing import CliRunner
from tiny_runs import changed, tiny_recipe

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.recipe import to_yaml
from dp_peft_diffusion.training import prepare, run, train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def spent(*arguments):
    result = CliRunner().invoke(main, ["spent", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_nothing_spent_says_so(recipe):
    assert "Nothing was spent" in spent() and "Nothing was spent" in spent("--dataset_name", recipe.data.dataset_name)


def test_finished_and_stopped_runs_count_together_wherever_their_folders_are(recipe, tmp_path, monkeypatch):
    train(recipe, tmp_path / "first")
    monkeypatch.setattr("dp_peft_diffusion.training.train_steps", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(changed(recipe, "train", learning_rate=0.2), tmp_path / "second")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shown = spent("--dataset_name", recipe.data.dataset_name)
    assert "first: 6 steps" in shown and "second: 6 steps" in shown and "all 2 together: epsilon" in shown
    (fact,) = json.loads(spent("--format", "json"))
    (price,) = fact["spent"]
    twelve = changed(recipe, "train", max_train_steps=12)
    assert price["epsilon"] == pytest.approx(prepare(twelve, tmp_path / "x").promise.epsilon, rel=2e-3)
    assert str(tmp_path) not in shown


def test_a_run_left_out_of_the_ledger_is_left_out_on_request_only(recipe, tmp_path):
    train(changed(recipe, "privacy", record_spending=False), tmp_path / "run")
    assert "Nothing was spent" in spent()


def test_a_labelled_run_is_found_again_by_its_images_alone(recipe, tmp_path):
    train(recipe, tmp_path / "labelled")
    (name,) = {fact["data_set"] for fact in json.loads(spent("--format", "json"))}
    (same,) = json.loads(spent("--dataset_name", recipe.data.dataset_name, "--format", "json"))
    assert same["data_set"] == name


def test_without_privacy_nothing_is_recorded(recipe, tmp_path):
    public = changed(changed(recipe, "privacy", noise_multiplier=None, no_privacy=True), "data", declared_public=True)
    run(prepare(public, tmp_path / "run"))
    assert "Nothing was spent" in spent()


def test_the_ledger_is_asked_before_anything_is_spent(recipe, tmp_path, monkeypatch):
    (tmp_path / "state").write_text("in the way")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    words = ["train", "--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "--no_record_spending" in result.stderr
    assert steps_begun(tmp_path / "run.private" / "ledger.jsonl") == {}
    assert CliRunner().invoke(main, [*words, "--no_record_spending"]).exit_code == 0  # the advice can be followed
