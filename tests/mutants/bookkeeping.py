"""What looks at everything beside the step: randomness, prices, certificate, records, whole and interrupted runs.

Each takes a seed and raises AssertionError with a sentence.
"""

import dataclasses
import functools
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from mutants.tiny_run import MEMORY, NULL_ROW, TinyRun, key_of, private_images, tiny_net
from PIL import Image
from scipy import stats
from scipy.optimize import brentq
from tiny_models import tiny_image_folder
from tiny_runs import changed, tiny_recipe

from dp_peft_diffusion import preparation, training
from dp_peft_diffusion.batches import make_batch
from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel
from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.accounting import epsilon
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Release, make_promise
from dp_peft_diffusion.privacy.randomness import Purpose, attempt_key, generator, new_key
from dp_peft_diffusion.recipe import Data, Recipe

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
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
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
    recipe, base = run.recipe(), BaseModel(net, None, BaseLayout(1, NULL_ROW), "tiny", None, None, "")
    base = dataclasses.replace(base, scheduler=training_schedule())

    def batch_of(ids: np.ndarray, images: torch.Tensor, key: bytes = key_of(seed), step: int = 3):
        n = len(ids)
        return make_batch(recipe, base, images[:n], torch.zeros(n, dtype=torch.long), torch.ones(n), ids, key, step)

    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    together = batch_of(ids, images)
    for place, one in enumerate(ids):
        alone = batch_of(np.array([one]), images + 1)
        for name in ("noise", "timesteps", "rows"):
            assert torch.equal(alone[name][0], together[name][place]), f"{name} of an example depends on its company"
    noise = together["noise"].flatten(0, 1)
    others = [batch_of(ids, images, step=4)["noise"][0], batch_of(ids, images, key=key_of(seed + 1))["noise"][0]]
    assert len(torch.cat([noise, *others]).flatten(1).unique(dim=0)) == len(noise) + 16, "two draws are one"
    many = batch_of(np.arange(200), images)
    values = many["noise"].double().flatten()
    p = 2 * min(tail(values.square().sum().item(), len(values)) for tail in (stats.chi2.cdf, stats.chi2.sf))
    assert p > 1e-6, "diffusion noise is not standard normal"
    dropped = (many["rows"] == NULL_ROW).double().mean().item()
    assert abs(dropped - 0.4) < FAR * (0.24 / many["rows"].numel()) ** 0.5, f"labels are dropped at {dropped:.3g}"


def training_schedule():
    from diffusers import DDPMScheduler

    return DDPMScheduler(prediction_type="epsilon")


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
            assert refused(lambda: mechanism(**{field: value})), f"{field} {value!r} is accepted"
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
    recorded, levels = document["mechanism"], certificate_levels()
    assert recorded["count"] == 40, "the certificate is for the steps taken, not for those planned"
    assert recorded["noise_multiplier"] == promise.mechanism.noise_multiplier and recorded["sampling_prob"] == 0.25
    assert document["guarantee"]["epsilon"] == 0.2 >= document["accounting"]["epsilon_priced"], "the price is above"
    assert document["neighboring_relation"] == "zero_out" and document["public_inputs"]["num_examples"] == 1000
    assert refused(lambda: levels["key"](folder, document)), "a key that somebody gave is certified"
    assert not refused(lambda: levels["epsilon"](folder, document)), "a right epsilon is not believed"
    for section, field, value in (
        ("guarantee", "epsilon", 0.1),
        ("mechanism", "count", 400),
        ("mechanism", "noise_multiplier", recorded["noise_multiplier"] / 2),
    ):
        forged = {**document, section: {**document[section], field: value}}
        assert refused(lambda forged=forged: levels["epsilon"](folder, forged)), f"a forged {field} is believed"
    assert len(certificate.CANNOT_PROVE) == 6


def certificate_levels() -> dict:
    from dp_peft_diffusion.privacy.certificate_levels import LEVELS

    return LEVELS


def records(seed: int) -> None:
    """A row is a record at its position, readable or not; its content moves nobody else, and is read by itself."""
    with scratch() as folder:
        tiny_image_folder(folder / "images", {"dark": 60, "light": 190}, 4)
        data = Data(dataset_name=str(folder / "images"))
        before = open_examples(data, 8, 1)
        for broken in (folder / "images" / "light").iterdir():
            broken.write_bytes(b"not an image")
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(ramp).save(folder / "images" / "dark" / "2.png")
        after = open_examples(data, 8, 1)
    assert len(before) == len(after) == 8, f"unreadable rows are not counted: N is {len(after)}, not 8"
    assert before.class_names == after.class_names == ("dark", "light"), "class names are read off the rows"
    assert after.read(range(8))[2].tolist() == [1, 1, 1, 1, 0, 0, 0, 0], "an unreadable row is not the null record"
    for i in (0, 1, 3):
        same = all(torch.equal(x[0], y[0]) for x, y in zip(before.read([i]), after.read([i]), strict=True))
        assert same, "one record's content changes another record, or its place"
    images, labels, weights = before.read([3, -1, 6])
    for place, i in enumerate((3, -1, 6)):
        alone = before.read([i])
        assert torch.equal(images[place], alone[0][0]), "an image is not read by itself"
    assert weights.tolist() == [1, 0, 1] and not images[1].add(1).any(), "the padding of a batch is not the null record"


STEPS = 4  # of a whole run, whose state is saved after every second


@functools.cache
def _home() -> tuple[Recipe, tempfile.TemporaryDirectory]:
    """A recipe whose base and images lie in a folder that lives as long as the process."""
    folder = tempfile.TemporaryDirectory(dir=MEMORY)
    recipe = changed(tiny_recipe(Path(folder.name)), "privacy", record_spending=False, noise_multiplier=40.0)
    recipe = changed(recipe, "train", max_train_steps=STEPS, train_batch_size=4)
    return changed(recipe, "sample", every=0), folder


def whole_recipe() -> Recipe:
    return _home()[0]


def public_values(seed: int) -> None:
    """Everything settled before step 1 is the same on neighbouring data, and no record was looked at for it."""
    recipe = changed(whole_recipe(), "train", skip_self_check=False)
    unknown = changed(recipe, "privacy", neighboring_relation="add_or_remove_one", sampling_prob=0.5)
    with scratch() as folder, patch.object(PrivateImages, "read", _nobody_reads):
        for kind, wanted in (("nulled", recipe), ("removed", unknown)):
            neighbour = folder / kind / "images"
            shutil.copytree(recipe.data.dataset_name, neighbour)
            victim = neighbour / "light" / f"{seed % 5}.png"
            victim.write_bytes(b"") if kind == "nulled" else victim.unlink()
            settled = [
                _settled(training.prepare(changed(wanted, "data", dataset_name=str(images)), folder / "run"))
                for images in (recipe.data.dataset_name, neighbour)
            ]
            for name in settled[0]:
                assert settled[0][name] == settled[1][name], f"one record {kind} changes {name}"


def _nobody_reads(*arguments: object) -> None:
    raise AssertionError("private records are used before step 1")


def _settled(prepared: training.Prepared) -> dict[str, object]:
    return {
        "recipe": changed(prepared.recipe, "data", dataset_name=""),
        "mechanism": prepared.mechanism,
        "promise": prepared.promise,
        "notes": prepared.notes,
        "gamma": prepared.gamma_source,
        "context": {name: text for name, text in prepared.context.items() if name != "images"},
        "what trains": {name: parameter.shape for name, parameter in prepared.clipper.parameters.items()},
    }


METRICS = {"step", "learning_rate", "update_norm", "epsilon"}
SHARED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "privacy.json",
    "recipe.yaml",
    "samples/step-0000.png",
    "samples/step-0004.png",
}


def released(seed: int) -> None:
    """What a whole run shares: the files, keys and figures that it may, verified, and no key left behind."""
    recipe = whole_recipe()
    with scratch() as folder:
        result = training.train(recipe, folder / "run")
        files = {str(path.relative_to(result.folder)) for path in result.folder.rglob("*") if path.is_file()}
        assert files == SHARED, f"shared besides: {files - SHARED}; missing: {SHARED - files}"
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        assert all(set(line) == METRICS for line in lines), "metrics.jsonl tells more than it may"
        assert len(lines) == STEPS == result.certificate["mechanism"]["count"]
        private = recipe.data.dataset_name.encode()
        assert not any(private in (result.folder / name).read_bytes() for name in files), "the images' place is shared"
        report = certificate.verify(result.folder)
        assert report.ok and report.epsilon == result.certificate["guarantee"]["epsilon"], "verify refuses the folder"
        assert not (result.private_folder / "key").exists(), "the key is left behind"
        assert steps_begun(result.private_folder / "ledger.jsonl") == {1: STEPS}


@contextmanager
def _without_export() -> Iterator[None]:
    """Nothing is certified, nor priced for the metrics: both have checks of their own."""
    priced = patch.object(training, "epsilon_so_far", lambda prepared: [0.0] * prepared.mechanism.steps)
    with patch.object(training, "export", lambda *arguments: None), priced:
        yield


class Stopped(BaseException):
    """The process ends."""


def resumption(seed: int) -> None:
    """An interrupted run ends bit for bit as if it had not been; with another choice it is refused, or draws afresh."""
    recipe, key = whole_recipe(), key_of(seed)
    with scratch() as folder, _without_export():
        whole = _noise_of(recipe, folder / "whole", key)
        first = _noise_of(recipe, folder / "run", key, stop_after=3)
        second = _noise_of(recipe, folder / "run", key)
        assert all(torch.equal(x, y) for x, y in zip(first, whole, strict=False)), "the same run draws other noise"
        resumed_at = len(whole) - len(second)
        assert resumed_at == 2, f"the run goes on from step {resumed_at}, not from the saved state"
        assert all(torch.equal(x, y) for x, y in zip(second, whole[2:], strict=True)), "noise is not that of its steps"
        assert steps_begun(folder / "run.private" / "ledger.jsonl") == {1: STEPS}, "steps of an attempt are counted wrongly"
        _noise_of(recipe, folder / "other", key, stop_after=3)
        for section, field, value in (("train", "learning_rate", 0.2), ("train", "mixed_precision", "bf16")):
            other = changed(recipe, section, **{field: value})
            assert refused(lambda other=other: _noise_of(other, folder / "other", key)), f"goes on with another {field}"
        prepared = training.prepare(recipe, folder / "other", new_attempt=True)
        assert [release.mechanism.steps for release in prepared.promise.prior] == [4], "steps begun are not charged"
        afresh = _noise_of(recipe, folder / "other", key, prepared)
        assert not any(torch.equal(x, y) for x in afresh for y in whole), "a new attempt draws the old noise"


def _noise_of(
    recipe: Recipe, folder: Path, key: bytes, prepared: training.Prepared | None = None, stop_after: int | None = None
) -> list[torch.Tensor]:
    """The noise of each step that a run takes until it ends or is stopped."""
    noise, original = [], training.add_noise

    def seen(total, *arguments):
        if len(noise) == stop_after:
            raise Stopped
        noisy = original(total, *arguments)
        noise.append(torch.cat([(noisy[name].double() - total[name]).flatten() for name in total]))
        return noisy

    with patch.object(training, "add_noise", seen):
        try:
            training.run(prepared or training.prepare(recipe, folder), key)
        except Stopped:
            pass
    return noise


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
