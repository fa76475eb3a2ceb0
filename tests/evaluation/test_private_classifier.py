import dataclasses
import json

import dp_accounting
import numpy as np
import pytest
import torch
from mutants.second_release import document as told
from scipy import stats

from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import private_classifier
from dp_peft_diffusion.evaluation.private_classifier import (
    joint_epsilon,
    make_net,
    promise_beside,
    train_classifier,
)
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.privacy import accounting, spending
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.recipe import Train
from tests.gradients.cases import distance
from tests.privacy.folders import make_folder
from tests.privacy.folders import promise as run_promise

KEY = bytes(range(16))
N, BATCH, STEPS, MICRO = 40, 12, 5, 8
TRAIN = Train(train_batch_size=BATCH, max_train_steps=STEPS, optimizer="sgd", learning_rate=0.5, micro_batch_size=MICRO)
PROMISE = Promise(
    mechanism=DPMechanism(
        sampling_prob=BATCH / N,
        steps=STEPS,
        noise_multiplier=1.5,
        max_grad_norm=0.1,
        expected_batch_size=BATCH,
        num_examples=N,
    ),
    epsilon=10.0,
    delta=1e-3,
)


def make_stripes(n, seed=0, side=16, channels=1):
    """Images whose class is the half that is bright, under strong noise."""
    rng = np.random.default_rng(seed)
    labels, images = rng.integers(0, 2, n), rng.integers(0, 120, (n, channels, side, side))
    images[labels == 0, :, : side // 2] += 100
    images[labels == 1, :, side // 2 :] += 100
    return images.astype(np.uint8), labels


def private(images, labels, null=(), digest=b"digest"):
    """As the data room gives them, with the null record behind the last; records of `null` are null themselves."""
    clean = np.concatenate([images, np.zeros_like(images[:1])])[:, None]
    labels, weights = np.append(labels, 0).astype(np.int64), np.append(np.ones(len(images)), 0).astype(np.float32)
    for i in null:
        clean[i], labels[i], weights[i] = 0, 0, 0
    return PrivateImages({"clean": clean, "labels": labels, "weights": weights}, ("top", "bottom"), [], digest)


def trained(images, promise=PROMISE, train=TRAIN, **options):
    return train_classifier(images, promise, train, **{"name": "test", "recorded": False, "key": KEY} | options)


@pytest.fixture
def trace(monkeypatch):
    """What the steps of a training did: sums and noisy sums, what the optimizer was given, which ids were read."""
    seen = {"total": [], "noisy": [], "divisors": [], "read": []}
    add_noise, apply_update, read = private_classifier.add_noise, private_classifier.apply_update, PrivateImages.read

    def noisily(total, *rest):
        seen["total"].append({name: value.clone() for name, value in total.items()})
        seen["noisy"].append(add_noise(total, *rest))
        return seen["noisy"][-1]

    def update(optimizer, parameters, noisy, divisor):
        assert noisy is seen["noisy"][-1]
        seen["divisors"].append(divisor)
        apply_update(optimizer, parameters, noisy, divisor)

    def reading(self, ids):
        seen["read"].append(np.asarray(ids))
        return read(self, ids)

    monkeypatch.setattr(private_classifier, "add_noise", noisily)
    monkeypatch.setattr(private_classifier, "apply_update", update)
    monkeypatch.setattr(PrivateImages, "read", reading)
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_one_record_replaced_by_nothing_moves_the_sum_by_at_most_the_clip_bound(channels):
    n, side = (12, 8) if channels == 3 else (N, 16)
    images, labels = make_stripes(n, side=side, channels=channels)
    images[3], images[4] = 255, 0
    mechanism = dataclasses.replace(PROMISE.mechanism, sampling_prob=1.0, expected_batch_size=n, num_examples=n)
    clipper = PerSampleClipper(make_net(images.shape[1:], 2, 0), mechanism.max_grad_norm)

    def total(null=()):
        return private_classifier.clipped_sum(clipper, private(images, labels, null), mechanism, MICRO, KEY, 0)

    whole = total()
    moved = [distance(whole, total([i])) for i in (0, 3, 4, n - 1)]
    assert 0 < min(moved) and max(moved) <= mechanism.max_grad_norm * (1 + 1e-5)
    assert max(moved) > 0.9 * mechanism.max_grad_norm  # the bound is reached: clipping has something to do
    assert all(value.dtype == torch.float64 for value in whole.values())


def test_the_sum_of_a_step_is_at_most_its_records_times_the_clip_bound(trace):
    images, labels = make_stripes(N)
    trained(private(images, np.zeros_like(labels)))  # of one class: gradients point alike
    for step, total in enumerate(trace["total"]):
        norm = distance(total, {name: torch.zeros_like(value) for name, value in total.items()})
        assert 0 < norm <= len(example_ids(KEY, step, N, BATCH / N)) * 0.1


def test_the_noise_of_each_step_has_the_size_that_the_mechanism_says_and_comes_once(trace):
    trained(private(*make_stripes(N)))
    assert len(trace["total"]) == STEPS and trace["divisors"] == [BATCH] * STEPS
    drawn = []
    for total, noisy in zip(trace["total"], trace["noisy"], strict=True):
        noise = torch.cat([(noisy[name] - total[name]).flatten() for name in total]).double().numpy()
        drawn.append(noise)
        ratio = np.square(noise / (1.5 * 0.1)).sum()
        chance = stats.chi2(noise.size)
        assert 2 * min(chance.cdf(ratio), chance.sf(ratio)) > 1e-6
        assert abs(noise.sum() / (1.5 * 0.1 * np.sqrt(noise.size))) < stats.norm.isf(5e-7)
    assert np.abs(np.triu(np.corrcoef(drawn), 1)).max() < 6 / np.sqrt(len(drawn[0]))


def test_the_ids_are_those_of_the_mechanisms_poisson_sample_in_micro_batches_of_one_shape(trace):
    trained(private(*make_stripes(N)))
    read = [ids for ids in trace["read"] if set(ids.tolist()) != {-1}]
    for step in range(STEPS):
        wanted = example_ids(KEY, step, N, BATCH / N)
        found = [read.pop(0) for _ in range(-(-len(wanted) // MICRO))]
        assert {len(ids) for ids in found} == {MICRO}
        assert [i for ids in found for i in ids if i >= 0] == wanted.tolist()
    assert read == []


def test_an_empty_batch_is_a_step_of_noise_alone(trace):
    images = private(*make_stripes(N))
    rare = dataclasses.replace(PROMISE.mechanism, sampling_prob=1e-9, expected_batch_size=N * 1e-9)
    trained(images, dataclasses.replace(PROMISE, mechanism=rare))
    assert len(trace["noisy"]) == STEPS
    assert not any(value.any() for total in trace["total"] for value in total.values())
    assert all(value.any() for noisy in trace["noisy"] for value in noisy.values())


def test_separable_images_are_learnt_at_a_large_epsilon():
    mechanism = dataclasses.replace(
        PROMISE.mechanism, sampling_prob=0.5, expected_batch_size=150, num_examples=300, steps=25, noise_multiplier=0.5
    )
    images, promise = private(*make_stripes(300), null=[7]), dataclasses.replace(PROMISE, mechanism=mechanism)
    classifier = trained(images, promise, dataclasses.replace(TRAIN, learning_rate=5.0, micro_batch_size=64))
    tested, labels = make_stripes(200, seed=1)
    assert (classifier.predict(tested) == labels).mean() > 0.95


def test_the_same_key_gives_the_same_bits_and_the_operating_systems_another_every_time():
    images = private(*make_stripes(N))
    given, again, fresh, other = (trained(images, key=key) for key in (KEY, KEY, None, None))
    weights = [torch.cat([p.flatten() for p in c.net.parameters()]) for c in (given, again, fresh, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3]) and not torch.equal(weights[0], weights[2])
    assert [c.release()["key_source"] for c in (given, fresh)] == ["given", "os"]


def test_training_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained(private(*make_stripes(N)))
    assert torch.equal(torch.rand(3), expected)


def test_all_planned_steps_are_in_the_data_sets_ledger_before_the_first(monkeypatch):
    images = private(*make_stripes(N), digest=b"a data set of this test alone")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(private_classifier, "add_noise", stopped)
    for recorded in (False, True, True):
        with pytest.raises(KeyboardInterrupt):
            trained(images, recorded=recorded, name="digits, classifier", group_column="patient")
    entries = spending.spendings(spending.data_set_id(images.source_digest))
    assert [(entry.folder, entry.group_column, entry.steps, entry.mechanism) for entry in entries] == [
        ("digits, classifier", "patient", STEPS, PROMISE.mechanism)
    ] * 2


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("run"), promise=run_promise(tuning_runs=2, epsilon=2.0))


def test_a_classifier_beside_a_run_keeps_its_epsilon_for_the_same_unit_and_records(document):
    beside = promise_beside(document, expected_batch_size=300, steps=STEPS)
    run, own = promise_of(document), beside.mechanism
    assert (beside.epsilon, beside.delta) == (2.0, run.delta)
    assert 1.9 < beside.priced <= 2.0
    assert own.epsilon(run.delta) == beside.priced
    assert (own.num_examples, own.neighboring_relation, own.steps) == (1797, "zero_out", STEPS)
    assert own.sampling_prob * 1797 == pytest.approx(300, rel=1e-12)
    assert promise_beside(document, steps=20).mechanism.expected_batch_size == pytest.approx(1797 / 2)


def test_the_joint_epsilon_is_the_price_of_both_events_and_exceeds_each(document):
    run, classifier = promise_of(document), promise_beside(document, steps=20)
    both = dp_accounting.ComposedDpEvent((run.mechanism.event, run.mechanism.event, classifier.mechanism.event))
    joint, price = joint_epsilon(document, classifier), accounting.epsilon(both, run.delta, "zero_out")
    assert price <= joint <= price * 1.001
    assert max(run.priced, classifier.priced) < joint < run.priced + classifier.priced


def test_beside_a_run_of_groups_both_are_priced_as_groups():
    mechanism = dataclasses.replace(PROMISE.mechanism, steps=1, max_examples_per_group=2, noise_multiplier=4.0)
    run = dataclasses.replace(PROMISE, mechanism=mechanism)
    both = dp_accounting.SelfComposedDpEvent(mechanism.event, 2)
    joint, price = joint_epsilon(told(run), run), accounting.epsilon(both, run.delta, "zero_out")
    assert price <= joint <= price * 1.001


def test_a_run_that_promises_nothing_or_to_others_is_composed_with_nothing(document):
    classifier = promise_beside(document, steps=20)
    with pytest.raises(UserError, match="key of the run's noise was given"):
        joint_epsilon({**document, "key_source": "given"}, classifier)
    groups = dataclasses.replace(classifier.mechanism, max_examples_per_group=2)
    with pytest.raises(UserError, match="max_examples_per_group 2"):
        joint_epsilon(document, dataclasses.replace(classifier, mechanism=groups))


def test_the_release_says_that_it_is_in_addition_and_can_be_priced_again(document):
    classifier = trained(private(*make_stripes(N)))
    release = json.loads(json.dumps(classifier.release()))
    assert release["in_addition"] is True and "in addition" in release["statement"]
    assert set(release["mechanism"]) == set(document["mechanism"])
    of_it = {**document, **release, "guarantee": {"epsilon": release["epsilon"], "delta": release["delta"]}}
    read_back = promise_of({**of_it, "tuning": "undeclared", "public_inputs": {"num_examples": N}})
    assert read_back.mechanism == PROMISE.mechanism


def test_images_that_cannot_be_trained_on_are_refused_before_anything_is_spent(monkeypatch):
    monkeypatch.setattr(spending, "record_spending", lambda *_: pytest.fail("spent"))
    images, labels = make_stripes(N)
    unlabelled = private(images, labels)
    unlabelled.class_names = None
    with pytest.raises(UserError, match="needs classes"):
        trained(unlabelled, recorded=True)
    with pytest.raises(UserError, match="grey images from side 16.*sees 1x8x8"):
        trained(private(images[:, :, :8, :8], labels), recorded=True)
    groups = dataclasses.replace(PROMISE.mechanism, max_examples_per_group=3)
    with pytest.raises(UserError, match="groups of at most 3.*no group_column"):
        trained(private(images, labels), dataclasses.replace(PROMISE, mechanism=groups), recorded=True)
    with pytest.raises(UserError, match="more or fewer training images.*--training_dataset_name"):
        trained(private(images[1:], labels[1:]), recorded=True)
