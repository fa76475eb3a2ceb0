import csv
import os

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.spatial.distance import cdist

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.evaluation.memorization import DRAWS, compare_neighbours, write_neighbours


def independent(n, m, k, seed=0, width=6):
    """Samples, training and held-out images of one distribution."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(count, width)) for count in (n, m, k)]


def test_neighbours_and_distances_are_those_of_all_pairs_one_by_one():
    samples, training, held_out = independent(30, 50, 20)
    found = compare_neighbours(samples, training, held_out)[1]
    for nearest, images in ((found.training, training), (found.held_out, held_out)):
        pairs = cdist(samples, images)
        assert np.array_equal(nearest.index, pairs.argmin(axis=1))
        np.testing.assert_allclose([nearest.distance, nearest.second], np.sort(pairs, axis=1)[:, :2].T, atol=1e-7)


@pytest.mark.parametrize(("m", "k"), [(400, 400), (900, 100)])
def test_samples_that_owe_nothing_to_training_images_are_as_near_to_held_out_ones(m, k):
    numbers, _ = compare_neighbours(*independent(600, m, k))
    assert numbers["expected_share"] == m / (m + k)
    assert abs(numbers["z"]) < stats.norm.isf(5e-7)
    assert abs(np.log(numbers["median_distance_ratio"])) < 0.05
    assert numbers["share_of_copies"] < 0.02 and numbers["share_of_copies_of_held_out_images"] < 0.02


def test_z_is_standard_normal_also_where_samples_share_their_neighbours():
    """Many samples, few images: as if they were independent, z would be three times as large."""
    runs = [compare_neighbours(*independent(400, 30, 20, seed, width=2))[0]["z"] for seed in range(60)]
    chance = stats.chi2(len(runs))
    assert 2 * min(chance.cdf(np.square(runs).sum()), chance.sf(np.square(runs).sum())) > 1e-6
    assert abs(np.sum(runs)) / np.sqrt(len(runs)) < stats.norm.isf(5e-7)


def test_planted_copies_of_training_images_are_found_and_come_first():
    samples, training, held_out = independent(300, 500, 500, seed=1)
    copied = np.array([7, 130, 131, 299])
    samples[copied] = training[[5, 0, 499, 250]] + 1e-3
    numbers, found = compare_neighbours(samples, training, held_out)
    assert set(found.suspects(4)) == set(copied)
    assert found.training.index[copied].tolist() == [5, 0, 499, 250]
    assert numbers["share_of_copies"] >= 4 / 300 > numbers["share_of_copies_of_held_out_images"]


def test_a_copy_of_an_image_that_occurs_several_times_is_a_copy():
    samples, training, held_out = independent(100, 200, 200, seed=4)
    rounding = 1e-9 * np.random.default_rng(5).normal(size=(3, training.shape[1]))
    training[[50, 90, 199]] = training[7] + rounding
    samples[:10] = training[7]
    numbers, found = compare_neighbours(samples, training, held_out)
    alone, _ = compare_neighbours(samples[10:], training, held_out)
    assert found.training.copies[:10].all()
    assert numbers["share_of_copies"] == pytest.approx(0.1 + 0.9 * alone["share_of_copies"])
    assert found.training.second[0] == pytest.approx(np.sort(cdist(samples[:1], training)[0])[4])


def test_a_set_of_one_image_many_times_has_copies_of_it_and_no_others():
    samples, training, held_out = independent(20, 50, 50)
    training[:] = training[0]
    samples[3] = training[0]
    found = compare_neighbours(samples, training, held_out)[1]
    assert np.flatnonzero(found.training.copies).tolist() == [3]


def test_the_p_value_of_a_collapsed_generator_is_the_chance_that_its_one_neighbour_was_trained_on():
    """All samples share one neighbour, and one image of a hundred is a training image: normally z would be 10."""
    _, training, held_out = independent(1, 10, 990)
    numbers, _ = compare_neighbours(np.repeat(training[:1], 50, axis=0), training, held_out)
    assert numbers["z"] > 9 and abs(numbers["p_value"] - 0.01) < 5 * np.sqrt(0.01 * 0.99 / DRAWS)


def test_p_values_of_samples_that_owe_nothing_are_uniform():
    values = [compare_neighbours(*independent(200, 30, 20, seed, width=2), seed)[0]["p_value"] for seed in range(60)]
    assert stats.kstest(values, "uniform").pvalue > 1e-4


def test_samples_that_hug_training_images_raise_the_share_and_lower_the_ratio():
    samples, training, held_out = independent(300, 300, 300, seed=2)
    samples = training[:, :] + 0.5 * samples
    numbers, _ = compare_neighbours(samples, training, held_out)
    assert numbers["z"] > 5 and numbers["p_value"] == 1 / (DRAWS + 1)
    assert numbers["median_distance_ratio"] < 0.9
    assert compare_neighbours(samples, held_out, training)[0]["z"] < -5


def test_features_that_do_not_go_together_are_refused():
    samples, training, held_out = independent(5, 5, 5)
    with pytest.raises(UserError, match="need samples"):
        compare_neighbours(samples[:0], training, held_out)
    with pytest.raises(UserError, match="two held-out"):
        compare_neighbours(samples, training, held_out[:1])
    with pytest.raises(UserError, match="widths"):
        compare_neighbours(samples[:, :2], training, held_out)


@pytest.fixture
def private(tmp_path):
    (tmp_path / "run.private").mkdir(mode=0o700)
    return tmp_path / "run.private"


def pictures(seed, n=50):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)


def test_the_list_and_its_picture_go_into_the_private_folder_and_nowhere_else(private):
    samples, training, held_out = independent(50, 50, 50)
    samples[9] = training[33]
    found = compare_neighbours(samples, training, held_out)[1]
    images, trained_on = pictures(0), pictures(1)
    paths = write_neighbours(private, found, images, trained_on)
    assert sorted(private.parent.rglob("*")) == sorted([private, *paths])
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    with open(paths[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["sample"], rows[0]["training_image"]) == ("9", "33")
    assert [int(row["sample"]) for row in rows] == found.suspects(50).tolist()
    shown = np.asarray(Image.open(paths[1]))[::2, ::2]
    assert np.array_equal(shown[1:5, 1:5], images[9, 0]) and np.array_equal(shown[1:5, 6:10], trained_on[33, 0])


def test_a_folder_that_is_not_private_gets_nothing(private):
    found = compare_neighbours(*independent(50, 50, 50))[1]
    shared, link = private.with_name("run"), private.with_name("link.private")
    shared.mkdir(mode=0o700)
    link.symlink_to(shared)
    for folder in (shared, link, private / "missing.private"):
        with pytest.raises(PrivacyError, match="is no private folder"):
            write_neighbours(folder, found, pictures(0), pictures(1))
    os.chmod(private, 0o750)
    with pytest.raises(PrivacyError, match="chmod 700"):
        write_neighbours(private, found, pictures(0), pictures(1))
    assert not [path for path in private.parent.rglob("*") if path.is_file()]


def test_samples_and_training_images_of_other_shapes_are_refused(private):
    found = compare_neighbours(*independent(50, 50, 50))[1]
    with pytest.raises(UserError, match="shape"):
        write_neighbours(private, found, pictures(0)[:, :, :2], pictures(1))
