import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from tiny_adapters import shared
from tiny_bases import BASES

from dp_peft_diffusion.batches import PUBLIC_KEY, make_batch, make_loss, make_task
from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import null_conditions
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.opening import open_model
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.membership import (
    Scores,
    auc,
    auc_bound,
    delong_variance,
    largest_auc,
    membership_scores,
    membership_test,
)
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise, Release
from dp_peft_diffusion.privacy.randomness import generator
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Train, to_yaml
from dp_peft_diffusion.sharing.export import write_weights
from tests.privacy.folders import make_folder

EPSILONS = np.linspace(0, 30, 2000)


def gaussian_deltas(mu, epsilons=EPSILONS):
    """The privacy profile of mu-GDP (Dong et al., corollary 1)."""
    return norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + norm.logcdf(-mu / 2 - epsilons / mu))


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 2.5])
def test_the_bound_of_a_gaussian_profile_is_its_closed_form_and_never_below(mu):
    exact = norm.cdf(mu / np.sqrt(2))
    assert exact <= largest_auc(EPSILONS, gaussian_deltas(mu)) < exact + 2e-3
    some = slice(None, None, 100)
    assert largest_auc(EPSILONS[some], gaussian_deltas(mu)[some]) >= exact


def test_the_bound_of_pure_epsilon_is_its_closed_form():
    for epsilon in (0.1, 1.0, 4.0):
        # ROC through (a, 1 - a) with a = 1 / (1 + e^eps): two straight lines.
        exact = np.exp(epsilon) / (1 + np.exp(epsilon))
        assert exact <= largest_auc([epsilon], [0.0]) <= exact + 1e-3


def test_no_privacy_loss_leaves_one_half_and_an_infinite_one_everything():
    assert largest_auc([0.0], [0.0]) == 0.5
    assert largest_auc([0.0], [1.0]) == 1.0
    assert largest_auc([800.0], [0.0]) == 1.0
    assert largest_auc([], []) == 1.0


def test_the_bound_grows_with_mu_epsilon_and_delta_and_shrinks_with_more_points():
    bounds = [largest_auc(EPSILONS, gaussian_deltas(mu)) for mu in (0.1, 0.5, 1.0, 2.0)]
    bounds += [largest_auc([epsilon], [delta]) for epsilon, delta in ((2.0, 0.0), (3.0, 0.0), (3.0, 0.3), (5.0, 0.5))]
    assert bounds[:4] == sorted(set(bounds[:4])) and bounds[4:] == sorted(set(bounds[4:]))
    assert largest_auc([1.0, 3.0], [0.1, 0.0]) < min(largest_auc([1.0], [0.1]), largest_auc([3.0], [0.0]))


def promise(**changes):
    fields = {"sampling_prob": 1.0, "steps": 1, "noise_multiplier": 2.0, "expected_batch_size": 1, "num_examples": 1}
    mechanism = DPMechanism(**{**fields, **changes})
    return Promise(mechanism=mechanism, epsilon=10.0, delta=1e-5)


def test_the_bound_of_a_gaussian_mechanism_is_that_of_one_record_replaced_by_another():
    exact = norm.cdf(2 / 2.0 / np.sqrt(2))  # sensitivity 2 C, noise 2 C: mu = 1
    assert exact <= auc_bound(promise()) < exact + 3e-3


def test_the_bound_counts_tuning_and_earlier_releases_and_one_image_of_a_group():
    alone, earlier = (
        promise(noise_multiplier=4.0),
        Release(mechanism=promise(noise_multiplier=3.0).mechanism, source=""),
    )
    assert auc_bound(dataclasses.replace(alone, tuning_runs=4)) == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=3e-3)
    together = auc_bound(dataclasses.replace(alone, prior=(earlier,)))
    assert together == pytest.approx(norm.cdf(np.hypot(0.5, 2 / 3) / np.sqrt(2)), abs=3e-3)
    assert auc_bound(promise(noise_multiplier=4.0, max_examples_per_group=3)) == auc_bound(alone)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_that_of_scikit_learn_with_its_ties(ties):
    rng = np.random.default_rng(0)
    members, held_out = rng.normal(0.5, 1, 70), rng.normal(0, 1, 40)
    if ties:
        members, held_out = members.round(), held_out.round()
    truth = [1] * 70 + [0] * 40
    found = auc(members, held_out)
    assert found.value == pytest.approx(roc_auc_score(truth, [*members, *held_out]), abs=1e-12)
    assert found.low < found.value < found.high
    assert auc(held_out, members).value == pytest.approx(1 - found.value, abs=1e-12)


def test_identical_scores_tell_nothing():
    value, low, high = auc(np.zeros(60), np.zeros(80))
    assert value == 0.5 and low < 0.4 and high > 0.6


def test_scores_that_do_not_overlap_have_an_interval_too():
    for n in (50, 1000):
        value, low, high = auc(np.ones(n), np.zeros(n))
        assert value == high == 1 and 0.5 < low < 1 - 1 / n
        assert auc(np.zeros(n), np.ones(n)) == pytest.approx((0, 0, 1 - low), abs=1e-9)


def test_the_interval_holds_an_auc_near_one_as_often_as_it_says():
    rng, truth, runs = np.random.default_rng(2), norm.cdf(3 / np.sqrt(2)), 400
    found = [auc(rng.normal(3, 1, 50), rng.normal(0, 1, 50)) for _ in range(runs)]
    assert sum(not low <= truth <= high for _, low, high in found) <= 18


def test_the_interval_is_no_narrower_than_that_of_the_structural_components_one_by_one():
    rng = np.random.default_rng(3)
    members, held_out = rng.normal(1, 1, 30), rng.normal(0, 2, 20)
    wins = np.array([[(x > y) + (x == y) / 2 for y in held_out] for x in members])  # DeLong et al. 1988, equation 4
    variance = wins.mean(axis=1).var(ddof=1) / 30 + wins.mean(axis=0).var(ddof=1) / 20
    found = auc(members, held_out)
    assert delong_variance(members, held_out) == pytest.approx(variance, rel=1e-9)
    assert 1 - 1e-9 < (found.high - found.low) / (2 * norm.isf(0.005) * np.sqrt(variance)) < 1.2


def test_the_interval_holds_the_true_auc_as_often_as_it_says():
    rng, truth, runs = np.random.default_rng(1), norm.cdf(1 / np.sqrt(2)), 400
    found = [auc(rng.normal(1, 1, 150), rng.normal(0, 1, 150)) for _ in range(runs)]
    misses = sum(not low <= truth <= high for _, low, high in found)
    assert misses <= 18  # of 400 at 1 %: more with a chance below 1e-6


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("run"))


def scores(shift, base_shift=0.0, n=400):
    rng = np.random.default_rng(0)
    sets = [rng.normal(mean, 1, n) for mean in (shift, 0, base_shift, 0)]
    return Scores(*sets)


def test_an_attack_within_the_bound_is_no_finding_and_one_above_it_is_shouted(document):
    fine, found = membership_test(scores(0.0), document), membership_test(scores(1.5), document)
    assert (fine["above_bound"], found["above_bound"]) == (False, True)
    assert 0.5 < fine["auc_bound"] == found["auc_bound"] < found["auc_low"] < found["auc"] < found["auc_high"]
    assert found["message"].startswith("FINDING") and "Do not share" in found["message"]
    assert "or it is chance: with a kept promise, at most one test in 200" in found["message"]
    assert "This is one attack" in fine["message"]
    json.dumps([fine, found], allow_nan=False)
    unknown, still_found = (membership_test(scores(shift), document, verified=False) for shift in (0.0, 1.5))
    assert unknown["message"].startswith("NOT VERIFIED") and "Within" not in unknown["message"]
    assert still_found["message"] == found["message"]


def test_a_base_that_tells_the_sets_apart_says_that_they_are_of_different_kinds(document):
    alike, unlike = (membership_test(scores(1.5, shift), document) for shift in (0.0, 1.0))
    assert ["Of another kind they are" in found["message"] for found in (alike, unlike)] == [False, True]
    assert alike["auc_of_base"]["low"] < 0.5 < unlike["auc_of_base"]["low"]


def test_without_a_promise_there_is_no_bound(document):
    result = membership_test(Scores(*np.random.default_rng(0).normal(size=(2, 60))), None)
    assert result["auc_bound"] is None and result["auc_of_base"] is None and not result["above_bound"]
    with pytest.raises(UserError, match="50 training images"):
        membership_test(scores(0.0, n=49), document)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where tiny bases lie; they are built in for as long as this module's tests run."""
    place = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_peft_diffusion.diffusion.base_folder.BUILTIN_BASES", place)
        yield place


TOLD_APART = Adapter(rank=2, target_modules=("to_q", "to_v", "to_out.0"))
WITH_ROWS = dataclasses.replace(TOLD_APART, class_rows=(10, 11), class_code_rank=3)
PETS = Data(class_names=("cat", "dog"))
FOLDERS = {  # base: adapter, data, channels, row of the class table of "no class"
    "pixel_classes": (WITH_ROWS, PETS, 1, 9),
    "pixel_codes": (Adapter(kind="code_moments", class_rows=(1, 2), rows_per_class=3), PETS, 1, 0),
    "latent": (dataclasses.replace(TOLD_APART, class_rows=(4, 5)), PETS, 3, 3),
    "stable_diffusion_2": (TOLD_APART, Data(caption_column="text"), 3, None),
}


def images(seed, channels, n):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, channels, 16, 16), dtype=np.uint8), rng.integers(0, 2, n)


@torch.no_grad()
def loss_by_diffusers(net, pixels, row, example_id):
    """The loss of one image over the 16 draws of its id, one by one, by diffusers' own scheduler."""
    levels = generator(PUBLIC_KEY, "timestep", 0, example_id).random(16)
    noises = generator(PUBLIC_KEY, "diffusion_noise", 0, example_id)
    schedule = DDPMScheduler.from_config(net.scheduler.config)
    clean, losses = net.encode(torch.from_numpy(pixels)[None].float() / 127.5 - 1), []
    told = null_conditions(net, 1) if row is None else {"class_labels": torch.tensor([row])}
    for draw in range(16):
        time = torch.tensor([int((draw + levels[draw]) / 16 * 1000)])
        noise = torch.from_numpy(noises.standard_normal(clean.shape, dtype=np.float32))
        wanted = noise
        if schedule.config.prediction_type == "v_prediction":
            wanted = schedule.get_velocity(clean, noise, time)
        answer = net.predict(net.unet, schedule.add_noise(clean, noise, time), time, told)
        losses.append((answer - wanted).square().mean().item())
    return np.mean(losses)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_score_of_an_image_is_the_loss_of_the_base_less_that_of_the_model(name, place, tmp_path):
    adapter, data, channels, null = FOLDERS[name]
    bare = load_base(str(BASES[name](place / name)))
    folder = shared(tmp_path / "run", place / name, adapter, data)
    members, held_out = images(0, channels, 19), images(1, channels, 3)
    found = membership_scores(folder, members, held_out)
    model, _ = open_model([folder], [1.0])
    order = np.random.default_rng(0)
    for (pixels, labels), scores, by_base, first in (
        (members, found.members, found.members_by_base, 0),
        (held_out, found.held_out, found.held_out_by_base, 19),
    ):
        chosen = order.permutation(len(pixels))
        assert len(scores) == len(by_base) == len(pixels)
        for position in (0, len(pixels) - 1):  # of different micro-batches, among the members
            i, example_id = chosen[position], first + position
            row = adapter.class_rows[labels[i]] if adapter.class_rows else None
            before = loss_by_diffusers(bare, pixels[i], null, example_id)
            assert by_base[position] == pytest.approx(-before, rel=1e-4)
            gained = before - loss_by_diffusers(model, pixels[i], row, example_id)
            assert scores[position] == pytest.approx(gained, abs=1e-5 * before)
    assert np.abs(found.members).max() > 1e-4  # the adapter says something


def test_no_more_images_than_asked_for_are_looked_at_and_others_are_refused(place, tmp_path):
    folder = shared(tmp_path / "run", BASES["pixel_classes"](place / "few"), WITH_ROWS, PETS, base_name="builtin:few")
    pixels, labels = images(0, 1, 20)
    found = membership_scores(folder, (pixels, labels), (pixels[:4], labels[:4]), most=5)
    assert (len(found.members), len(found.held_out)) == (5, 4)
    with pytest.raises(UserError, match="1x8x8, and the base takes 1x16x16"):
        membership_scores(folder, (pixels[:, :, :8, :8], labels), (pixels, labels))
    with pytest.raises(UserError, match="from 0 to 1"):
        membership_scores(folder, (pixels, labels + 1), (pixels, labels))


def test_a_whole_model_has_no_base_to_compare_with(place, tmp_path):
    adapter = Adapter(kind="full", class_rows=(10, 11))
    folder = shared(tmp_path / "run", BASES["pixel_classes"](place / "whole"), adapter, PETS, base_name="builtin:whole")
    found = membership_scores(folder, images(0, 1, 3), images(1, 1, 2))
    assert found.members_by_base is None and found.held_out_by_base is None
    assert (found.members < 0).all() and len(found.held_out) == 2


@pytest.mark.slow
def test_a_model_that_learnt_four_images_by_heart_is_told_by_its_scores(place, tmp_path):
    """Without noise: rank 8 on four images of pure noise, of which there is nothing to learn but themselves."""
    adapter = Adapter(rank=8, target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"))
    base = load_base(str(BASES["pixel"](place / "by_heart")))
    trained, (pixels, labels) = inject_adapter(base, adapter, 0, 0), images(0, 3, 60)
    model = Model(pretrained_model_name_or_path="builtin:by_heart")
    recipe = Recipe(model=model, data=Data(label_column=None), adapter=adapter, privacy=Privacy(epsilon=1.0))
    recipe = dataclasses.replace(recipe, train=Train(noise_multiplicity=8))
    task = make_task(recipe, dataclasses.replace(base, unet=trained.unet))
    optimizer, loss_fn = torch.optim.Adam(trained.trainable.values(), lr=1e-2), make_loss(task)
    clean = torch.from_numpy(pixels[:4]).float()[:, None] / 127.5 - 1
    for step in range(200):
        examples = Examples(clean, torch.zeros(4, dtype=torch.int64), torch.ones(4), {})
        batch = make_batch(task, examples, np.arange(4), PUBLIC_KEY, step + 1)
        optimizer.zero_grad()
        loss_fn(trained.unet, batch).mean().backward()
        optimizer.step()
    (tmp_path / "run").mkdir()
    write_weights(base, trained, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe))
    found = membership_scores(tmp_path / "run", (pixels[:4], labels[:4]), (pixels[4:], labels[4:]))
    assert auc(found.members, found.held_out).value > 0.8
    assert auc(found.members_by_base, found.held_out_by_base).value < 0.7
