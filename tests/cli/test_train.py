"""What `dp-peft train` and `dp-peft pretrain` make of a command line. Training itself is not run here."""

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from test_documentation import check_command

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.cli.dialect import REFUSED
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.recipe import Recipe, load_recipe, recipe_path, to_yaml
from dp_peft_diffusion.typed_fields import flag, options


class FinishedRun(Exception):
    def __init__(self, folder):
        super().__init__(folder)
        self.folder = folder


@pytest.fixture
def training(monkeypatch, tmp_path):
    """The training module, replaced by one that records what it is asked for; labelled images have two classes."""
    monkeypatch.chdir(tmp_path)
    fake = ModuleType("training")
    fake.asked, fake.ran, fake.fault, fake.certificate = [], [], None, {}

    def prepare(recipe, output_dir, new_attempt):
        fake.asked.append((recipe, Path(output_dir)))
        fake.new_attempt = new_attempt
        classes = ("a", "b") if recipe.data.label_column and recipe.data.caption_column is None else None
        resolved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, class_names=classes))
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / "recipe.yaml").write_text(to_yaml(resolved))
        if fake.fault:
            raise fake.fault
        return SimpleNamespace(folder=Path(output_dir))

    def run(prepared, escrow_key):
        fake.ran.append(prepared)
        fake.escrow_key = escrow_key
        return SimpleNamespace(
            folder=prepared.folder,
            certificate=fake.certificate,
            private_folder=prepared.folder.with_name(f"{prepared.folder.name}.private"),
        )

    fake.prepare, fake.run, fake.plan_text, fake.FinishedRun = prepare, run, lambda _: "THE PLAN", FinishedRun
    monkeypatch.setitem(sys.modules, "dp_peft_diffusion.training", fake)
    return fake


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="dp-peft")


def asked_recipe(training, *words):
    result = invoke("train", *words)
    assert result.exit_code == 0, result.output
    return training.asked[-1][0]


def refused(*words, code=2):
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_the_command_of_the_readme_trains_recipe_digits(training):
    recipe = asked_recipe(training, "--adapter", "lora", "--epsilon", 1)
    assert recipe == load_recipe(recipe_path("digits"), {"privacy.epsilon": 1.0})
    assert training.asked[-1][1] == Path("runs/digits-eps1")
    assert len(training.ran) == 1


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--epsilon", "10"], "runs/digits-eps10"),
        (["--epsilon", "0.5"], "runs/digits-eps0.5"),
        (["--noise_multiplier", "2"], "runs/digits-noise2.0"),
        (["--no_privacy", "--declared_public"], "runs/digits-not-private"),
        (["--recipe", "digits"], "runs/digits-eps1"),
        (["--recipe", "digits", "--dataset_name", "/data/my scans/"], "runs/digits-eps1"),
        (["--recipe", "mnist", "--dataset_name", "org/cats"], "runs/mnist-eps1"),
        (["--dataset_name", "/data/my scans/", "--epsilon", "1"], "runs/my-scans-eps1"),
        (["--dataset_name", "org/cats", "--epsilon", "2"], "runs/cats-eps2"),
        (["--dataset_name", "builtin:digits", "--epsilon", "2"], "runs/digits-eps2"),
        (["--dataset_name", "..", "--epsilon", "2"], "runs/images-eps2"),
        (["--pretrained_model_name_or_path", "x/y", "--epsilon", "2"], "runs/digits-eps2"),
        (["--output_dir", "elsewhere"], "elsewhere"),
    ],
)
def test_the_folder_is_named_after_recipe_or_images_and_promise(training, words, folder):
    asked_recipe(training, *words)
    assert training.asked[-1][1] == Path(folder)


def test_own_images_or_an_own_base_leave_recipe_digits_out(training):
    for words in (["--dataset_name", "x"], ["--pretrained_model_name_or_path", "x"]):
        assert asked_recipe(training, *words, "--epsilon", 1).train == Recipe().train
        assert "--epsilon" in refused("train", *words)


def test_a_recipe_file_is_taken_with_flags_over_it(training, tmp_path):
    (tmp_path / "mine.yaml").write_text("privacy: {epsilon: 3}\ntrain: {seed: 4, max_train_steps: 5}\n")
    recipe = asked_recipe(training, "--config", tmp_path / "mine.yaml", "--seed", 6)
    assert (recipe.train.seed, recipe.train.max_train_steps, recipe.privacy.epsilon) == (6, 5, 3.0)
    assert training.asked[-1][1] == Path("runs/mine-eps3")


def test_a_written_recipe_can_be_run(training, tmp_path):
    recipe = load_recipe(recipe_path("digits"), {"train.seed": 8})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert asked_recipe(training, "--config", tmp_path / "recipe.yaml") == recipe


def test_a_recipe_and_a_file_together_are_refused(tmp_path):
    assert "Keep one" in refused("train", "--recipe", "digits", "--config", tmp_path / "x.yaml")
    assert "cannot be read" in refused("train", "--config", tmp_path / "x.yaml")
    assert "Did you mean 'digits'" in refused("train", "--recipe", "digit")


ALIASES = [
    ("--target_epsilon", "--epsilon", "2"),
    ("--target_delta", "--delta", "1e-6"),
    ("--expected_batch_size", "--train_batch_size", "7"),
    ("--max_physical_batch_size", "--micro_batch_size", "7"),
    ("--per_sample_max_grad_norm", "--max_grad_norm", "0.5"),
    ("--lora_r", "--rank", "7"),
    ("--network_dim", "--rank", "7"),
    ("--max-train-steps", "--max_train_steps", "7"),
    ("--train-batch-size", "--train_batch_size", "7"),
    ("--target-modules", "--target_modules", "to_q, to_k"),
]


@pytest.mark.parametrize(("alias", "name", "value"), ALIASES)
def test_other_spellings_mean_the_same(training, alias, name, value):
    assert (
        asked_recipe(training, alias, value)
        == asked_recipe(training, name, value)
        != load_recipe(recipe_path("digits"))
    )


def test_every_field_of_the_recipe_is_an_option(training):
    shown = invoke("train", "--help").output
    for section, spec, _ in options(Recipe()):
        assert re.search(rf"{flag(section, spec)}\b", shown), spec.name


NEEDS = {
    "rows_per_class": "--recipe mnist-codes --dataset_name org/cats",
    "group_column": "--max_examples_per_group 2",
    "max_examples_per_group": "--group_column patient",
    "sampling_prob": "--neighboring_relation add_or_remove_one",
    "augmentation_multiplicity": "--augmentations flip",
    "timestep_edges": "--timestep_weights 1",
    "timestep_weights": "--timestep_edges 0,3,9",
}


def test_every_field_can_be_set(training):
    values = {str: "text", int: "3", float: "0.25", tuple[str, ...]: "a,b", tuple[int, ...]: "1,2"}
    values[tuple[float, ...]] = "0.25,0.75"
    parsed = {"3": 3, "0.25": 0.25, "a,b": ("a", "b"), "1,2": (1, 2), "0.25,0.75": (0.25, 0.75)}
    for section, spec, default in options(Recipe()):
        kind = getattr(spec.type, "__args__", [spec.type])[0] if "None" in str(spec.type) else spec.type
        if kind is bool or "choices" in spec.metadata:
            continue
        extra = [] if section == "privacy" else ["--epsilon", "1"]
        words = [flag(section, spec), values[kind], *extra, *NEEDS.get(spec.name, "").split()]
        value = getattr(getattr(asked_recipe(training, *words), section), spec.name)
        separator = spec.metadata.get("separator", ",")
        assert value == (("a,b",) if separator == ";" else parsed.get(values[kind], values[kind]))
        assert value != default


def test_booleans_can_be_set_and_taken_back(training, tmp_path):
    (tmp_path / "r.yaml").write_text("privacy: {epsilon: 1}\ndata: {center_crop: true}\n")
    assert not asked_recipe(training, "--config", tmp_path / "r.yaml", "--no_center_crop").data.center_crop
    assert asked_recipe(training, "--config", tmp_path / "r.yaml").data.center_crop
    assert asked_recipe(training, "--center-crop").data.center_crop


def test_none_takes_a_value_away(training):
    recipe = asked_recipe(training, "--class_code_rank", "none", "--label_column", "None")
    assert recipe.adapter.class_code_rank is None and recipe.data.label_column is None
    assert load_recipe(recipe_path("digits")).adapter.class_code_rank is not None


def test_the_dry_run_prints_the_plan_and_trains_nothing(training):
    for switch in ("--dry_run", "--dry-run", "-n"):
        result = invoke("train", switch)
        assert result.stdout == "THE PLAN\nNothing was trained. Remove --dry_run to start.\n"
    assert training.ran == []


def test_a_run_ends_with_three_commands_to_try(training):
    result = invoke("train", "--output_dir", "runs/my run")
    assert result.stdout.startswith("THE PLAN\n") and "runs/my run.private" in result.stdout
    for command in ("sample --adapter", "verify", "evaluate"):
        assert f"dp-peft {command} 'runs/my run'" in result.stderr


def next_commands(*words):
    """The commands that `dp-peft train` says to try next, by name, each checked to be one that can be typed."""
    result = invoke("train", *words)
    assert result.exit_code == 0, result.output
    lines = result.stderr.partition("Try next:\n")[2].splitlines()
    for line in lines:
        check_command(line.strip())
    return {line.split()[1]: line for line in lines}


def test_captions_are_private_so_the_command_that_samples_says_a_prompt(training):
    words = ("--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--epsilon", 1, "--caption_column", "text")
    commands = next_commands(*words)
    assert "--prompt 'a photo of ...'" in commands["sample"]
    assert set(commands) == {"sample", "verify"}
    assert "--prompt" not in next_commands(*words, "--sample_prompts", "a cat")["sample"]
    assert "--prompt" not in next_commands()["sample"]


def test_a_run_without_classes_is_not_said_to_be_evaluated(training):
    assert set(next_commands()) == {"sample", "verify", "evaluate"}
    assert set(next_commands("--label_column", "none")) == {"sample", "verify"}


def test_a_base_in_a_local_folder_is_named_in_what_comes_next(training, tmp_path):
    (tmp_path / "my base").mkdir()
    commands = next_commands("--pretrained_model_name_or_path", tmp_path / "my base", "--epsilon", 1)
    assert all(f"--base '{tmp_path / 'my base'}'" in commands[name] for name in ("sample", "evaluate"))


def test_a_run_without_privacy_says_so_and_offers_nothing_to_verify(training):
    training.certificate = None
    result = invoke("train", "--no_privacy", "--declared_public")
    assert "WITHOUT privacy" in result.stdout and "not to be shared" in result.stdout
    assert "dp-peft sample" in result.stderr and "verify" not in result.stderr


def test_a_finished_run_says_so_and_spends_nothing(training):
    training.fault = FinishedRun(Path("runs/digits-eps1"))
    result = invoke("train")
    expected = "This run is finished: runs/digits-eps1. Nothing was trained and no privacy was spent.\n"
    assert (result.exit_code, result.stdout) == (0, expected)
    assert "dp-peft verify runs/digits-eps1" in result.stderr
    assert training.ran == []


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RunError, 1), (PrivacyError, 3)])
def test_errors_are_one_line_with_their_exit_code(training, kind, code):
    training.fault = kind("it is so. Type that.")
    assert refused("train", code=code) == "error: it is so. Type that."


def test_a_full_disk_names_the_file(training):
    training.fault = OSError(28, "No space left on device", "runs/x")
    assert refused("train", code=1).startswith("error: runs/x: No space left on device")


def test_the_choices_of_an_attempt_reach_the_run(training, tmp_path):
    asked_recipe(training, "--new_attempt", "--escrow_key", tmp_path / "key.json")
    assert training.new_attempt and training.escrow_key == tmp_path / "key.json"
    asked_recipe(training)
    assert not training.new_attempt and training.escrow_key is None
    assert "to be shared" in refused("train", "--output_dir", tmp_path, "--escrow_key", tmp_path / "key.json")


def test_a_fault_of_the_program_is_not_dressed_up(training):
    training.fault = ZeroDivisionError()
    assert isinstance(invoke("train").exception, ZeroDivisionError)


def test_an_interrupt_ends_with_a_sentence_and_130(training):
    training.fault = KeyboardInterrupt()
    result = invoke("train")
    assert result.exit_code == 130
    assert "Stopped" in result.stderr and "Type the same command to go on, without --new_attempt" in result.stderr
    assert "Traceback" not in result.output and "Aborted" not in result.output


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_flag_of_another_tool_is_refused_by_name_with_what_to_use(name):
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        error = refused("train", spelling, "1")
        assert f"no --{name} here" in error and REFUSED[name] in error


def test_no_refused_flag_exists_and_every_flag_it_advises_does():
    shown = set(re.findall(r"--\w+", invoke("train", "--help").output))
    assert not {f"--{name}" for name in REFUSED} & shown
    for advice in REFUSED.values():
        assert set(re.findall(r"--\w+", advice)) - {"--help"} <= shown, advice


def test_mistyped_options_and_commands_get_a_suggestion():
    assert "'--epsilon'" in refused("train", "--epsilom", "1")
    assert "'train'" in refused("trian")
    assert "'--num_images'" in refused("sample", "--num_image", "1")
    assert "no --report_to here" not in refused("sample", "--report_to", "1")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--epsilon", "nan"], "--epsilon"),
        (["--epsilon", "inf"], "--epsilon"),
        (["--epsilon", "-1"], "--epsilon"),
        (["--epsilon", "0"], "--epsilon"),
        (["--epsilon", "one"], "--epsilon"),
        (["--epsilon", "none"], "--epsilon 1"),
        (["--epsilon", "1", "--noise_multiplier", "1"], "--noise_multiplier"),
        (["--delta", "0"], "--delta"),
        (["--rank", "1.5"], "--rank"),
        (["--rank", "none"], "--rank"),
        (["--adapter", "loha"], "lora"),
        (["--clipping", "ghost"], "flat or automatic"),
        (["--class_rows", "1,x"], "--class_rows"),
        (["--class_names", "a,,b"], "--class_names"),
        (["--target_modules", ""], "--target_modules"),
        (["--no_privacy"], "--declared_public"),
        (["--seed", "-1"], "--seed"),
        (["stray"], "stray"),
        (["--epsilon"], "--epsilon"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(training, words, shown):
    assert shown in refused("train", *words)
    assert training.asked == []


@pytest.fixture
def pretraining(monkeypatch):
    fake = ModuleType("pretraining")
    fake.asked = []
    fake.pretrain = lambda recipe, folder: fake.asked.append((recipe, folder)) or folder / "base"
    monkeypatch.setitem(sys.modules, "dp_peft_diffusion.pretraining", fake)
    return fake


def test_pretraining_says_that_it_is_not_private(pretraining):
    result = invoke("pretrain", "--recipe", "handwriting", "--dataset_name", "omniglot", "--max-train-steps", 3)
    assert result.exit_code == 0, result.output
    assert "NOT private" in result.stdout and "runs/handwriting-base/base" in result.stdout
    recipe, folder = pretraining.asked[0]
    assert (recipe.dataset_name, recipe.max_train_steps, recipe.resolution) == ("omniglot", 3, 32)
    assert folder == Path("runs/handwriting-base")


def test_pretraining_without_recipe_or_images_is_refused(pretraining):
    assert "--recipe handwriting" in refused("pretrain", "--dataset_name", "x")
    assert "--dataset_name" in refused("pretrain", "--recipe", "handwriting")
    assert "unknown key 'model'" in refused("pretrain", "--recipe", "digits", "--dataset_name", "x")
    assert "--resolution" in refused("pretrain", "--recipe", "handwriting", "--dataset_name", "x", "--resolution", "0")
    assert pretraining.asked == []


def test_a_prompt_may_have_commas(training):
    words = ("--sample_prompts", "a cat, sitting on a mat; a dog")
    assert asked_recipe(training, *words).sample.prompts == ("a cat, sitting on a mat", "a dog")
