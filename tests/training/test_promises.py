"""Every kind of promise, from the recipe to the verified folder."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_runs import KEY, changed, tiny_recipe

from dp_peft_diffusion import attempt, training
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.training import plan_text, prepare, run, train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return changed(tiny_recipe(tmp_path_factory.mktemp("tiny")), "train", max_train_steps=2)


def encoded(level):
    pixels = np.random.default_rng(level).integers(0, 255, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def patients(recipe, tmp_path_factory):
    """12 images of 3 patients, 4 each, as a parquet file; the recipe that protects patients."""
    path = tmp_path_factory.mktemp("patients") / "scans.parquet"
    rows = {"image": [encoded(i) for i in range(12)], "label": [0, 1] * 6, "patient": list("aabbccaabbcc")}
    pq.write_table(pa.table(rows), path)
    return changed(
        recipe,
        "data",
        dataset_name=str(path),
        class_names=("dark", "light"),
        group_column="patient",
        max_examples_per_group=3,
    )


def test_a_promise_for_patients_takes_more_noise_than_one_for_images(recipe, patients, tmp_path):
    wanted = changed(patients, "privacy", noise_multiplier=None, epsilon=8.0)
    wanted = changed(wanted, "train", train_batch_size=12)  # a plain Gaussian, which is priced at once
    single = changed(wanted, "data", group_column=None, max_examples_per_group=None)
    noise = prepare(single, tmp_path / "single").mechanism.noise_multiplier
    prepared = prepare(wanted, tmp_path / "run")
    assert prepared.mechanism.noise_multiplier > 1.5 * noise
    weights = attempt.open_images(prepared, None).read(np.arange(12)).weights
    assert int((weights > 0).sum()) == 9  # three patients, three images each
    result = run(prepared)
    guarantee = result.certificate["guarantee"]
    assert guarantee["epsilon"] == 8.0 and guarantee["epsilon_per_image"] < 8.0
    assert "3" in result.certificate["unit"] and verify(result.folder).ok
    assert "patient" in plan_text(prepared) and "at most 3 images" in plan_text(prepared)


def test_without_one_patient_every_clipped_sum_moves_by_at_most_that_many_bounds(patients, tmp_path, monkeypatch):
    """The whole loop on neighbours, under the same draws; the noise is left out to see the sums."""

    def sums(recipe, name):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(attempt, "attempt_key", lambda *arguments: KEY)
            patch.setattr(training, "apply_update", lambda *arguments: None)
            patch.setattr(training, "export", lambda *arguments: None)
            patch.setattr(training, "add_noise", lambda total, *a: seen.append(total) or total)
            run(prepare(recipe, tmp_path / name))
        return [torch.cat([value.flatten() for value in total.values()]) for total in seen]

    wanted = changed(changed(patients, "privacy", gamma=1e-9), "train", train_batch_size=11, max_train_steps=2)
    table = pq.read_table(patients.data.dataset_name).to_pydict()
    table["image"] = [b"" if who == "b" else image for image, who in zip(table["image"], table["patient"], strict=True)]
    pq.write_table(pa.table(table), tmp_path / "without.parquet")
    without = changed(wanted, "data", dataset_name=str(tmp_path / "without.parquet"))
    moved = [(a - b).norm().item() for a, b in zip(sums(wanted, "a"), sums(without, "b"), strict=True)]
    assert max(moved) <= 3 * (1 + 1e-9) and max(moved) > 1.0  # more than one image would move them


def test_under_add_or_remove_one_nothing_says_how_many_images_there_are(recipe, tmp_path):
    wanted = changed(recipe, "privacy", neighboring_relation="add_or_remove_one", sampling_prob=0.5)
    prepared = prepare(wanted, tmp_path / "run")
    assert prepared.mechanism.num_examples is None and prepared.mechanism.sampling_prob == 0.5
    assert "10" not in plan_text(prepared).split("Public")[1].split("\n")[0]
    result = run(prepared)
    assert "num_examples" not in result.certificate["public_inputs"] and verify(result.folder).ok
    assert "not public" in result.certificate["statement"]


def test_a_batch_above_n_is_no_error_where_n_is_private(recipe, tmp_path):
    wanted = changed(recipe, "privacy", neighboring_relation="add_or_remove_one", sampling_prob=0.5)
    assert prepare(changed(wanted, "train", train_batch_size=5000), tmp_path / "run").mechanism.num_examples is None


def test_replace_one_costs_what_the_zero_out_promise_says_it_costs(recipe, tmp_path):
    beside = train(recipe, tmp_path / "zero").certificate["guarantee"]["epsilon_replace_one"]
    result = train(changed(recipe, "privacy", neighboring_relation="replace_one"), tmp_path / "replace")
    assert result.certificate["guarantee"]["epsilon"] == beside and verify(result.folder).ok
    assert result.certificate["mechanism"]["noise_multiplier"] == 2.0  # invariant 11: whatever the relation


def test_a_truncated_batch_never_holds_more_images_than_its_cap(recipe, tmp_path, monkeypatch):
    sizes, original = [], training.micro_batches
    monkeypatch.setattr(training, "micro_batches", lambda ids, size: sizes.append(len(ids)) or original(ids, size))
    wanted = changed(changed(recipe, "privacy", truncated_batch_size=6), "train", max_train_steps=12)
    result = train(wanted, tmp_path / "run")
    assert len(sizes) == 12 and max(sizes) == 6
    assert result.certificate["mechanism"]["truncated_batch_size"] == 6 and verify(result.folder).ok
    assert "cut at 6" in plan_text(prepare(wanted, tmp_path / "plan"))


def test_declared_tuning_runs_are_in_the_price_and_on_the_certificate(recipe, tmp_path):
    ten = train(changed(recipe, "privacy", tuning_runs=10), tmp_path / "ten")
    twenty_steps = prepare(changed(recipe, "train", max_train_steps=20), tmp_path / "steps").promise
    assert ten.certificate["guarantee"]["epsilon"] == pytest.approx(twenty_steps.epsilon, rel=1e-3)
    assert ten.certificate["tuning"] == {"runs": 10, "priced": "composition"} and verify(ten.folder).ok
    assert "undeclared" not in json.dumps(ten.certificate["tuning"])


def test_a_prior_release_is_priced_again_and_the_total_is_promised(recipe, tmp_path):
    everyone = changed(recipe, "train", train_batch_size=10)  # a plain Gaussian, which is priced at once
    first = train(changed(everyone, "privacy", noise_multiplier=8.0), tmp_path / "first")
    spent = first.certificate["guarantee"]["epsilon"]
    wanted = changed(everyone, "privacy", noise_multiplier=None, epsilon=2 * spent, prior_event=(str(first.folder),))
    alone = changed(wanted, "privacy", prior_event=None)
    prepared = prepare(wanted, tmp_path / "second")
    assert prepared.mechanism.noise_multiplier > prepare(alone, tmp_path / "alone").mechanism.noise_multiplier
    assert "counted in epsilon" in plan_text(prepared)
    second = run(prepared)
    (listed,) = second.certificate["other_releases"]
    assert listed["mechanism"]["noise_multiplier"] == 8.0 and verify(second.folder).ok
    assert any("without looking at the releases" in text for text in second.certificate["assumptions"])
    assert str(tmp_path) not in (second.folder / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="alone cost epsilon"):
        prepare(changed(wanted, "privacy", epsilon=spent / 2), tmp_path / "third")
    with pytest.raises(UserError, match="do not add up"):
        prepare(changed(wanted, "privacy", neighboring_relation="replace_one"), tmp_path / "fourth")
