"""Utility: the scores are right, and nothing of the real images decides how classifiers train."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stripes import make_stripes

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import utility
from dp_peft_diffusion.evaluation.utility import balanced_order, evaluate, geometric_sizes, learning_curve, scores

QUICK = {"epochs": 2, "batch_size": 20}


def test_separable_synthetic_images_teach_both_classifiers_more_than_95_percent():
    result = evaluate(*make_stripes(300, 0), *make_stripes(200, 1), epochs=8)
    for classifier in ("logistic_regression", "cnn"):
        assert result[classifier]["accuracy"] > 0.95
        assert all(accuracy > 0.9 for accuracy in result[classifier]["per_class_accuracy"].values())


def test_shuffled_synthetic_labels_teach_nothing():
    images, labels = make_stripes(300, 0)
    shuffled = np.random.default_rng(2).permutation(labels)
    result = evaluate(images, shuffled, *make_stripes(200, 1), epochs=8)
    for classifier in ("logistic_regression", "cnn"):
        assert 0.1 < result[classifier]["accuracy"] < 0.6  # chance is 1/3


def test_scores_are_those_counted_by_hand():
    labels = np.array([0, 0, 1, 1, 3])
    found = scores([np.array([0, 1, 1, 1, 3]), np.array([0, 0, 1, 4, 0])], labels)
    assert found["accuracies"] == [0.8, 0.6] and found["accuracy"] == pytest.approx(0.7)
    assert found["accuracy_stddev"] == pytest.approx(0.2 / 2**0.5)
    assert found["test_standard_error"] == pytest.approx((0.7 * 0.3 / 5) ** 0.5)
    assert found["per_class_accuracy"] == {0: 0.75, 1: 0.75, 3: 0.5}
    rows = [[3, 1, 0, 0, 0], [0, 3, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert found["confusion"] == rows


def test_equal_predictions_have_no_spread_and_a_single_one_has_none_to_tell():
    predicted, labels = np.array([0, 1, 1]), np.array([0, 1, 0])
    assert scores([predicted, predicted, predicted], labels)["accuracy_stddev"] == 0
    assert scores([predicted], labels)["accuracy_stddev"] is None


def test_several_seeds_are_the_single_runs_put_together():
    images, labels = make_stripes(60, 0)
    arguments = (images, labels[::-1].copy(), *make_stripes(300, 1))  # nothing to learn: the net is what the seed makes
    options = QUICK | {"classifiers": ("logistic_regression", "cnn")}
    both = evaluate(*arguments, seed=3, num_seeds=2, **options)
    first, second = (evaluate(*arguments, seed=seed, **options) for seed in (3, 4))
    singles = [first["cnn"]["accuracy"], second["cnn"]["accuracy"]]
    assert both["cnn"]["accuracies"] == singles and singles[0] != singles[1]
    assert both["cnn"]["confusion"] == np.add(first["cnn"]["confusion"], second["cnn"]["confusion"]).tolist()
    assert both["logistic_regression"] == first["logistic_regression"] == second["logistic_regression"]
    assert (both["seed"], both["num_seeds"], both["ensemble"]) == (3, 2, 1)


def test_options_reach_the_classifiers_and_are_told_in_the_result(monkeypatch):
    asked = []
    monkeypatch.setattr(
        utility, "predict", lambda name, x, y, real, **how: asked.append((name, how)) or real[:, 0, 0, 0] * 0
    )
    result = evaluate(
        *make_stripes(40, 0), *make_stripes(9, 1), classifiers=["mlp", "cnn"], ensemble=5, epochs=7, flip=True
    )
    options = {"seed": 0, "ensemble": 5, "epochs": 7, "flip": True}
    assert asked == [("mlp", options), ("cnn", options)]
    assert result["cnn"]["training"]["epochs"] == 7 and result["cnn"]["training"]["flip"]
    assert not result["mlp"]["training"]["flip"]


def test_real_labels_change_the_score_and_nothing_that_is_predicted():
    synthetic, (images, labels) = make_stripes(60, 0), make_stripes(80, 1)
    shuffled = np.random.default_rng(0).permutation(labels)
    told, untold = (evaluate(*synthetic, images, real, **QUICK) for real in (labels, shuffled))
    for classifier in ("logistic_regression", "cnn"):
        assert told[classifier]["accuracy"] > untold[classifier]["accuracy"]
        predicted = [np.sum(result[classifier]["confusion"], axis=0).tolist() for result in (told, untold)]
        assert predicted[0] == predicted[1]


def test_a_class_missing_from_the_synthetic_images_scores_zero():
    result = evaluate(*make_stripes(100, 0, classes=2), *make_stripes(100, 1, classes=3), **QUICK)
    assert result["cnn"]["per_class_accuracy"][2] == result["logistic_regression"]["per_class_accuracy"][2] == 0.0


def test_numbers_from_private_images_say_that_the_guarantee_does_not_cover_them():
    arguments = (*make_stripes(40, 0), *make_stripes(10, 1))
    stamped = evaluate(*arguments, **QUICK)
    assert stamped["covered_by_guarantee"] is False
    assert "does not cover" in stamped["statement"]
    assert "every real image" in stamped["statement"] and "training images" in stamped["statement"]
    assert "covered_by_guarantee" not in evaluate(*arguments, declared_public=True, **QUICK)


def test_images_of_other_shapes_and_single_classes_are_refused():
    images, labels = make_stripes(20, 0)
    with pytest.raises(UserError, match="1x4x4 and 1x8x8.*--evaluation_resolution"):
        evaluate(utility.to_side(images, 4), labels, images, labels)
    with pytest.raises(UserError, match="two classes"):
        evaluate(images, np.zeros(20, int), images, labels)
    with pytest.raises(UserError, match="real images"):
        evaluate(images, labels, images[:0], labels[:0])


def test_a_wrong_name_or_number_is_refused_before_anything_trains(monkeypatch):
    monkeypatch.setattr(utility, "predict", lambda *arguments, **how: pytest.fail("trained"))
    arguments = (*make_stripes(20, 0), *make_stripes(9, 1))
    for options in ({"classifiers": ("cnn", "svm")}, {"epochs": 0}, {"num_seeds": 0}):
        with pytest.raises(UserError):
            evaluate(*arguments, **options)


def test_the_reference_is_what_the_same_images_would_teach_as_synthetic_ones():
    arguments = (*make_stripes(60, 0), *make_stripes(80, 1))
    found, expected = utility.reference(*arguments, **QUICK), evaluate(*arguments, **QUICK)
    assert found["cnn"] == expected["cnn"] and found["logistic_regression"] == expected["logistic_regression"]
    assert found["num_training_images"] == 60 and "num_synthetic_images" not in found


@given(st.lists(st.sampled_from([0, 1, 4]), min_size=1, max_size=30), st.data())
def test_every_start_of_the_balanced_order_has_the_first_images_of_each_class_and_as_many_as_of_others(labels, data):
    labels = np.array(labels)
    order = balanced_order(labels)
    assert sorted(order) == list(range(len(labels)))
    chosen = order[: data.draw(st.integers(1, len(labels)))]
    counts = {label: int((labels[chosen] == label).sum()) for label in set(labels.tolist())}
    for label, count in counts.items():
        assert set(chosen[labels[chosen] == label]) == set(np.flatnonzero(labels == label)[:count])
        if count < (labels == label).sum():  # a class may fall behind only when it has no more images
            assert count >= max(counts.values()) - 1


def test_the_points_of_a_learning_curve_train_on_nested_balanced_subsets(monkeypatch):
    images, labels = make_stripes(90, 0)
    images[:, 0, 0, 0] = np.arange(90)  # each image carries its position
    seen = []

    def predict(name, given_images, given_labels, real, **how):
        seen.append(given_images[:, 0, 0, 0].tolist())
        assert np.array_equal(labels[seen[-1]], given_labels)
        return np.zeros(len(real), int)

    monkeypatch.setattr(utility, "predict", predict)
    points = learning_curve(images, labels, *make_stripes(9, 1), sizes=[90, 12, 45], classifiers=("cnn",))
    assert [point["num_synthetic_images"] for point in points] == [len(positions) for positions in seen] == [12, 45, 90]
    assert set(seen[0]) < set(seen[1]) < set(seen[2])
    assert all(positions == sorted(positions) for positions in seen)  # as sampled: the last point is `evaluate`
    assert np.ptp(np.bincount(labels[seen[0]])) <= 1 and np.ptp(np.bincount(labels[seen[1]])) <= 1


def test_a_learning_curve_ends_with_what_evaluate_says_and_can_be_written_as_json():
    arguments = (*make_stripes(60, 0), *make_stripes(80, 1))
    points = learning_curve(*arguments, **QUICK)
    last, whole = points[-1], evaluate(*arguments, declared_public=True, **QUICK)
    assert [point["num_synthetic_images"] for point in points] == [30, 60]
    assert last == {name: value for name, value in whole.items() if name != "num_real_images"}
    assert len(json.loads(json.dumps(points))) == 2


def test_sizes_halve_until_a_class_has_ten_images():
    assert geometric_sizes(60_000, 10) == [117, 234, 468, 937, 1875, 3750, 7500, 15_000, 30_000, 60_000]
    assert geometric_sizes(150, 10) == [150]
    for sizes in ([1, 20], [10, 21]):
        with pytest.raises(UserError, match="from 2 to 20"):
            learning_curve(*make_stripes(20, 0), *make_stripes(9, 1), sizes=sizes)
