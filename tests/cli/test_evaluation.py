"""`dp-peft evaluate` on folders, parquet files and adapters: what it measures, and where private numbers may go."""

import functools
import json
import shutil
import stat
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from stripes import make_stripes, write_image_folder, write_parquet, write_sampled_folder
from tiny_adapters import shared
from tiny_models import tiny_base_folder

from dp_peft_diffusion.cli import evaluation, main
from dp_peft_diffusion.diffusion import base_folder, generation
from dp_peft_diffusion.diffusion.datasets import source_digest
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import classifiers, measurements, private_classifier, summary
from dp_peft_diffusion.evaluation.private_classifier import promise_beside
from dp_peft_diffusion.evaluation.together import Together
from dp_peft_diffusion.evaluation.tuning import Setting, tune
from dp_peft_diffusion.privacy import adapter_files, spending
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.recipe import Adapter, Data
from tests.privacy.folders import promise

NAMES = ("top", "bottom")
WITH_ROWS = Adapter(rank=2, target_modules=("to_q",), class_rows=(10, 11), class_code_rank=3)
TRAINED_ON = {"num_examples": 80, "sampling_prob": 0.25, "expected_batch_size": 20, "steps": 10}
QUICK = ("--classifiers", "logistic_regression", "--epochs", 1)
SAMPLED = ("--num_images", 6, "--num_inference_steps", 1)


def invoke(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)], prog_name="dp-peft")


def measured(*words):
    result = invoke(*words, "--format", "json")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return json.loads(result.stdout)


def refused(*words, code=2):
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def stripes(n, seed):
    """Images of the side of the tiny base."""
    images, labels = make_stripes(n, seed, classes=2)
    return images.repeat(2, axis=2).repeat(2, axis=3), labels


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Synthetic images in three forms, real ones as a folder with two splits, and a run with a certificate."""
    place = tmp_path_factory.mktemp("evaluation")
    write_image_folder(place / "real" / "train", *stripes(80, 1), NAMES)
    write_image_folder(place / "real" / "test", *stripes(60, 2), NAMES)
    write_sampled_folder(place / "folder", *stripes(60, 0), NAMES)
    write_parquet(place / "file.parquet", *stripes(60, 0), NAMES)
    base = tiny_base_folder(place / "bases" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        for module in (base_folder, adapter_files):
            patch.setattr(module, "BUILTIN_BASES", place / "bases")
        patch.setattr(measurements, "promise_beside", functools.partial(promise_beside, steps=2))
        patch.setattr(
            measurements, "tune", functools.partial(tune, settings=(Setting(1, 4, 1e-2), Setting(2, 4, 1e-2)))
        )
        data = Data(class_names=NAMES)
        shared(place / "run", base, WITH_ROWS, data, certified=True, promised=promise(epsilon=9.0, **TRAINED_ON))
        yield place


@pytest.fixture
def no_sampling(monkeypatch):
    """Sampling takes minutes: what can be refused is refused before it."""
    monkeypatch.setattr(generation.ImageSource, "batches", lambda *_: pytest.fail("it was sampled"))


@pytest.mark.parametrize("synthetic", ["folder", "file.parquet"])
def test_a_folder_and_a_parquet_file_of_the_same_images_give_the_same_numbers(place, synthetic):
    found = measured(place / synthetic, "--dataset_name", place / "real", "--class_names", "top,bottom")
    assert (found["num_synthetic_images"], found["num_real_images"]) == (60, 60)
    assert found["logistic_regression"]["accuracy"] > 0.9, "these images can be told apart"
    assert found["cnn"]["training"]["epochs"] == 20 and found["class_names"] == list(NAMES)
    again = measured(place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom")
    assert found == again


def test_a_run_is_sampled_in_its_own_classes_as_it_is_told_and_else_as_its_recipe_says(place, monkeypatch):
    asked, open_source = [], generation.open_source

    def spy(folder, **settings):
        asked.append((folder, settings))
        return open_source(folder, **settings)

    monkeypatch.setattr(generation, "open_source", spy)
    found = measured(place / "run", "--dataset_name", place / "real", *SAMPLED, *QUICK)
    assert found["num_synthetic_images"] == 6 and found["class_names"] == list(NAMES)
    told = ["--scheduler", "utility", "--guidance_scale", 2, "--seed", 3, "--base", place / "bases" / "tiny"]
    measured(place / "run", "--dataset_name", place / "real", *SAMPLED, *told, *QUICK)
    names = ("class_labels", "scheduler", "num_inference_steps", "guidance_scale", "seed", "base", "relabel")
    first, second = ({name: settings[name] for name in names} for _, settings in asked)
    assert first == dict(zip(names, (NAMES, None, 1, None, 0, None, False), strict=True))
    assert second == dict(zip(names, (NAMES, "utility", 1, 2.0, 3, str(place / "bases" / "tiny"), False), strict=True))
    refused = invoke(place / "run", "--dataset_name", place / "real", *SAMPLED, "--relabel", *QUICK)
    assert asked[2][1]["relabel"] and refused.exit_code == 2 and "--relabel needs classes, and a base" in refused.stderr


def test_images_that_have_labels_are_not_relabelled(place):
    words = ["--dataset_name", place / "real", "--class_names", "top,bottom", "--relabel"]
    refused = invoke(place / "folder", *words)
    assert refused.exit_code == 2 and "dp-peft sample --relabel" in refused.stderr


def test_options_of_training_reach_the_classifiers(place):
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom", "--epochs", "2"]
    trained = measured(*words, "--warp", "--flip")["cnn"]["training"]
    assert (trained["epochs"], trained["warp"], trained["flip"]) == (2, True, True)
    assert not measured(*words)["cnn"]["training"]["warp"]


def test_the_images_of_a_run_are_those_of_sample_with_their_classes(place):
    source = generation.open_source(place / "run", class_labels=("bottom", "top"), num_inference_steps=1)
    images, labels = evaluation.sampled(source, ("bottom", "top"), 5)
    pictures, names = generation.generate(
        place / "run", num_images=5, class_labels=("bottom", "top"), num_inference_steps=1
    )
    assert labels.tolist() == [0, 1, 0, 1, 0] and names == ["bottom", "top", "bottom", "top", "bottom"]
    assert np.array_equal(images[:, 0], [np.asarray(picture) for picture in pictures])


def test_every_table_of_private_images_says_that_the_guarantee_does_not_cover_it_and_choices_are_to_be_told(place):
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom", *QUICK]
    told, left = invoke(*words, "--learning_curve"), invoke(*words, "--learning_curve", "--declared_public")
    assert told.exit_code == left.exit_code == 0
    assert told.stdout.count(summary.STAMP) == 3 and "does not cover them" in told.stdout
    assert "--unpaid_runs" in told.stderr and "--tuning_runs" in told.stderr
    assert "guarantee" not in left.stdout and "--unpaid_runs" not in left.stderr


def test_every_part_of_a_private_result_is_stamped_and_none_of_a_public_one(place):
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom", *QUICK]
    words += ["--reference", "--learning_curve", "--tuning", "--features", "handwriting"]
    private, public = measured(*words), measured(*words, "--declared_public")
    parts = [private, private["logistic_regression"], private["reference"], private["tuning"]]
    parts += [*private["learning_curve"], *private["fidelity"]]
    assert len(parts) == 7 and all(part["covered_by_guarantee"] is False for part in parts)
    assert "covered_by_guarantee" not in json.dumps(public) and "statement" not in public
    assert private["fidelity"][0]["names"]["frechet_distance"] == "handwriting Frechet distance"


def test_built_in_images_are_public_but_not_beside_private_ones_that_were_trained_on():
    def built_in(training, **wanted):
        looks = SimpleNamespace(of_training_images=wanted.get("reference", False))
        return evaluation.is_built_in(looks, {"dataset_name": "builtin:digits", "training_dataset_name": training})

    assert built_in(None) and built_in(None, reference=True) and built_in("scans")
    assert not built_in("scans", reference=True)


def test_numbers_of_private_images_are_written_into_a_private_folder_or_nowhere(place, tmp_path, no_sampling):
    words = [place / "run", "--dataset_name", place / "real", *QUICK]
    error = refused(*words, "--output_dir", tmp_path / "found")
    assert f"--output_dir {tmp_path}/found.private" in error and "--declared_public" in error
    for inside in ("found", "found.private"):
        assert "lies in" in refused(*words, "--declared_public", "--output_dir", place / "run" / inside)
    (tmp_path / "open.private").mkdir(mode=0o755)
    assert "chmod 700" in refused(*words, "--output_dir", tmp_path / "open.private", code=3)
    assert [path.name for path in tmp_path.iterdir()] == ["open.private"]


@pytest.mark.parametrize("public", [False, True])
def test_the_files_hold_what_is_printed_and_private_ones_are_for_their_owner_only(place, tmp_path, public):
    folder = tmp_path / ("found" if public else "found.private")
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom", *QUICK]
    found = measured(*words, "--output_dir", folder, *["--declared_public"] * public)
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json", "evaluation.md", "evaluation.html", "classes.png"
    }  # fmt: skip
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    assert modes == ({0o755, 0o644} if public else {0o700, 0o600})
    for name in ("evaluation.md", "evaluation.html"):
        assert ("not cover" in (folder / name).read_text()) == (not public)


@pytest.fixture(scope="module")
def everything(place):
    """All that can be measured of a run."""
    words = ["--dataset_name", place / "real", "--num_images", 40, "--num_inference_steps", 1, "--epochs", 1]
    words += ["--learning_curve", "--tuning", "--features", "handwriting", "--reference", "--memorization"]
    words += ["--membership", "--private_classifier", "--num_seeds", 2, "--ensemble", 2]
    folder = place / "everything.private"
    result = invoke(place / "run", *words, "--output_dir", folder)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return SimpleNamespace(result=result, folder=folder, found=json.loads((folder / "evaluation.json").read_text()))


def test_everything_that_is_wanted_is_measured_printed_and_drawn(everything):
    found, printed = everything.found, everything.result.stdout
    assert len(found["cnn"]["accuracies"]) == found["ensemble"] == 2
    assert found["reference"]["num_training_images"] == 80 and found["membership"]["num_members"] == 80
    assert found["memorization"]["num_held_out_images"] == 60
    assert found["membership"]["auc_bound"] < 1 and found["membership"]["message"] in printed
    for shown in ("small CNN, 2 vote", "real images, without privacy", "Spearman", "handwriting Frechet distance"):
        assert shown in printed
    assert {"learning_curve.png", "tuning.png", "classes.png"} < {path.name for path in everything.folder.iterdir()}


def test_the_pictures_of_nearest_training_images_lie_in_the_private_folder_alone(everything, place):
    listed = {path.name for path in everything.folder.glob("nearest*")}
    assert listed == {"nearest_training_images.csv", "nearest_training_images.png"}
    assert [path for path in place.rglob("nearest*") if path.parent != everything.folder] == []
    assert "nearest_training" not in (everything.folder / "evaluation.html").read_text()


def test_the_private_classifier_is_a_release_in_addition_and_in_the_ledger_of_the_data_set(everything):
    found = everything.found["private_classifier"]
    assert found["release"]["epsilon"] == 9.0 < found["joint_epsilon"]
    assert found["release"]["mechanism"]["count"] == 2 and found["release"]["num_examples"] == 80
    assert "at epsilon 9 in addition (together" in everything.result.stdout
    assert "spent whether its accuracy is published or not" in everything.result.stdout
    ledgers = [json.dumps(path.read_text()) for path in spending.spending_folder().glob("*.jsonl")]
    assert sum("run-classifier" in ledger for ledger in ledgers) == 1


def test_a_private_classifier_beside_a_run_of_groups_reads_images_by_group(place, tmp_path, monkeypatch):
    images, labels = stripes(80, 1)
    patients = [f"p{index // 4}" for index in range(80)]
    write_parquet(tmp_path / "scans.parquet", images, labels, NAMES, patient=patients)
    data = Data(class_names=NAMES, group_column="patient", max_examples_per_group=2)
    shared(tmp_path / "run", place / "bases" / "tiny", WITH_ROWS, data)
    asked = []

    def train(images, promise, **settings):
        asked.append((len(images), images.valid_arrays()[1], settings))
        release = {"epsilon": 1.0, "statement": "in addition"}
        return SimpleNamespace(predict=lambda pixels: np.zeros(len(pixels), int), release=lambda: release)

    monkeypatch.setattr(measurements, "checked_promise", lambda _: {})  # pricing groups takes seconds
    monkeypatch.setattr(measurements, "promise_beside", lambda _: "promise")
    monkeypatch.setattr(measurements, "promise_of", lambda _: SimpleNamespace(mechanism=None))
    monkeypatch.setattr(measurements, "check_trainable", lambda *_: None)
    monkeypatch.setattr(measurements, "price_together", lambda *_, **__: Together(None, 0, ()))
    monkeypatch.setattr(measurements, "train_classifier", train)
    words = ["--dataset_name", place / "real", "--training_dataset_name", tmp_path / "scans.parquet", *QUICK]
    result = invoke(tmp_path / "run", *words, *SAMPLED, "--private_classifier", "--reference")
    assert "together above 100" in result.stdout and "trained on" in result.stdout
    ((listed, used, settings),) = asked
    assert (listed, len(used)) == (80, 40), "every row has a slot, and what is over a group's cap is null in it"
    assert settings["group_column"] == "patient" and settings["recorded"] is True
    assert "40 real images, without privacy" in result.stdout


def test_a_membership_test_is_told_the_adapters_classes_in_whatever_order_they_are_named(place, monkeypatch):
    seen = []

    def scores(folder, members, held_out, **_):
        seen.append((members[1], held_out[1]))
        return measurements.membership_test.__globals__["Scores"](*np.random.default_rng(0).normal(size=(2, 60)))

    monkeypatch.setattr(measurements, "membership_scores", scores)
    words = [place / "run", "--dataset_name", place / "real", *SAMPLED, *QUICK, "--membership"]
    measured(*words)
    measured(*words, "--class_names", "bottom,top")
    (members, held_out), (turned, turned_too) = seen
    assert sorted(set(members)) == [0, 1]
    assert np.array_equal(members, turned) and np.array_equal(held_out, turned_too)


def test_images_are_compared_at_the_size_that_is_asked_for(place):
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom", *QUICK]
    assert measured(*words, "--evaluation_resolution", 2)["logistic_regression"]["accuracy"] < 0.9
    assert measured(*words, "--evaluation_resolution", 8)["logistic_regression"]["accuracy"] > 0.9


def test_classifiers_train_as_they_are_told(place):
    words = [place / "folder", "--dataset_name", place / "real", "--class_names", "top,bottom"]
    found = measured(*words, "--classifiers", "mlp, cnn", "--epochs", 2, "--flip")
    assert [name for name in classifiers.NAMES if name in found] == ["mlp", "cnn"]
    assert [found[name]["training"]["epochs"] for name in ("mlp", "cnn")] == [2, 2]
    assert found["cnn"]["training"]["flip"] and not found["mlp"]["training"]["flip"]


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(place, no_sampling, tmp_path):
    real = ["--dataset_name", place / "real"]
    assert "no classifier" in refused(place / "run", *real, "--classifiers", "cnn,svm")
    assert "no classifier" in refused(place / "run", *real, "--classifiers", "")
    assert "no such folder" in refused(place / "run", *real, "--features", "nothing")
    assert "no split 'dev'" in refused(place / "run", *real, "--reference", "--training_split", "dev")
    assert "--features handwriting" in refused(place / "run", *real, "--memorization")
    memorization = ["--memorization", "--features", "handwriting"]
    assert "--output_dir NAME.private" in refused(place / "run", *real, *memorization)
    for option in ("--membership", "--private_classifier"):
        assert "Give its folder" in refused(place / "folder", *real, option)
    shared(tmp_path / "run", place / "bases" / "tiny", WITH_ROWS, Data(class_names=NAMES))
    assert "has none" in refused(tmp_path / "run", *real, "--private_classifier")
    (tmp_path / "run" / "recipe.yaml").write_text("privacy: {epsilon: 1}\n")
    for more in ([], ["--class_names", "top,bottom"]):
        error = refused(tmp_path / "run", *real, *more)
        assert "has no classes" in error and "--class_labels" not in error


def test_what_a_private_classifier_cannot_be_trained_on_is_refused_before_anything_is_sampled(
    place, no_sampling, tmp_path, monkeypatch
):
    words = [place / "run", "--dataset_name", place / "real", *QUICK, "--private_classifier"]
    write_parquet(tmp_path / "few.parquet", *stripes(20, 3), NAMES)
    error = refused(*words, "--training_dataset_name", tmp_path / "few.parquet")
    assert "more or fewer training images" in error and "--training_dataset_name" in error
    (tmp_path / "file").write_text("")
    error = refused(*words, "--declared_public", "--output_dir", tmp_path / "file")
    assert f"--output_dir {tmp_path}/file cannot be made" in error
    monkeypatch.setattr(private_classifier, "SMALLEST_SIDE", {1: 17, 3: 17})
    error = refused(*words)
    assert "sees 1x16x16" in error and "--evaluation_resolution" not in error


@pytest.mark.parametrize("option", ["--reference", "--membership"])
def test_one_set_of_images_for_training_and_test_is_refused(place, no_sampling, tmp_path, option):
    words = [place / "run", *QUICK, option]
    error = refused(*words, "--dataset_name", place / "real", "--split", "train")
    assert "split 'train', is given for the training images and for the held-out ones" in error
    shutil.copytree(place / "real" / "train", tmp_path / "same")
    words += ["--training_dataset_name", place / "real"]
    assert "are the same images" in refused(*words, "--dataset_name", tmp_path / "same", "--split", "train")


def test_images_of_the_run_are_known_by_its_ledger_and_identical_ones_are_told(place):
    words = [place / "run", "--dataset_name", place / "real", *SAMPLED, *QUICK, "--membership"]
    unknown = measured(*words)
    assert unknown["real_images"]["training_images_of_the_run"] is False
    assert unknown["membership"]["message"].startswith("NOT VERIFIED")
    entry = json.loads((place / "run" / "privacy.json").read_text())
    digest = source_digest(Data(dataset_name=str(place / "real"), label_column=None))
    spending.record_spending(digest, "by another test", 1, "run", promise_of(entry).mechanism)
    result = invoke(*words)
    assert "those of the run, as its ledger says" in result.stdout
    assert "held-out images identical to a training image  0 of 60" in result.stdout
    assert "Within the bound" in result.stdout


def test_a_price_that_does_not_add_up_is_told_before_anything_is_sampled(place, no_sampling, monkeypatch):
    def refuse(*_, **__):
        raise UserError("no price. Train on others.")

    monkeypatch.setattr(measurements, "price_together", refuse)
    words = [place / "run", "--dataset_name", place / "real", *QUICK, "--private_classifier"]
    assert "no price" in refused(*words)


def test_a_run_that_does_not_keep_its_certificate_is_not_compared_with_it(place, tmp_path, no_sampling):
    promised = promise(epsilon=9.0, **TRAINED_ON)
    folder = shared(
        tmp_path / "run",
        place / "bases" / "tiny",
        WITH_ROWS,
        Data(class_names=NAMES),
        certified=True,
        promised=promised,
    )
    document = (folder / "privacy.json").read_text()
    (folder / "privacy.json").write_text(document.replace('"epsilon": 9.0', '"epsilon": 90.0'))
    real = ["--dataset_name", place / "real"]
    for option in ("--membership", "--private_classifier"):
        assert "does not keep what" in refused(folder, *real, option, code=3)


def test_the_private_folder_of_a_run_takes_the_lists_of_neighbours(place, tmp_path):
    folder = shared(tmp_path / "run", place / "bases" / "tiny", WITH_ROWS, Data(class_names=NAMES))
    (tmp_path / "run.private").mkdir(mode=0o700)
    measured(folder, "--dataset_name", place / "real", *SAMPLED, *QUICK, "--memorization", "--features", "handwriting")
    assert len(list((tmp_path / "run.private").iterdir())) == 2


def test_images_whose_classes_nobody_names_need_a_list_of_them(place, tmp_path):
    write_parquet(tmp_path / "real.parquet", *stripes(20, 2), NAMES)
    words = [place / "folder", "--dataset_name", tmp_path / "real.parquet", "--split", "train", *QUICK]
    assert "--class_names" in refused(*words)
    assert measured(*words, "--class_names", "bottom, top")["class_names"] == ["bottom", "top"]


def test_the_classifiers_of_the_help_are_those_there_are():
    assert tuple(evaluation.split(evaluation.CLASSIFIERS)) == classifiers.NAMES == tuple(summary.TITLES)
