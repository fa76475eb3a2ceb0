"""What looks at whole runs: the records they read, what is settled before step 1, what they share, how they resume.

Each takes a seed and raises AssertionError with a sentence.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from mutants.bookkeeping import refused, scratch
from mutants.tiny_run import MEMORY, key_of
from PIL import Image
from tiny_models import tiny_image_folder
from tiny_runs import changed, tiny_recipe

from dp_peft_diffusion import attempt, training
from dp_peft_diffusion.diffusion.datasets import PrivateImages, open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.recipe import Data, Recipe


def records(seed: int) -> None:
    """A row is a record at its position, readable or not; its content moves nobody else, and is read by itself."""
    with scratch() as folder:
        tiny_image_folder(folder / "images", {"dark": 60, "light": 190}, 4)
        data = Data(dataset_name=str(folder / "images"))
        before = open_examples(data, PixelEncoder(8, 1), None)
        for broken in (folder / "images" / "light").iterdir():
            broken.write_bytes(b"not an image")
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(ramp).save(folder / "images" / "dark" / "2.png")
        after = open_examples(data, PixelEncoder(8, 1), None)
    assert len(before) == len(after) == 8, f"unreadable rows are not counted: N is {len(after)}, not 8"
    assert before.class_names == after.class_names == ("dark", "light"), "class names are read off the rows"
    assert after.read(range(8)).weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 0], "an unreadable row is not the null record"
    for i in (0, 1, 3):
        same = all(torch.equal(x[0], y[0]) for x, y in zip(before.read([i])[:3], after.read([i])[:3], strict=True))
        assert same, "one record's content changes another record, or its place"
    images, labels, weights, _ = before.read([3, -1, 6])
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
    context = attempt.context_of_run(prepared, attempt.open_images(prepared, None))
    return {
        "recipe": changed(prepared.recipe, "data", dataset_name=""),
        "mechanism": prepared.mechanism,
        "promise": prepared.promise,
        "notes": prepared.notes,
        "gamma": prepared.gamma_source,
        "context": {name: text for name, text in context.items() if name != "images"},
        "what trains": {name: parameter.shape for name, parameter in prepared.clipper.parameters.items()},
    }


METRICS = {"step", "learning_rate", "update_norm", "epsilon"}
SHARED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "report.html",
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
        assert steps_begun(folder / "run.private" / "ledger.jsonl") == {1: STEPS}, (
            "steps of an attempt are counted wrongly"
        )
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
