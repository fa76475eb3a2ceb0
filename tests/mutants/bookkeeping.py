"""What looks at what a step stands on: randomness, draws, prices, certificate, ledger.

Each takes a seed and raises AssertionError with a sentence.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mutants.tiny_run import MEMORY, TinyRun, key_of, private_images, tiny_base, tiny_net
from scipy import stats
from scipy.optimize import brentq

from dp_peft_diffusion.batches import make_batch, make_task
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.accounting import epsilon
from dp_peft_diffusion.privacy.certificate_levels import LEVELS
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Release, make_promise
from dp_peft_diffusion.privacy.randomness import Purpose, attempt_key, generator, new_key

FAR = 6.0


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except (UserError, RunError, PrivacyError, ValueError):
        return True
    return False


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def randomness(seed: int) -> None:
    """Keys come from the operating system, streams from the whole key and their whole place, noise from one stream."""
    keys = []
    for _ in range(2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        keys.append(new_key())
    assert keys[0] != keys[1], "a seed decides the key"
    key = key_of(seed)
    place = generator(key, Purpose.NOISE, 5, 6, 7).bit_generator.state["state"]["counter"].tolist()
    assert place == [0, 7, 6, 5], f"step, example id and draw are not the upper counter words: {place}"
    places = [(key, purpose) for purpose in Purpose]
    places += [((int.from_bytes(key, "big") ^ 1 << bit).to_bytes(16, "big"), Purpose.NOISE) for bit in range(128)]
    states = np.array([generator(*place, 0).bit_generator.state["state"]["key"] for place in places])
    assert len(np.unique(states, axis=0)) == len(places), "some bit of the key, or the purpose, reaches no stream"
    varied = np.bitwise_or.reduce(states) & ~np.bitwise_and.reduce(states)
    assert (varied == 2**64 - 1).all(), "the generator's key has fewer than 128 bits that vary"
    streams = {attempt_key(k, attempt, digest) for k in keys for attempt in (1, 2) for digest in (b"a", b"b")}
    assert len(streams) == 8, "two attempts, or two recipes, have one key"
    total, stream = {"a": torch.ones(50, dtype=torch.float64)}, generator(key, Purpose.NOISE, 3)
    half_sum = sum(stream.standard_normal(50) for _ in range(4)) / 2
    expected = (1 + 0.7 * half_sum).astype(np.float32)
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        found = add_noise(total, 0.7, key, 3)["a"].numpy()
        assert np.array_equal(found, expected), "noise is not four normals of the step's own stream, summed in float64"


def draws(seed: int) -> None:
    """An example draws by its id, step and key: alone or in company, whatever its pixels; each draw by itself."""
    net, ids = tiny_net(), np.array([17, 0, 5, 4])
    run = TinyRun(private_images(np.zeros((20, 4, 4))), noise_multiplicity=8, label_dropout=0.4)
    task = make_task(run.recipe(), tiny_base(net))

    def batch_of(ids: np.ndarray, images: torch.Tensor, key: bytes = key_of(seed), step: int = 3):
        n = len(ids)
        examples = Examples(images[:n, None], torch.zeros(n, dtype=torch.long), torch.ones(n), {})
        return make_batch(task, examples, ids, key, step)

    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    together = batch_of(ids, images)
    for place, one in enumerate(ids):
        alone = batch_of(np.array([one]), images + 1)
        for name in ("noise", "levels", "labels"):
            assert torch.equal(alone[name][0], together[name][place]), f"{name} of an example depends on its company"
    noise = together["noise"].flatten(0, 1)
    others = [batch_of(ids, images, step=4)["noise"][0], batch_of(ids, images, key=key_of(seed + 1))["noise"][0]]
    assert len(torch.cat([noise, *others]).flatten(1).unique(dim=0)) == len(noise) + 16, "two draws are one"
    many = batch_of(np.arange(200), images)
    values = many["noise"].double().flatten()
    p = 2 * min(tail(values.square().sum().item(), len(values)) for tail in (stats.chi2.cdf, stats.chi2.sf))
    assert p > 1e-6, "diffusion noise is not standard normal"
    dropped = (many["labels"] == task.conditions.null).double().mean().item()
    assert abs(dropped - 0.4) < FAR * (0.24 / many["labels"].numel()) ** 0.5, f"labels are dropped at {dropped:.3g}"


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism, mu = sensitivity / noise (Balle and Wang 2018, arXiv 1805.06530)."""

    def excess(eps: float) -> float:
        other = math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))
        return stats.norm.cdf(mu / 2 - eps / mu) - other - delta

    return brentq(excess, 0, 200)


def mechanism(**changes) -> DPMechanism:
    fields = dict(sampling_prob=0.25, steps=40, noise_multiplier=4.0, expected_batch_size=250, num_examples=1000)
    return DPMechanism(**{**fields, **changes})


GARBAGE = {
    "noise_multiplier": (math.nan, 0.0, -1.0, math.inf, True, "8"),
    "sampling_prob": (math.nan, 0.0, 1.5, 0.2501),  # the last is not expected_batch_size / num_examples
    "steps": (0, 1.5, True),
    "num_examples": (None, 0),
    "neighboring_relation": ("zero", None),
}


def prices(seed: int) -> None:
    """Prices are at and just above closed forms and known figures; noise is rounded up; nonsense is refused."""
    full = dict(sampling_prob=1.0, expected_batch_size=1000, max_grad_norm=0.5, noise_multiplier=20.0)
    for relation, k, mu in (("zero_out", 1, 1), ("replace_one", 1, 2), ("zero_out", 3, 3), ("add_or_remove_one", 1, 1)):
        n = None if relation == "add_or_remove_one" else 1000
        one = mechanism(**full, neighboring_relation=relation, max_examples_per_group=k, num_examples=n)
        exact, found = gaussian_epsilon(mu * 40**0.5 / 20, 1e-5), one.epsilon(1e-5)
        assert exact <= found <= exact * 1.001, f"{relation}, {k} a group: epsilon {found:.5g}, exactly {exact:.5g}"
        assert one.noise_stddev == 20.0 * 0.5, f"{relation}: noise_stddev is not noise_multiplier * max_grad_norm"
    batch, n = 4096, 60000
    known = dict(sampling_prob=batch / n, steps=200, noise_multiplier=15.86, expected_batch_size=batch, num_examples=n)
    known = mechanism(**known)
    assert 0.1995 < known.epsilon(1e-5) <= 0.2002, f"a known epsilon of 0.2 is priced {known.epsilon(1e-5):.5g}"
    assert epsilon(known.event, 1e-5, "zero_out", "rdp") > known.epsilon(1e-5), "RDP is below PLD"
    sigma = mechanism(noise_multiplier=None).calibrate(0.1, 1e-5).noise_multiplier
    below = float(f"{sigma * (1 - 1e-3):.4g}")
    assert sigma == float(f"{sigma:.4g}") and mechanism(noise_multiplier=sigma).epsilon(1e-5) <= 0.1, "noise too small"
    assert mechanism(noise_multiplier=below).epsilon(1e-5) > 0.1, "a smaller noise would keep the promise"
    for field, values in GARBAGE.items():
        for value in values:
            assert refused(lambda changes={field: value}: mechanism(**changes)), f"{field} {value!r} is accepted"
    assert refused(lambda: mechanism().epsilon(1e-3)), "delta 1/N is accepted, at which one image may be published"
    assert refused(lambda: mechanism().epsilon(math.nan)), "delta NaN is accepted"
    _check_composition()


def _check_composition() -> None:
    one = mechanism(steps=10, noise_multiplier=40.0)
    thrice = make_promise(one, delta=1e-5, epsilon=None, tuning_runs=3)
    again = make_promise(one, delta=1e-5, epsilon=None, prior=(Release(mechanism=one, runs=2, source="another"),))
    whole = mechanism(steps=30, noise_multiplier=40.0).epsilon(1e-5)
    for what, promise in (("tuning runs", thrice), ("earlier releases", again)):
        assert whole * (1 - 1e-6) <= promise.epsilon <= whole * 1.002, f"{what} are not all paid for"
    assert thrice.priced <= thrice.epsilon, "an epsilon is rounded down"


def certified(seed: int) -> None:
    """The certificate is the promise, whatever happened; verify prices it again and says what it cannot prove."""
    with scratch() as folder:
        for name in ("adapter_config.json", "recipe.yaml"):
            (folder / name).write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "metrics.jsonl").write_text("{}\n" * 7)  # 7 of 40 steps were taken
        promise = make_promise(mechanism(noise_multiplier=40.0), delta=1e-5, epsilon=0.2)
        document = certificate.certificate(
            promise,
            clipping="flat",
            gamma=None,
            noise_multiplicity=4,
            public_inputs={},
            base={"name": "builtin:handwriting", "revision": None, "sha256": "a" * 64},
            folder=folder,
            key_source="given",
        )
    recorded = document["mechanism"]
    assert recorded["count"] == 40, "the certificate is for the steps taken, not for those planned"
    assert recorded["noise_multiplier"] == promise.mechanism.noise_multiplier and recorded["sampling_prob"] == 0.25
    assert document["guarantee"]["epsilon"] == 0.2 >= document["accounting"]["epsilon_priced"], "the price is above"
    assert document["neighboring_relation"] == "zero_out" and document["public_inputs"]["num_examples"] == 1000
    assert refused(lambda: LEVELS["key"](folder, document)), "a key that somebody gave is certified"
    assert not refused(lambda: LEVELS["epsilon"](folder, document)), "a right epsilon is not believed"
    for section, field, value in (
        ("guarantee", "epsilon", 0.1),
        ("mechanism", "count", 400),
        ("mechanism", "noise_multiplier", recorded["noise_multiplier"] / 2),
    ):
        forged = {**document, section: {**document[section], field: value}}
        assert refused(lambda forged=forged: LEVELS["epsilon"](folder, forged)), f"a forged {field} is believed"
    assert len(certificate.CANNOT_PROVE) == 6


def ledger(seed: int) -> None:
    """Every step begun is counted, over attempts, once; a torn line counts, and a changed one is refused."""
    with scratch() as folder:
        path = folder / "ledger.jsonl"
        for attempt, steps in ((1, 3), (2, 2)):
            book = Ledger(path, attempt)
            for step in range(steps):
                book.begin(step)
            assert len(path.read_text().splitlines()) == (3 if attempt == 1 else 5), "a step begun is not on disk"
            book.close()
        assert steps_begun(path) == {1: 3, 2: 2} == Ledger(path, 3).steps_begun, "steps begun are not all counted"
        content = path.read_bytes()
        path.write_bytes(content[:-20])
        assert steps_begun(path) == {1: 3, 2: 2}, "a torn line does not count"
        path.write_bytes(b"\n".join(content.split(b"\n")[1:]))
        assert refused(lambda: steps_begun(path)), "a ledger without its first line is believed"
