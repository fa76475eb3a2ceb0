"""What looks at the classifier that is trained directly with DP-SGD: a second private loop, with bugs of its own."""

import dataclasses
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gradients.cases import relative_error
from mutants.tiny_run import key_of
from scipy import stats
from torch import nn

from dp_peft_diffusion.diffusion.datasets import PrivateImages
from dp_peft_diffusion.evaluation import private_classifier
from dp_peft_diffusion.gradients.functional import Clip, loop_clipped_sum
from dp_peft_diffusion.privacy import accounting, spending
from dp_peft_diffusion.privacy.certificate import recorded_mechanism
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.promise import Promise, Release, composed_event
from dp_peft_diffusion.recipe import Train

N, BATCH, STEPS, SIDE, NULL = 20, 9.0, 4, 16, 3
RARE, COLUMN = 1e-6, "owner"
MECHANISM = DPMechanism(
    sampling_prob=BATCH / N,
    steps=STEPS,
    noise_multiplier=2.0,
    max_grad_norm=0.1,
    expected_batch_size=BATCH,
    num_examples=N,
)


def second_release(seed: int) -> None:
    """Each sum is that of plain autograd over the mechanism's ids, its noise the mechanism's, the ledger first."""
    rng, key = np.random.default_rng(seed), key_of(seed)
    clean = rng.integers(0, 256, (N + 1, 1, 1, SIDE, SIDE)).astype(np.uint8)
    labels, weights = rng.integers(0, 2, N + 1), np.ones(N + 1, np.float32)
    for null in (NULL, N):
        clean[null], labels[null], weights[null] = 0, 0, 0
    arrays = {"clean": clean, "labels": labels, "weights": weights}
    images = PrivateImages(arrays, ("zero", "one"), [], bytes([seed % 256]))
    steps = trained(images, key)
    assert len(steps) == STEPS, f"{len(steps)} steps, not {STEPS}"
    whole = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for number, step in enumerate(steps):
        ids = example_ids(key, number, N, BATCH / N)
        batch = ((whole["clean"][ids, 0].float() / 127.5 - 1), whole["labels"][ids], whole["weights"][ids])
        expected = loop_clipped_sum(step["net"], losses, batch, Clip(MECHANISM.max_grad_norm))
        assert relative_error(step["total"], expected) < 1e-4, "the sum is not that of the sampled records one by one"
        assert step["divisor"] == BATCH, f"divided by {step['divisor']}"
        assert step["recorded"] == (STEPS, COLUMN), "the ledger does not know of all steps, or whose, before the noise"
    noise = np.concatenate([step["noise"] for step in steps]) / MECHANISM.noise_stddev
    chance = stats.chi2(noise.size)
    assert 2 * min(chance.cdf(np.sum(noise**2)), chance.sf(np.sum(noise**2))) > RARE, "the noise has another size"
    together = np.corrcoef([step["noise"] for step in steps]) - np.eye(STEPS)
    assert np.abs(together).max() < 6 / len(steps[0]["noise"]) ** 0.5, "steps share their noise"


def losses(net: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    inputs, labels, weights = batch
    return nn.functional.cross_entropy(net(inputs), labels, reduction="none") * weights


def trained(images: PrivateImages, key: bytes) -> list[dict[str, Any]]:
    """What each step of a training did: sum, noise, divisor, the net before it, and the ledger before its noise."""
    steps: list[dict[str, Any]] = []
    add_noise, apply_update = private_classifier.add_noise, private_classifier.apply_update
    net = private_classifier.make_net((1, SIDE, SIDE), 2, 0)

    def noisily(total, *rest):
        noisy = add_noise(total, *rest)
        noise = torch.cat([(noisy[name] - total[name]).flatten() for name in total]).numpy()
        entries = spending.spendings(spending.data_set_id(images.source_digest))
        recorded = (entries[-1].steps, entries[-1].group_column) if len(entries) > before else None
        steps.append({"total": dict(total), "noise": noise, "net": private_classifier.make_net((1, SIDE, SIDE), 2, 0)})
        steps[-1] |= {"recorded": recorded}
        steps[-1]["net"].load_state_dict(net.state_dict())
        return noisy

    def update(optimizer, parameters, noisy, divisor):
        apply_update(optimizer, parameters, noisy, divisor)
        net.load_state_dict({name: parameter.detach() for name, parameter in parameters.items()})
        steps[-1]["divisor"] = divisor

    train = Train(optimizer="sgd", learning_rate=0.5, micro_batch_size=4)
    promise = Promise(mechanism=dataclasses.replace(MECHANISM), epsilon=10.0, delta=1e-3)
    before = len(spending.spendings(spending.data_set_id(images.source_digest)))
    with (
        patch.object(private_classifier, "add_noise", noisily),
        patch.object(private_classifier, "apply_update", update),
        patch.object(private_classifier, "progress", range),
    ):
        private_classifier.train_classifier(images, promise, train, name="mutants", group_column=COLUMN, key=key)
    return steps


def second_prices(seed: int) -> None:
    """It is promised to the run's records, relation and unit, and priced with all that the run is composed with."""
    noise = 4.0 + seed % 7
    for changes in ({"neighboring_relation": "replace_one"}, {"max_examples_per_group": 2}):
        mechanism = dataclasses.replace(MECHANISM, num_examples=1000, sampling_prob=BATCH / 1000, **changes)
        earlier = Release(mechanism=dataclasses.replace(mechanism, noise_multiplier=1.5), source="certificate")
        run = document(Promise(mechanism=mechanism, epsilon=10.0, delta=1e-5, prior=(earlier,)))
        with patch.object(private_classifier, "make_promise", lambda own, **of: with_noise(own, noise, of)):
            classifier = private_classifier.promise_beside(run, expected_batch_size=20, steps=2)
        expected = dataclasses.replace(
            mechanism, steps=2, expected_batch_size=20, sampling_prob=0.02, max_grad_norm=0.1, noise_multiplier=noise
        )
        assert classifier == Promise(mechanism=expected, epsilon=10.0, delta=1e-5), "promised to others than the run"
        if mechanism.max_examples_per_group == 1:  # groups take seconds to price
            whole = composed_event(mechanism, None, [earlier, Release(mechanism=expected, source="classifier")])
            price = accounting.epsilon(whole, 1e-5, mechanism.neighboring_relation)
            joint = private_classifier.joint_epsilon(run, classifier)
            assert joint is not None and price <= joint <= price * 1.001, "together is less, or more, than all there is"


def with_noise(mechanism: DPMechanism, noise: float, of: dict[str, Any]) -> Promise:
    """In place of a calibration, which takes seconds for groups."""
    return Promise(mechanism=dataclasses.replace(mechanism, noise_multiplier=noise), **of)


def document(promise: Promise) -> dict[str, Any]:
    """What a certificate says of a promise, as far as anybody adds it up."""
    return {
        "neighboring_relation": promise.mechanism.neighboring_relation,
        "key_source": "os",
        "tuning": "undeclared",
        "guarantee": {"epsilon": promise.epsilon, "delta": promise.delta},
        "public_inputs": {"num_examples": promise.mechanism.num_examples},
        "mechanism": recorded_mechanism(promise.mechanism),
        "other_releases": [
            {
                "mechanism": recorded_mechanism(release.mechanism),
                "num_examples": release.mechanism.num_examples,
                "runs": release.runs,
                "source": release.source,
            }
            for release in promise.prior
        ],
    }
