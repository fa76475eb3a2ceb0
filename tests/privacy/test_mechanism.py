import dataclasses
import math

import pytest

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import NEIGHBORING_RELATIONS

FIELDS = {
    "sampling_prob": 0.1,
    "steps": 50,
    "noise_multiplier": 2.0,
    "max_grad_norm": 0.5,
    "expected_batch_size": 100,
    "num_examples": 1000,
    "neighboring_relation": "zero_out",
}


@pytest.mark.parametrize("relation", NEIGHBORING_RELATIONS)
def test_noise_stddev_is_noise_multiplier_times_clip_bound_under_every_relation(relation):
    num_examples = None if relation == "add_or_remove_one" else 1000
    mechanism = DPMechanism(**{**FIELDS, "neighboring_relation": relation, "num_examples": num_examples})
    assert mechanism.noise_stddev == 2.0 * 0.5


def test_a_replaced_record_costs_what_one_record_costs_at_half_the_noise():
    whole = {**FIELDS, "sampling_prob": 1.0, "expected_batch_size": 1000}
    replaced = DPMechanism(**{**whole, "noise_multiplier": 80.0, "neighboring_relation": "replace_one"})
    one = DPMechanism(**{**whole, "noise_multiplier": 40.0})
    assert replaced.epsilon(1e-5) == pytest.approx(one.epsilon(1e-5), rel=1e-4)
    assert replaced.noise_stddev == 2 * one.noise_stddev


def test_calibration_keeps_the_promise_and_every_other_field():
    mechanism = DPMechanism(**{**FIELDS, "noise_multiplier": None})
    calibrated = mechanism.calibrate(epsilon=1.0, delta=1e-5)
    assert 0.99 < calibrated.epsilon(1e-5) <= 1.0
    assert dataclasses.replace(calibrated, noise_multiplier=None) == mechanism


def test_the_example_of_the_documentation_works():
    mechanism = DPMechanism(
        sampling_prob=4096 / 55000, steps=200, max_grad_norm=1.0, expected_batch_size=4096, num_examples=55000
    ).calibrate(epsilon=1.0, delta=1e-5)
    assert mechanism.epsilon(delta=1e-5) <= 1.0


def test_a_full_batch_is_a_plain_gaussian():
    mechanism = DPMechanism(**{**FIELDS, "sampling_prob": 1.0, "expected_batch_size": 1000, "noise_multiplier": 37.31})
    assert "PoissonSampled" not in repr(mechanism.event)
    assert "PoissonSampled" in repr(DPMechanism(**FIELDS).event)


def test_sampling_probability_and_batch_size_must_agree():
    DPMechanism(**{**FIELDS, "num_examples": 999, "sampling_prob": 100 / 999})
    with pytest.raises(UserError, match="expected_batch_size / num_examples"):
        DPMechanism(**{**FIELDS, "sampling_prob": 0.1 * (1 + 1e-6)})


def test_delta_must_be_below_one_over_n():
    mechanism = DPMechanism(**FIELDS)
    for ask in (mechanism.epsilon, lambda delta: mechanism.calibrate(1.0, delta)):
        with pytest.raises(UserError, match="1/1000"):
            ask(1e-3)
    assert mechanism.epsilon(9.9e-4) > 0


def test_n_is_needed_under_zero_out_and_refused_under_add_or_remove_one():
    with pytest.raises(UserError, match="num_examples"):
        DPMechanism(**{**FIELDS, "num_examples": None})
    with pytest.raises(UserError, match="private under add_or_remove_one"):
        DPMechanism(**{**FIELDS, "neighboring_relation": "add_or_remove_one"})


def test_noise_and_price_need_a_noise_multiplier():
    mechanism = DPMechanism(**{**FIELDS, "noise_multiplier": None})
    for ask in (lambda: mechanism.noise_stddev, lambda: mechanism.event, lambda: mechanism.epsilon(1e-5)):
        with pytest.raises(UserError, match="not chosen"):
            ask()


def test_combinations_without_a_price_are_refused_with_the_reason():
    private_n = {"neighboring_relation": "add_or_remove_one", "num_examples": None}
    for changes, reason in (
        ({"max_examples_per_group": 2, "neighboring_relation": "replace_one"}, "under replace_one have no known price"),
        ({"max_examples_per_group": 2, "truncated_batch_size": 200}, "together with groups has no known price"),
        ({"truncated_batch_size": 200, **private_n}, "only where the number of records is public"),
        ({"truncated_batch_size": 1001}, "truncated_batch_size is 1001"),
        ({"truncated_batch_size": 0}, "truncated_batch_size is 0"),
        ({"max_examples_per_group": 1025}, "max_examples_per_group is 1025"),
    ):
        with pytest.raises(UserError, match=reason):
            DPMechanism(**{**FIELDS, **changes})
    DPMechanism(**{**FIELDS, "max_examples_per_group": 2, **private_n})
    DPMechanism(**{**FIELDS, "truncated_batch_size": 200, "neighboring_relation": "replace_one"})


@pytest.mark.parametrize(
    ("changes", "event"),
    [
        ({}, "PoissonSampled"),
        ({"max_examples_per_group": 3}, "MixtureOfGaussians"),
        ({"truncated_batch_size": 200}, "TruncatedSubsampledGaussian"),
    ],
)
def test_group_and_cap_are_in_the_event_that_is_priced(changes, event):
    mechanism = DPMechanism(**{**FIELDS, **changes})
    assert event in repr(mechanism.event)
    calibrated = mechanism.calibrate(1.0, 1e-5)
    assert 0.98 < calibrated.epsilon(1e-5) <= 1.0


NUMBERS = ("sampling_prob", "steps", "noise_multiplier", "max_grad_norm", "expected_batch_size", "num_examples")
NUMBERS += ("truncated_batch_size", "max_examples_per_group")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, 0, True, False, "8", 1e400, [1]])
def test_garbage_in_any_field_is_refused_by_name(field, bad):
    with pytest.raises(UserError, match=field):
        DPMechanism(**{**FIELDS, field: bad})


@pytest.mark.parametrize("bad", ["replace_special", "zero", "", None, 3, ["zero_out"]])
def test_unknown_relations_are_refused_naming_the_known(bad):
    with pytest.raises(UserError, match="zero_out, add_or_remove_one, replace_one"):
        DPMechanism(**{**FIELDS, "neighboring_relation": bad})
