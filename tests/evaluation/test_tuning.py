"""Tuning on synthetic images: rank agreement against definitions, and real images kept out of the choice."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from stripes import make_stripes

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import tuning
from dp_peft_diffusion.evaluation.tuning import SETTINGS, Setting, agreement, tune

GRID = (Setting(1, 2, 1e-3), Setting(5, 8, 1e-2), Setting(15, 8, 1e-2))


def test_equal_ranks_agree_fully_and_reversed_ones_not_at_all():
    accuracies = np.array([0.3, 0.9, 0.5, 0.7])
    same, reverse = agreement(accuracies, accuracies**2), agreement(accuracies, 1 - accuracies)
    assert same["spearman"] == same["kendall"] == pytest.approx(1) and same["accuracy_lost"] == 0
    assert reverse["spearman"] == reverse["kendall"] == pytest.approx(-1)
    assert reverse["accuracy_lost"] == pytest.approx(0.6)


def test_ranks_built_to_be_independent_agree_at_zero():
    exact = agreement(np.array([1, 2, 3, 4]), np.array([2, 4, 1, 3]))  # 3 pairs of 6 in the same order
    assert exact["spearman"] == pytest.approx(0, abs=1e-12) and exact["kendall"] == pytest.approx(0, abs=1e-12)
    drawn = agreement(*np.random.default_rng(0).random((2, 400)))
    assert abs(drawn["spearman"]) < 4.9 / 399**0.5  # once in a million, were the seed another
    assert abs(drawn["kendall"]) < 4.9 * (2 / 9 * 805 / 400 / 399) ** 0.5 * 1.5


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_agreement_is_the_definition_with_ties(pairs):
    synthetic, real = np.array(pairs, float).T
    found = agreement(synthetic, real)
    signs = [np.sign(np.subtract.outer(side, side))[np.triu_indices(len(side), 1)] for side in (synthetic, real)]
    if not signs[0].any() or not signs[1].any():
        assert found["spearman"] is None and found["kendall"] is None
    else:
        tau_b = (signs[0] * signs[1]).sum() / np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
        assert found["kendall"] == pytest.approx(tau_b)
        assert found["spearman"] == pytest.approx(np.corrcoef(rankdata(synthetic), rankdata(real))[0, 1])
    best = max(synthetic)
    assert found["real_accuracy_of_choice"] == next(real[i] for i in range(len(real)) if synthetic[i] == best)
    assert found["accuracy_lost"] == max(real) - found["real_accuracy_of_choice"] >= 0
    assert found["num_tied_for_choice"] == list(synthetic).count(best) and found["num_settings"] == len(pairs)


def test_where_real_images_are_the_synthetic_validation_images_the_choice_is_the_best():
    images, labels = make_stripes(100, 0)
    held_out = tuning.rank_in_class(labels) % 5 == 4
    found = tune(images, labels, images[held_out], labels[held_out], settings=GRID)
    assert all(row["synthetic_accuracy"] == row["real_accuracy"] for row in found["settings"])
    assert len({row["real_accuracy"] for row in found["settings"]}) == 3  # the grid tells settings apart
    assert found["spearman"] == found["kendall"] == pytest.approx(1) and found["accuracy_lost"] == 0
    assert found["chosen_setting"] == found["best_real_setting"]
    json.dumps(found)


def test_real_labels_do_not_enter_the_choice():
    synthetic, (images, labels) = make_stripes(100, 0), make_stripes(60, 1)
    shuffled = np.random.default_rng(0).permutation(labels)
    told, untold = (tune(*synthetic, images, real, settings=GRID) for real in (labels, shuffled))
    assert told["chosen_setting"] == untold["chosen_setting"]
    for one, other in zip(told["settings"], untold["settings"], strict=True):
        assert one["synthetic_accuracy"] == other["synthetic_accuracy"]
    assert told["settings"][-1]["real_accuracy"] > untold["settings"][-1]["real_accuracy"] + 0.2


def test_the_choice_is_the_best_on_synthetic_images_also_where_real_ones_say_otherwise(monkeypatch):
    (images, labels), (real, truth) = make_stripes(100, 0), make_stripes(30, 1)
    held_out = labels[tuning.rank_in_class(labels) % 5 == 4]

    def probabilities(make_net, training, given, given_labels, tested, *, seed):
        on_synthetic, on_real = {1: (held_out, 0), 5: (3, 0), 15: (3, truth)}[training.epochs]  # no class 3: wrong
        found = np.concatenate([np.broadcast_to(on_synthetic, len(held_out)), np.broadcast_to(on_real, len(real))])
        return np.eye(4)[found]

    monkeypatch.setattr(tuning, "probabilities", probabilities)
    found = tune(images, labels, real, truth, settings=GRID)
    assert found["chosen_setting"]["epochs"] == 1 and found["best_real_setting"]["epochs"] == 15
    assert found["real_accuracy_of_choice"] == (truth == 0).mean() and found["best_real_accuracy"] == 1
    assert found["accuracy_lost"] == (truth != 0).mean()


def test_every_setting_trains_on_four_fifths_of_each_class_and_is_scored_on_the_rest(monkeypatch):
    (images, labels), (real, truth) = make_stripes(100, 0), make_stripes(30, 1)
    images[:, 0, 0, 0] = np.arange(100)  # each image carries its position
    calls = []

    def probabilities(make_net, training, given, given_labels, tested, *, seed):
        calls.append((make_net((1, 8, 8), 3)[0].out_channels, training.epochs, training.learning_rate, seed))
        trained, held_out = given[:, 0, 0, 0], tested[: len(tested) - len(real), 0, 0, 0]
        assert sorted([*trained, *held_out]) == list(range(100)) and np.array_equal(tested[-len(real) :], real)
        assert np.array_equal(np.bincount(labels[held_out]), np.bincount(labels) // 5)
        assert np.array_equal(given_labels, labels[trained])
        right = np.concatenate([labels[held_out], truth])
        return np.eye(4)[np.where(np.arange(len(right)) % 2 == seed % 2, right, 3)]  # every other one right

    monkeypatch.setattr(tuning, "probabilities", probabilities)
    found = tune(images, labels, real, truth, settings=GRID, seed=8, num_seeds=2)
    assert calls == [(grid.width, grid.epochs, grid.learning_rate, seed) for grid in GRID for seed in (8, 9)]
    assert all(row["synthetic_accuracy"] == row["real_accuracy"] == 0.5 for row in found["settings"])
    assert found["num_training_images"] + found["num_validation_images"] == 100 and found["num_real_images"] == 30
    assert found["num_tied_for_choice"] == 3 and found["chosen_setting"]["width"] == 2 and found["spearman"] is None


def test_too_few_synthetic_images_to_hold_any_out_are_refused():
    images, labels = make_stripes(8, 0)
    with pytest.raises(UserError, match="two classes"):
        tune(images, labels, images, labels)


def test_the_grid_has_twelve_settings_from_cheap_to_costly():
    assert len(set(SETTINGS)) == 12
    assert [(one.epochs, one.width) for one in SETTINGS] == sorted((one.epochs, one.width) for one in SETTINGS)
