"""Whole runs on every family of bases, and what the network is told of each example."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_bases import BASES
from tiny_runs import KEY, changed, tiny_recipe

from dp_peft_diffusion import attempt, training
from dp_peft_diffusion.batches import conditions_of, make_batch, make_task, public_batch
from dp_peft_diffusion.diffusion import records
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import class_prompts, condition_table
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.generation import generate
from dp_peft_diffusion.diffusion.text_encoding import TextEncoders
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.preparation import prepare
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.recipe import Recipe
from dp_peft_diffusion.training import run, train

CAPTIONS = ("cat", "dog", "cat dog", "a", "b", "c d", None, "dog dog")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> folder of its tiny base."""
    place = tmp_path_factory.mktemp("bases")
    return {name: make(place / name) for name, make in BASES.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Two updates on ten images of two classes; the base is still to be named."""
    wanted = tiny_recipe(tmp_path_factory.mktemp("recipe"))
    wanted = changed(wanted, "train", max_train_steps=2, label_dropout=0.3, checkpointing_steps=1)
    return changed(wanted, "sample", every=0, num_inference_steps=2)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Images with captions, one of them missing, as parquet."""
    rng, rows = np.random.default_rng(0), []
    for caption in CAPTIONS:
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(encoded, "png")
        rows.append({"image": {"bytes": encoded.getvalue(), "path": None}, "text": caption})
    path = tmp_path_factory.mktemp("captions") / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def on(recipe: Recipe, base, **train: object) -> Recipe:
    return changed(changed(recipe, "model", pretrained_model_name_or_path=str(base)), "train", **train)


def with_captions(recipe: Recipe, base, images, **train: object) -> Recipe:
    wanted = on(recipe, base, train_batch_size=4, **train)
    return changed(wanted, "data", dataset_name=str(images), caption_column="text")


def stop_after_the_first_update(monkeypatch, wanted: Recipe, folder) -> None:
    """Train until the first state is saved."""
    save = training.save_state

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_state", save_and_stop)
        train(wanted, folder, KEY)


@pytest.mark.parametrize("family", BASES)
def test_every_family_trains_exports_verifies_and_samples(recipe, bases, tmp_path, family):
    wanted = on(recipe, bases[family], skip_self_check=False, augmentation_multiplicity=2, noise_multiplicity=2)
    wanted = changed(wanted, "data", augmentations=("flip", "shift"), augmentation_variants=3)
    result = train(wanted, tmp_path / "run")
    assert verify(result.folder).ok
    assert not (result.private_folder / "cache").exists()
    images, labels = generate(result.folder, num_images=2, num_inference_steps=1, base=str(bases[family]))
    unlabelled = load_base(str(bases[family])).num_class_embeds is None and "stable" not in family
    assert images[0].size == (16, 16) and labels == (None if unlabelled else ["dark", "light"])
    assert result.certificate["public_inputs"].get("prompt_template") == (
        "a photo of {label}" if "stable" in family else None
    )


def test_a_net_from_scratch_trains_privately_and_is_its_own_base(recipe, bases, tmp_path):
    wanted = changed(on(recipe, bases["edm"]), "model", from_scratch=True)
    wanted = changed(changed(wanted, "adapter", kind="full", target_modules=None), "sample", scheduler="fidelity")
    result = train(wanted, tmp_path / "run")
    report = verify(result.folder)
    assert report.ok and "its own base" in dict((name, text) for name, _, text in report.levels)["adapter"]
    assert str(bases["edm"]) not in (result.folder / "privacy.json").read_text()
    images, _ = generate(result.folder, num_images=2, num_inference_steps=1)
    assert images[0].size == (16, 16)


def test_captions_are_told_where_they_are_not_dropped_and_the_empty_prompt_elsewhere(recipe, bases, captioned):
    for family in ("stable_diffusion_1", "stable_diffusion_xl"):
        base = load_base(str(bases[family]))
        wanted = with_captions(recipe, bases[family], captioned, noise_multiplicity=5, label_dropout=0.4)
        task, images = make_task(wanted, base), attempt.open_examples(wanted.data, base, None)
        ids = np.array([0, 1, 2, 6])
        batch = make_batch(task, images.read(ids), ids, KEY, 3)
        told, dropped = conditions_of(task, batch), batch["dropped"].flatten()
        assert dropped.any() and not dropped.all()
        for name, rows in told.items():
            assert rows.dtype == torch.float32
            for row, (is_dropped, i) in enumerate(zip(dropped.tolist(), np.repeat(ids, 5), strict=True)):
                own = torch.zeros_like(rows[row]) if i == 6 else base.text.encode([CAPTIONS[i]])[name][0].half().float()
                assert torch.equal(rows[row], base.text.null[name][0] if is_dropped else own), (name, row)
        assert batch["weights"].tolist() == [1, 1, 1, 0], "a row without a caption is the null record"


def test_prompts_are_made_of_class_names_and_the_last_row_is_the_empty_prompt(bases):
    base = load_base(str(bases["stable_diffusion_1"]))
    table = condition_table(base, None, ("cat", "dog"), "a {label} {label}")
    wanted = torch.cat(
        [base.text.encode(["a cat cat", "a dog dog"])["encoder_hidden_states"], *base.text.null.values()]
    )
    assert torch.equal(table.rows["encoder_hidden_states"], wanted) and table.null == 2
    assert class_prompts(None, "an x-ray") == ["an x-ray"]
    with pytest.raises(UserError, match="--caption_column"):
        class_prompts(None, "a photo of {label}")


def test_views_of_a_latent_base_are_its_cached_variants_and_pixels_are_changed_anew(recipe, bases):
    for family, variants in (("latent", 4), ("pixel_classes", 1)):
        base = load_base(str(bases[family]))
        wanted = changed(recipe, "data", augmentations=("flip", "color"), augmentation_variants=4)
        task = make_task(changed(wanted, "train", augmentation_multiplicity=3, noise_multiplicity=2), base)
        shape = base.input_shape if base.is_latent else (1, 16, 16)
        clean = torch.rand(2, variants, *shape, generator=torch.Generator().manual_seed(0)) - 0.5
        examples = Examples(clean, torch.zeros(2, dtype=torch.long), torch.ones(2), {})
        batches = [make_batch(task, examples, np.array([5, 7]), KEY, step) for step in (0, 1)]
        for batch in batches:
            assert batch["clean"].shape == (2, 3, *base.input_shape) and batch["levels"].shape == (2, 6)
            if base.is_latent:
                for i in range(2):
                    assert all(any(torch.equal(view, own) for own in clean[i]) for view in batch["clean"][i])
        assert not torch.equal(batches[0]["clean"], batches[1]["clean"])


@pytest.mark.parametrize("family", ["stable_diffusion_2", "latent"])
def test_sums_do_not_depend_on_the_micro_batch(recipe, bases, captioned, tmp_path, family):
    text = family.startswith("stable")
    wanted = with_captions(recipe, bases[family], captioned) if text else on(recipe, bases[family])
    prepared = prepare(changed(wanted, "train", noise_multiplicity=3), tmp_path / "run")
    images, ids = attempt.open_images(prepared, None), np.arange(6)
    for parameter in prepared.adapter.trainable.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    loss_fn = training.make_loss(prepared.task)

    def total(size: int) -> torch.Tensor:
        sums = prepared.clipper.zeros()
        for chunk in training.micro_batches(ids, size):
            batch = make_batch(prepared.task, images.read(chunk), chunk.clip(0), KEY, 0)
            for name, part in prepared.clipper.clipped_sum_of(loss_fn, batch).items():
                sums[name] += part
        return torch.cat([part.flatten() for part in sums.values()])

    whole = total(6)
    assert whole.norm() > 0
    for size in (1, 4):
        assert (total(size) - whole).norm() <= 1e-6 * whole.norm()


def test_a_run_with_captions_resumes_bit_for_bit_and_decodes_nothing_again(
    recipe, bases, captioned, tmp_path, monkeypatch
):
    wanted = with_captions(recipe, bases["stable_diffusion_1"], captioned)
    whole = train(wanted, tmp_path / "whole", KEY)
    stop_after_the_first_update(monkeypatch, wanted, tmp_path / "parts")
    monkeypatch.setattr(records, "decode", lambda *arguments: pytest.fail("decoded again"))
    resumed = run(prepare(wanted, tmp_path / "parts"), KEY)
    for name in ("adapter_model.safetensors", "metrics.jsonl", "samples/step-0002.png"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_made_up_captions_differ_so_that_the_self_check_sees_every_tensor(recipe, bases, captioned):
    base = load_base(str(bases["stable_diffusion_xl"]))
    task = make_task(with_captions(recipe, bases["stable_diffusion_xl"], captioned), base)
    batch = public_batch(task, torch.zeros(3, 3, 16, 16))
    assert len(batch["encoder_hidden_states"].flatten(1).unique(dim=0)) == 3


def test_what_a_base_cannot_do_is_refused_with_a_way_out(recipe, bases, captioned, tmp_path):
    for wanted, words in (
        (with_captions(recipe, bases["latent"], captioned), "--caption_column"),
        (changed(on(recipe, bases["pixel"]), "sample", prompts=("a",)), "--sample_prompts"),
        (changed(on(recipe, bases["stable_diffusion_1"]), "data", label_column=None), "--prompt_template"),
        (on(recipe, bases["edm"], timestep_distribution="uniform"), "log_normal"),
        (on(recipe, bases["edm"], snr_gamma=5.0), "--snr_gamma"),
        (changed(on(recipe, bases["pixel"]), "model", prediction_type="edm"), "--prediction_type"),
        (changed(on(recipe, "PATH_TO_YOUR_BASE"), "data"), "--pretrained_model_name_or_path PATH"),
        (changed(recipe, "data", dataset_name="PATH_TO_YOUR_IMAGES"), "--dataset_name PATH"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(wanted, tmp_path / "run")
        assert not (tmp_path / "run.private").exists()


def test_a_plan_reads_no_image(recipe, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "decode", lambda *arguments: pytest.fail("decoded"))
    prepared = prepare(on(recipe, bases["latent"]), tmp_path / "run")
    assert "N = 10" in training.plan_text(prepared) and list(tmp_path.iterdir()) == []


def test_metrics_tell_the_step_size_of_each_update(recipe, bases, tmp_path):
    wanted = on(recipe, bases["pixel"], max_train_steps=4, lr_warmup_steps=2, lr_scheduler="linear", learning_rate=0.5)
    result = train(wanted, tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == [0.25, 0.5, 0.5, 0.25]


def test_the_clipper_never_holds_text_encoders_or_the_autoencoder(recipe, bases, tmp_path):
    prepared = prepare(on(recipe, bases["stable_diffusion_xl"]), tmp_path / "run")
    frozen = [*prepared.base.vae.parameters(), *(p for e in prepared.base.text.encoders for p in e.parameters())]
    inside = {id(parameter) for parameter in prepared.clipper.model.parameters()}
    assert isinstance(prepared.clipper, PerSampleClipper)
    assert not any(parameter.requires_grad or id(parameter) in inside for parameter in frozen)


def test_the_same_noise_is_not_drawn_when_prompts_are_embedded_otherwise(recipe, bases, tmp_path, monkeypatch):
    """What the network is told of each class is computed anew when a run goes on."""
    wanted = on(recipe, bases["stable_diffusion_1"])
    stop_after_the_first_update(monkeypatch, wanted, tmp_path / "run")
    encode = TextEncoders.encode
    monkeypatch.setattr(
        TextEncoders, "encode", lambda self, prompts: {k: 1.01 * v for k, v in encode(self, prompts).items()}
    )
    with pytest.raises(UserError, match="the conditions changed"):
        prepare(wanted, tmp_path / "run")


def test_rows_named_for_images_without_labels_are_refused(recipe, bases, tmp_path):
    wanted = changed(on(recipe, bases["latent"]), "adapter", class_rows=(4, 5))
    with pytest.raises(UserError, match="--class_rows"):
        prepare(changed(wanted, "data", label_column=None), tmp_path / "run")


def test_a_micro_batch_that_does_not_fit_says_what_to_type(recipe, bases, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(PerSampleClipper, "clipped_sum_of", full)
    with pytest.raises(UserError, match="--micro_batch_size"):
        prepare(on(recipe, bases["pixel"]), tmp_path / "run")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_large_steps_are_exported_in_every_precision(recipe, bases, tmp_path, precision):
    """Outputs of two networks of the same weights, compared after they were magnified by a large adapter."""
    wanted = on(recipe, bases["edm"], mixed_precision=precision, optimizer="adam_bc", learning_rate=0.3)
    wanted = changed(wanted, "adapter", rank=3, lora_alpha=5.0)
    assert verify(train(wanted, tmp_path / "run").folder).ok
