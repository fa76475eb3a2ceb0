"""Distances and neighbourhoods of features against closed forms, loops, constructed sets and clean-fid."""

import warnings

import numpy as np
import pytest
import torch
from cleanfid import fid
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import fidelity as module
from dp_peft_diffusion.evaluation.features import Features
from dp_peft_diffusion.evaluation.fidelity import fidelity, frechet_distance, kernel_distance, names, neighbourhoods

PIXELS = Features("pixels", False, lambda images: torch.from_numpy(images).flatten(1).double())


def normal(n, d, seed):
    return np.random.default_rng(seed).normal(size=(n, d))


def with_moments(mean, root, seed, n=50):
    """Features (n, d) whose mean is `mean` and whose unbiased covariance is root @ root.T, to rounding."""
    draws = normal(n, root.shape[1], seed)
    white = np.linalg.qr(draws - draws.mean(axis=0))[0] * np.sqrt(n - 1)
    return white @ root.T + mean


def random_images(n, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, 1, 2, 3)).astype(np.uint8)


# ---- Frechet distance


@pytest.mark.parametrize(("n", "d"), [(200, 8), (20, 64), (2, 5)])
def test_identical_sets_have_frechet_distance_zero(n, d):
    features = normal(n, d, 0)
    assert frechet_distance(features, features) < 1e-10
    assert frechet_distance(features, features[::-1]) < 1e-10


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(-100, 100), st.floats(0, 50), st.floats(0, 50))
def test_shifted_and_scaled_gaussians_have_the_distance_of_the_closed_form(d, shift, first, second):
    """Commuting covariances: |shift|^2 + sum (s_1 - s_2)^2. A scale of 0 is a point."""
    grow = np.arange(1, d + 1)
    scales = first * grow, second * grow[::-1]
    real = with_moments(np.zeros(d), np.diag(scales[0]), 1)
    synthetic = with_moments(np.full(d, shift), np.diag(scales[1]), 2, n=70)
    expected = d * shift**2 + np.square(scales[0] - scales[1]).sum()
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-9, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_turned_gaussians_have_the_distance_of_the_closed_form_even_if_singular(seed, rank, other_rank):
    """In two dimensions tr (C_1 C_2)^(1/2) is the root of tr(C_1 C_2) + 2 sqrt(det(C_1 C_2))."""
    first, second = normal(2, rank, seed), normal(2, other_rank, seed + 1)
    c1, c2 = first @ first.T, second @ second.T
    determinants = [0 if root.shape[1] == 1 else np.linalg.det(root) ** 2 for root in (first, second)]
    overlap = np.sqrt(np.trace(c1 @ c2) + 2 * np.sqrt(np.prod(determinants)))
    found = frechet_distance(with_moments(np.zeros(2), first, 3), with_moments(np.ones(2), second, 4))
    assert found == pytest.approx(2 + np.trace(c1) + np.trace(c2) - 2 * overlap, rel=1e-6, abs=1e-6)


def test_fewer_images_than_features_have_the_distance_they_have_in_their_own_space():
    """Features that lie in 6 of 64 dimensions, 30 of them: every covariance is singular, and nothing else changes."""
    embedding = np.linalg.qr(normal(64, 6, 5))[0]  # an isometry
    real, synthetic = normal(30, 6, 6), 2 * normal(25, 6, 7) + 1
    there = frechet_distance(real @ embedding.T, synthetic @ embedding.T)
    assert there == pytest.approx(frechet_distance(real, synthetic), rel=1e-12)


def test_the_frechet_distance_is_that_of_clean_fid_where_covariances_are_regular():
    real, synthetic = normal(400, 12, 8), 1.4 * normal(300, 12, 9) @ np.diag(np.arange(1, 13)) + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid 0.1.35: an argument that SciPy 1.18 drops
        assert frechet_distance(real, synthetic) == pytest.approx(fid.fid_from_feats(real, synthetic), rel=1e-9)


def test_clean_fid_0_1_35_loses_digits_where_a_covariance_is_singular():
    """The reason for a formula of our own: identical sets, and theirs is 1e9 roundings off."""
    features = 10 * normal(30, 64, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert abs(fid.fid_from_feats(features, features)) > 1e-6
    assert frechet_distance(features, features) < 1e-9


# ---- kernel distance


def test_the_kernel_distance_is_that_of_clean_fid_on_the_same_features():
    real, synthetic = normal(90, 5, 11), normal(90, 5, 12) + 0.5  # one subset is all of them
    expected = fid.kernel_distance(synthetic, real, num_subsets=1)
    mean, spread = kernel_distance(real, synthetic, seed=0)
    assert mean == pytest.approx(expected, rel=1e-10) and spread is None


def test_the_kernel_distance_has_a_deviation_only_where_subsets_differ(monkeypatch):
    monkeypatch.setattr(module, "SUBSETS", 5)
    real, synthetic = normal(60, 3, 15), normal(50, 3, 16)
    assert kernel_distance(real, synthetic, seed=0)[1] > 0
    assert kernel_distance(real[:50], synthetic, seed=0)[1] is None


def test_the_kernel_distance_is_that_of_a_loop_over_pairs():
    real, synthetic = normal(7, 3, 13), normal(7, 3, 14) + 1

    def mean_kernel(x, y, same):
        return np.mean([(a @ b / 3 + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(y) if not same or i != j])

    expected = mean_kernel(real, real, True) + mean_kernel(synthetic, synthetic, True)
    expected -= 2 * mean_kernel(real, synthetic, False)
    assert kernel_distance(real, synthetic, seed=0)[0] == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average():
    found = [kernel_distance(normal(40, 4, 2 * s), normal(40, 4, 2 * s + 1), seed=s)[0] for s in range(100)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4.9 * error  # by chance once in a million
    assert min(found) < 0 < max(found)


def test_a_shifted_distribution_has_a_larger_kernel_distance_the_further_it_is(monkeypatch):
    monkeypatch.setattr(module, "SUBSETS", 5)
    found = [kernel_distance(normal(500, 4, 0), normal(400, 4, 1) + shift, seed=0)[0] for shift in (0, 0.5, 1)]
    assert abs(found[0]) < 0.05 < 0.2 < found[1] < found[2]


def test_subsets_are_drawn_by_the_seed_and_leave_the_global_stream_alone(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 10)
    real, synthetic = normal(50, 3, 15), normal(60, 3, 16)
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    first = kernel_distance(real, synthetic, seed=1)
    assert np.random.random() == expected
    assert kernel_distance(real, synthetic, seed=1) == first != kernel_distance(real, synthetic, seed=2)


# ---- precision, recall, density, coverage


def by_loops(real, synthetic):
    """The definitions, pair by pair."""

    def radius(point, kind, k):
        return sorted(((point - other) ** 2).sum() for other in kind)[k]  # the first is the point itself

    def inside(point, centre, kind, k):
        return ((point - centre) ** 2).sum() <= radius(centre, kind, k)

    density = sum(inside(s, r, real, 5) for s in synthetic for r in real) / (5 * len(synthetic))
    return {
        "precision": np.mean([any(inside(s, r, real, 3) for r in real) for s in synthetic]),
        "recall": np.mean([any(inside(r, s, synthetic, 3) for s in synthetic) for r in real]),
        "density": density,
        "coverage": np.mean([any(inside(s, r, real, 5) for s in synthetic) for r in real]),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 10), st.integers(6, 10), st.sampled_from([2, 5, 50]))
def test_neighbourhoods_are_those_of_a_loop_over_pairs_with_ties_and_repeats(seed, n, m, values):
    generator = np.random.default_rng(seed)
    real, synthetic = (generator.integers(0, values, (size, 2)).astype(float) for size in (n, m))
    assert neighbourhoods(real, synthetic) == pytest.approx(by_loops(real, synthetic), rel=1e-12)


def test_identical_sets_cover_each_other():
    features = normal(300, 4, 17)
    found = neighbourhoods(features, features)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx(6 / 5)  # each point lies in the ball around itself, too


def test_disjoint_sets_cover_nothing():
    assert set(neighbourhoods(normal(100, 4, 18), normal(100, 4, 19) + 1000).values()) == {0}


def test_a_missing_mode_costs_recall_and_coverage_but_no_precision():
    modes = np.repeat([[0.0], [1000.0]], 200, axis=0)
    real, synthetic = normal(400, 3, 20) + modes, normal(400, 3, 21)
    found = neighbourhoods(real, synthetic)
    assert found["precision"] > 0.9 and found["density"] > 0.8
    assert found["recall"] <= 0.5 and 0.4 < found["coverage"] <= 0.5


def test_an_outlier_among_the_real_images_misleads_precision_and_not_density():
    cluster, outlier = normal(99, 2, 22), np.array([[1000.0, 0.0]])
    nowhere = normal(100, 2, 23) + [500.0, 100.0]  # in the one great ball around the outlier
    found = neighbourhoods(np.concatenate([cluster, outlier]), nowhere)
    assert found["precision"] == 1 and found["density"] == pytest.approx(1 / 5)


def test_scattered_synthetic_images_mislead_recall_and_not_coverage():
    scattered = 1000 * normal(100, 2, 24)
    found = neighbourhoods(normal(100, 2, 25), scattered)
    assert found["recall"] == 1 and found["coverage"] <= 0.02


def test_one_image_over_and_over_recalls_nothing_but_itself():
    """Its balls are points. Distances from inner products would be off by rounding, and anything could come out."""
    real = 100 + normal(50, 64, 26)
    found = neighbourhoods(real, np.repeat(real[:1], 50, axis=0))
    assert found["precision"] == 1 and found["recall"] == 1 / 50


def test_neighbourhoods_do_not_depend_on_how_many_distances_are_held_at_a_time(monkeypatch):
    real, synthetic = normal(60, 5, 27), 1.3 * normal(45, 5, 28)
    whole = neighbourhoods(real, synthetic)
    for numbers in (1, 100, 1000):
        monkeypatch.setattr(module, "CHUNK_NUMBERS", numbers)
        assert neighbourhoods(real, synthetic) == whole


# ---- all of them


def test_no_number_depends_on_the_order_of_the_images(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 20)
    monkeypatch.setattr(module, "NEIGHBOURHOOD_IMAGES", 30)
    real, synthetic = random_images(80, 0), random_images(70, 1, high=200)
    found = fidelity(PIXELS, real, synthetic)
    shuffle = np.random.default_rng(2).permutation
    assert fidelity(PIXELS, shuffle(real), shuffle(synthetic)) == found
    assert fidelity(PIXELS, real, synthetic, seed=1) != found


def test_a_result_says_how_many_images_and_features_it_is_of(monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOURHOOD_IMAGES", 30)
    found = fidelity(PIXELS, random_images(80, 0), random_images(70, 1))
    sizes = {"num_real_images": 80, "num_synthetic_images": 70, "num_features": 6, "neighbourhood_images": 30}
    assert {**found, **sizes, "kernel_subset_size": 70, "features": "pixels"} == found
    assert not found["frechet_distance_is_biased"]
    assert fidelity(PIXELS, random_images(6, 0), random_images(70, 1))["frechet_distance_is_biased"]


def test_synthetic_images_like_the_real_ones_have_the_better_numbers(monkeypatch):
    monkeypatch.setattr(module, "SUBSETS", 3)
    real, like, unlike = random_images(300, 3), random_images(300, 4), random_images(300, 5, low=100)
    good, bad = (fidelity(PIXELS, real, synthetic) for synthetic in (like, unlike))
    for measure in ("frechet_distance", "kernel_distance"):
        assert good[measure] < bad[measure]
    for measure in ("recall", "coverage"):
        assert good[measure] > bad[measure]


def test_only_distances_in_the_features_of_inception_are_called_fid_and_kid():
    called = {name: names(Features(name, name == "inception", PIXELS.extract)) for name in ("inception", "clip", "own")}
    assert called["inception"]["frechet_distance"] == "FID" and called["inception"]["kernel_distance"] == "KID"
    assert called["clip"]["frechet_distance"] == "CLIP-FID"
    assert not any("FID" in name or "KID" in name for name in called["own"].values())


@pytest.mark.parametrize(("real", "synthetic"), [(5, 100), (100, 5), (0, 100)])
def test_too_few_images_are_refused(real, synthetic):
    with pytest.raises(UserError, match="at least 6 of each .* Sample more"):
        fidelity(PIXELS, random_images(real, 0), random_images(synthetic, 1))
