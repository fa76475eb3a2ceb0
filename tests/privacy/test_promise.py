"""What an epsilon covers: this run, its tuning, and earlier releases."""

import dataclasses
import json
import math
import shutil

import dp_accounting
import pytest

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy import accounting, certificate
from dp_peft_diffusion.privacy.composition import promise_of, read_prior
from dp_peft_diffusion.privacy.promise import Promise, Release, composed_event, guarantee, make_promise, statement
from dp_peft_diffusion.privacy.ranges import MAX_RELEASES
from dp_peft_diffusion.privacy.selection import selection_epsilons
from tests.privacy.folders import N, make_folder, mechanism, promise

DELTA = 1e-5


def release(runs=1, source="an earlier attempt of this run", **changes):
    return Release(mechanism=mechanism(**changes), runs=runs, source=source)


def test_a_promise_states_what_was_asked_for_and_otherwise_the_price_rounded_up():
    priced = mechanism().epsilon(DELTA)
    assert promise(1.0).epsilon == 1.0 and promise(1.0).priced == priced
    assert priced <= promise(None).epsilon <= priced * 1.002
    with pytest.raises(UserError, match="costs epsilon 1 .* above 0.9"):
        promise(0.9)
    with pytest.raises(UserError, match="costs epsilon inf"):
        promise(None, noise_multiplier=0.01)
    with pytest.raises(UserError, match="either an epsilon or a noise"):
        promise(None, noise_multiplier=None)
    with pytest.raises(UserError, match="1/1797"):
        promise(1.0, delta=6e-4)


def test_tuning_runs_are_that_many_steps_more():
    one, ten = promise(5.0), promise(5.0, tuning_runs=10)
    long = mechanism(steps=2000)
    assert ten.priced == pytest.approx(accounting.epsilon(long.event, DELTA, "zero_out"), rel=1e-9)
    assert ten.priced > one.priced == promise(5.0, tuning_runs=1).priced


def test_runs_are_paid_for_or_not_but_never_both():
    assert promise(5.0, unpaid_runs=10).priced == promise(5.0).priced
    with pytest.raises(UserError, match="Leave one of them out"):
        promise(5.0, tuning_runs=2, unpaid_runs=2)
    with pytest.raises(UserError, match="unpaid_runs"):
        promise(5.0, unpaid_runs=0)


def test_noise_is_calibrated_for_everything_together_and_is_the_smallest():
    for extra in ({"tuning_runs": 7}, {"prior": (release(noise_multiplier=30.0),)}):
        found = promise(1.0, noise_multiplier=None, **extra)
        assert 0.995 < found.priced <= 1.0
        less = dataclasses.replace(found.mechanism, noise_multiplier=found.mechanism.noise_multiplier * 0.998)
        assert accounting.epsilon(composed_event(less, found.tuning_runs, found.prior), DELTA, "zero_out") > 1.0


@pytest.mark.parametrize("extra", [{"tuning_runs": 4}, {"prior": (release(runs=3),)}, {"prior": (release(),) * 3}])
def test_four_times_the_same_mechanism_costs_the_same_however_it_is_listed(extra):
    assert promise(5.0, **extra).priced == pytest.approx(mechanism(steps=800).epsilon(DELTA), rel=1e-4)


def test_of_gaussians_the_composition_has_the_closed_form():
    whole = {"sampling_prob": 1.0, "expected_batch_size": N}
    found = promise(
        None, **whole, steps=3, noise_multiplier=10.0, prior=(release(2, **whole, steps=5, noise_multiplier=20.0),)
    )
    sigma = 1 / math.sqrt(3 / 10.0**2 + 10 / 20.0**2)
    assert found.priced == pytest.approx(dp_accounting.get_epsilon_gaussian(sigma, DELTA), rel=1e-3)
    assert found.priced >= dp_accounting.get_epsilon_gaussian(sigma, DELTA)


def test_releases_that_alone_cost_more_leave_nothing_to_calibrate():
    with pytest.raises(UserError, match=r"alone cost epsilon 1.* --epsilon 0\.5 is the total"):
        promise(0.5, noise_multiplier=None, prior=(release(),))


@pytest.mark.parametrize(
    "changes",
    [
        {"neighboring_relation": "replace_one"},
        {"neighboring_relation": "add_or_remove_one", "num_examples": None},
        {"max_examples_per_group": 2},
    ],
)
def test_another_relation_or_unit_does_not_add_up(changes):
    with pytest.raises(UserError, match="do not add up"):
        promise(9.0, prior=(release(**changes),))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3", 100_001, math.nan])
def test_garbage_run_counts_are_refused(bad):
    with pytest.raises(UserError, match="tuning_runs"):
        promise(9.0, tuning_runs=bad)
    with pytest.raises(UserError, match="runs"):
        promise(9.0, prior=(release(runs=bad),))


def test_more_updates_than_can_be_priced_are_refused_in_words():
    with pytest.raises(UserError, match="2,000,000 noisy updates in all"):
        promise(9.0, tuning_runs=10_000)
    with pytest.raises(UserError, match="600,200 noisy updates"):
        promise(9.0, prior=(release(runs=3000),))


def test_more_releases_than_a_certificate_can_list_are_refused_before_training():
    as_many = tuple(release(steps=1, noise_multiplier=20.0 + n) for n in range(MAX_RELEASES))
    assert composed_event(mechanism(), None, as_many)
    with pytest.raises(UserError, match="65 earlier releases"):
        promise(9.0, prior=(*as_many, release(steps=1)))


def test_one_image_of_a_group_is_said_to_cost_less_only_where_it_does():
    asked = promise(None, max_examples_per_group=3)
    figures = guarantee(asked)
    words = "For one image of a group, epsilon is"
    assert f"{words} the smaller {figures['epsilon_per_image']:g}" in statement(asked, figures)
    assert f"{words} 99." in statement(asked, figures | {"epsilon_per_image": 99.0})


def test_beside_zero_out_stands_the_price_of_replacing_and_beside_a_group_that_of_one_image():
    asked = promise(1.0)
    figures = guarantee(asked)
    exact = accounting.epsilon(asked.event, DELTA, "replace_one")
    assert exact <= figures["epsilon_replace_one"] <= exact * 1.001 and figures["epsilon_per_image"] is None
    assert f"For one record replaced by another, epsilon is {figures['epsilon_replace_one']:g}" in statement(
        asked, figures
    )
    grouped = promise(None, max_examples_per_group=3, tuning_runs=2, prior=(release(max_examples_per_group=3),))
    figures = guarantee(grouped)
    single = promise(None, tuning_runs=2, prior=(release(),)).event
    alone = accounting.epsilon(single, DELTA, "replace_one")  # another image of the group may step in
    assert alone <= figures["epsilon_per_image"] <= alone * 1.001 < grouped.epsilon
    assert figures["epsilon_replace_one"] is None
    words = statement(grouped, figures)
    for part in (
        "at most 3 images",
        f"the smaller {figures['epsilon_per_image']:g}",
        "groups that were not used",
        "2 such trainings",
        "1 earlier release",
    ):
        assert part in words
    replaced = promise(None, neighboring_relation="replace_one")
    assert guarantee(replaced)["epsilon_replace_one"] is None
    assert "or another in its place" in statement(replaced, guarantee(replaced))


def test_a_price_that_is_not_finite_is_none():
    hopeless = Promise(mechanism=mechanism(noise_multiplier=0.2), epsilon=100.0, delta=DELTA)
    assert guarantee(hopeless)["epsilon_replace_one"] is None


def test_all_figures_hold_for_the_whole_composition():
    alone, together = guarantee(promise(None)), guarantee(promise(None, tuning_runs=3, prior=(release(),)))
    for name in ("epsilon", "mu_gdp", "epsilon_replace_one"):
        assert together[name] > alone[name]
    for rate, odds in alone["max_tpr_at_fpr"].items():
        assert together["max_tpr_at_fpr"][rate] > odds
    for one, both in zip(alone["profile"], together["profile"], strict=True):
        assert both["epsilon"] > one["epsilon"]


# Selection, reliability of the numbers: one run at the noise that RDP prices at epsilon 1.


def test_private_selection_costs_what_was_computed_once():
    plan = dataclasses.replace(
        mechanism(),
        sampling_prob=4096 / 60000,
        expected_batch_size=4096,
        num_examples=60000,
        steps=1000,
        noise_multiplier=8.821,
    )
    found = selection_epsilons(make_promise(plan, delta=DELTA, epsilon=None, tuning_runs=10))
    assert found["geometric"] == pytest.approx(2.13, rel=5e-3)
    assert found["Poisson"] == pytest.approx(2.32, rel=5e-3)
    assert selection_epsilons(make_promise(plan, delta=DELTA, epsilon=None)) is None
    grouped = make_promise(
        dataclasses.replace(plan, max_examples_per_group=2), delta=DELTA, epsilon=None, tuning_runs=2
    )
    assert selection_epsilons(grouped) is None


# Certificates of earlier releases


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    make_folder(folder, promise=promise(3.0, tuning_runs=3))
    return folder


def total(releases):
    return sum(one.mechanism.steps * one.runs for one in releases)


def test_a_prior_certificate_counts_with_its_tuning_as_a_file_or_a_folder(first):
    (found,) = read_prior([first], mechanism())
    assert (found.mechanism, found.runs) == (mechanism(), 3)
    assert found.source == f"certificate {certificate.sha256_of(first / 'privacy.json')}"
    assert read_prior([str(first / "privacy.json")], mechanism()) == (found,)
    assert read_prior([first, first / "privacy.json", str(first)], mechanism()) == (found,)  # once
    assert read_prior([], mechanism()) == ()


def test_a_chain_of_releases_counts_every_one_once(first, tmp_path):
    prior = read_prior([first], mechanism())
    attempts = (release(steps=10), release(steps=10), release(steps=7))
    make_folder(tmp_path / "second", promise=promise(6.0, prior=(*prior, *attempts)))
    document = certificate.read(tmp_path / "second")
    assert promise_of(document).prior == (*prior, *attempts)
    assert certificate.verify(tmp_path / "second").ok
    chain = read_prior([tmp_path / "second"], mechanism())
    assert total(chain) == 200 + 600 + 27
    assert total(read_prior([first, tmp_path / "second", tmp_path / "second"], mechanism())) == total(chain)
    third = make_folder(tmp_path / "third", promise=promise(6.0, prior=chain))
    assert {one["source"].partition(" certificate ")[0] for one in third["other_releases"][2:]} == {
        "an earlier attempt of"
    }
    assert total(read_prior([tmp_path / "third", tmp_path / "second"], mechanism())) == 1027


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda document: document | {"key_source": "given"}, "promises nothing"),
        (lambda document: document | {"schema": "dp-peft/privacy/1"}, "schema"),
        (lambda document: document | {"tuning": {"runs": 0, "priced": "composition"}}, "tuning"),
        (lambda document: [document], "not a JSON object"),
    ],
)
def test_a_prior_certificate_that_promises_nothing_is_refused(first, tmp_path, spoil, reason):
    copy = shutil.copytree(first, tmp_path / "copy")
    document = json.loads((copy / "privacy.json").read_text())
    (copy / "privacy.json").write_text(json.dumps(spoil(document)))
    with pytest.raises(UserError, match=reason):
        read_prior([copy], mechanism())


def test_a_prior_of_groups_by_another_column_is_refused(tmp_path):
    grouped = mechanism(max_examples_per_group=2, noise_multiplier=40.0)
    public = {"group_column": "patient"}
    make_folder(tmp_path / "first", promise=make_promise(grouped, delta=DELTA, epsilon=None), public_inputs=public)
    assert read_prior([tmp_path / "first"], grouped, "patient") == read_prior([tmp_path / "first"], grouped)
    with pytest.raises(UserError, match="of column 'patient', those of this run of column 'hospital'"):
        read_prior([tmp_path / "first"], grouped, "hospital")


def test_a_prior_that_is_missing_or_of_another_unit_is_refused(first, tmp_path):
    with pytest.raises(UserError, match="--prior_event .*nowhere"):
        read_prior([tmp_path / "nowhere"], mechanism())
    with pytest.raises(UserError, match="max_examples_per_group 1, this run 4"):
        read_prior([first], mechanism(max_examples_per_group=4))
    with pytest.raises(UserError, match="neighboring_relation zero_out, this run replace_one"):
        read_prior([first], mechanism(neighboring_relation="replace_one"))
