"""Training and held-out images are two sets, and the training ones those of the run."""

import dataclasses

import numpy as np
import pytest

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.separation import check_other_split, count_identical, is_of_run
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.recipe import Data
from dp_peft_diffusion.runs.attempts import Attempt, Attempts
from tests.evaluation.test_private_classifier import make_stripes, private
from tests.privacy.folders import mechanism


def test_one_split_of_one_data_set_is_refused_and_another_split_or_configuration_is_not():
    data = Data(dataset_name="scans", split="train", dataset_config_name="left")
    with pytest.raises(UserError, match="'scans', split 'train', is given for.*--training_split"):
        check_other_split(data, dataclasses.replace(data, center_crop=True))
    for other in ({"split": "test"}, {"dataset_config_name": "right"}, {"dataset_name": "photographs"}):
        check_other_split(data, dataclasses.replace(data, **other))


def test_images_in_both_sets_are_counted_and_more_than_a_hundredth_are_refused():
    (training, labels), (held_out, others) = make_stripes(50), make_stripes(200, seed=1)

    def identical(count):
        mixed = np.concatenate([training[:count], held_out[count:]])
        return count_identical(private(mixed, others, digest=b"held out"), private(training, labels))

    assert [identical(count) for count in (0, 2)] == [0, 2]
    with pytest.raises(UserError, match="more than 1 % of the held-out images"):
        identical(3)
    with pytest.raises(UserError, match="are the same images"):
        count_identical(private(training, labels), private(training, labels))


def test_a_run_is_known_by_its_private_folder_or_by_name_and_mechanism(tmp_path):
    run, digest = tmp_path / "run", b"images of the test of separation"
    spending.record_spending(digest, "attempt of the run", 1, "moved-since", mechanism())
    assert not is_of_run(run, mechanism(), digest), "an entry of another run"
    (tmp_path / "run.private").mkdir()
    attempt = Attempt("attempt of the run", {}, {}, None)
    Attempts("check", "os", False, (attempt,)).save(tmp_path / "run.private" / "attempts.json")
    assert is_of_run(run, None, digest) and not is_of_run(run, None, b"other images")
    assert is_of_run(tmp_path / "moved-since", mechanism(), digest)
    assert not is_of_run(tmp_path / "moved-since", mechanism(steps=7), digest)
