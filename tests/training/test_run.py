"""The whole run through the Python surface, on a tiny base and images made here."""

import dataclasses
import json
import shutil
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2
from tiny_models import tiny_base_folder

from dp_peft_diffusion import attempt, batches, preparation, rehearsal, training
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, Train
from dp_peft_diffusion.training import FinishedRun, micro_batches, prepare, run, train, train_steps

KEY = bytes(range(16))
MAGIC = (13, 213, 77, 177)  # grey values of a pattern that only private images hold


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_base_folder(tmp_path_factory.mktemp("bases") / "tiny"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 images of two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("private") / "zanzibar-clinic"
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 255, (16, 16), dtype=np.uint8)
            pixels[:2, :2] = np.array(MAGIC, np.uint8).reshape(2, 2)
            Image.fromarray(pixels).save(folder / name / f"patient-{index}.png")
    (folder / "left" / "patient-3.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def recipe(base, images):
    return Recipe(
        model=Model(pretrained_model_name_or_path=base),
        data=Data(dataset_name=str(images)),
        adapter=Adapter(rank=2, target_modules=("to_q", "to_out.0"), class_code_rank=2),
        privacy=Privacy(epsilon=5.0, gamma=0.01),  # choosing gamma takes most of the seconds of such a run
        train=Train(
            train_batch_size=6,
            max_train_steps=3,
            noise_multiplicity=2,
            micro_batch_size=4,
            learning_rate=0.1,
            optimizer="sgd",
        ),
        sample=Sample(num_images=4, num_inference_steps=2),
    )


def changed(recipe, section, **values):
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def noisy_sums(monkeypatch, recipe, folder):
    """The noisy sum of every step of a run with a known key."""
    sums = []
    original = training.apply_update

    def spy(optimizer, parameters, noisy, expected_batch_size):
        sums.append(torch.cat([noisy[name].flatten() for name in parameters]).double())
        original(optimizer, parameters, noisy, expected_batch_size)

    monkeypatch.setattr(training, "apply_update", spy)
    # One key for all streams, also where the context is another: neighbours must see the same noise.
    monkeypatch.setattr(attempt, "attempt_key", lambda *arguments: KEY)
    train(recipe, folder)
    monkeypatch.undo()
    return sums


def test_a_run_ends_with_a_folder_that_verifies_and_a_private_one_beside_it(recipe, tmp_path):
    result = train(recipe, tmp_path / "run")
    report = verify(result.folder)
    assert report.ok and report.epsilon <= 5.0
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "privacy.json", "README.md", "recipe.yaml", "samples",
        "metrics.jsonl", "report.html",
    }  # fmt: skip
    assert stat.S_IMODE(result.private_folder.stat().st_mode) == 0o700
    assert not (result.private_folder / "key").exists()
    ledger = (result.private_folder / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in ledger] == [0, 1, 2]
    assert "patient-3.png" in (result.private_folder / "problems.csv").read_text()


def test_nothing_private_is_in_the_shareable_folder(recipe, images, tmp_path, capfd):
    result = train(recipe, tmp_path / "run")
    everything = b"".join(path.read_bytes() for path in result.folder.rglob("*") if path.is_file())
    shown = "".join(capfd.readouterr()).encode()
    for secret in (b"zanzibar", b"patient-", bytes(str(images.parent), "utf8")):
        assert secret not in everything
        assert secret == bytes(str(images.parent), "utf8") or b"patient-" not in shown
    for line in (result.folder / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"step", "learning_rate", "update_norm", "epsilon"}


def test_the_epsilon_of_the_last_step_is_the_promise_and_grows_until_there(recipe, tmp_path):
    result = train(recipe, tmp_path / "run")
    spent = [json.loads(line)["epsilon"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert spent == sorted(spent) and spent[-1] <= 5.0


def test_running_a_finished_run_again_spends_nothing(recipe, tmp_path):
    result = train(recipe, tmp_path / "run")
    before = (result.private_folder / "ledger.jsonl").read_bytes()
    with pytest.raises(FinishedRun):
        train(recipe, tmp_path / "run")
    assert (result.private_folder / "ledger.jsonl").read_bytes() == before


def test_a_folder_with_another_run_is_refused(recipe, tmp_path):
    train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="other options"):
        prepare(changed(recipe, "privacy", epsilon=6.0), tmp_path / "run")


def test_a_folder_with_other_files_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_told_without_a_traceback(recipe, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "record_metrics", full)
    with pytest.raises(RunError, match="disk is full"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nulling_one_record_moves_every_noisy_sum_by_at_most_the_bound(recipe, base, images, tmp_path, monkeypatch):
    """One step of the whole run on neighbours, with the noise frozen."""
    recipe = changed(recipe, "train", max_train_steps=1, train_batch_size=12)
    recipe = changed(recipe, "privacy", gamma=1e-6)
    neighbour = tmp_path / "neighbour"
    shutil.copytree(images, neighbour)
    (neighbour / "right" / "patient-2.png").write_bytes(b"")
    before = noisy_sums(monkeypatch, recipe, tmp_path / "a")
    after = noisy_sums(monkeypatch, changed(recipe, "data", dataset_name=str(neighbour)), tmp_path / "b")
    distances = [(x - y).norm().item() for x, y in zip(before, after, strict=True)]
    assert max(distances) <= 1.0 + 1e-4  # float32 of a sum with noise of some 10 units
    assert min(distances) > 0.5  # the record was there, and its gradient near the bound


def test_the_update_does_not_depend_on_the_micro_batch_size(recipe, tmp_path, monkeypatch):
    sums = [
        noisy_sums(monkeypatch, changed(recipe, "train", micro_batch_size=size), tmp_path / str(size))
        for size in (1, 5, 12)
    ]
    for other in sums[1:]:
        for x, y in zip(sums[0], other, strict=True):
            assert (x - y).norm() <= 1e-5 * x.norm()


def test_noise_has_its_standard_deviation_on_every_tensor_and_class_row(recipe, tmp_path, monkeypatch):
    """With records that are all null, a step is noise alone: also for class rows that nobody drew."""
    (tmp_path / "blank" / "left").mkdir(parents=True)
    (tmp_path / "blank" / "right").mkdir()
    for index in range(8):
        (tmp_path / "blank" / "left" / f"{index}.png").write_bytes(b"")
    recipe = changed(recipe, "data", dataset_name=str(tmp_path / "blank"))
    recipe = changed(recipe, "train", max_train_steps=60, train_batch_size=2)
    recipe = changed(recipe, "privacy", epsilon=None, noise_multiplier=2.0, max_grad_norm=3.0, gamma=0.1)
    prepared = prepare(recipe, tmp_path / "run")
    images = attempt.open_images(prepared, None)
    with prepared.run.locked():
        attempt.begin(prepared, images, KEY, None)
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(training, "apply_update", lambda o, p, noisy, b: seen.append(noisy))
    train_steps(prepared, images, KEY)
    assert set(seen[0]) == set(prepared.adapter.trainable)
    for name in seen[0]:
        values = torch.stack([noisy[name] for noisy in seen]).double() / 6.0
        squares, n = values.square().sum().item(), values.numel()
        assert chi2.sf(squares, n) > 5e-7 and chi2.cdf(squares, n) > 5e-7, name
        rows = values.flatten(2).square().sum(dim=(0, 2)) if values.dim() > 2 else values.square().sum(dim=0)
        assert (rows > 0).all(), name


def test_an_empty_batch_is_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "example_ids", lambda *arguments: np.zeros(0, np.int64))
    sums = noisy_sums(monkeypatch, recipe, tmp_path / "run")
    assert len(sums) == 3 and all(value.norm() > 0 for value in sums)


def test_a_dropped_label_is_the_null_row_and_the_others_are_the_rows_of_their_class(recipe, base, tmp_path):
    loaded = preparation.load_base(base)
    wanted = changed(changed(recipe, "adapter", class_rows=(10, 11)), "train", label_dropout=0.4, noise_multiplicity=50)
    wanted = changed(wanted, "data", class_names=("dark", "light"))
    labels = torch.arange(40) % 2
    examples = Examples(torch.zeros(40, 1, 1, 16, 16), labels, torch.ones(40), {})

    def rows_of(recipe):
        task = batches.make_task(recipe, loaded)
        batch = batches.make_batch(task, examples, np.arange(40), KEY, 3)
        return batches.conditions_of(task, batch)["class_labels"].view(40, 50)

    rows = rows_of(wanted)
    dropped = rows == loaded.layout.null_class
    assert dropped.double().mean().item() == pytest.approx(0.4, abs=5 * (0.24 / 2000) ** 0.5)
    assert torch.equal(rows[~dropped], (10 + labels)[:, None].expand(-1, 50)[~dropped])
    kept = rows_of(changed(wanted, "train", label_dropout=0.0))
    assert torch.equal(kept, (10 + labels)[:, None].expand(-1, 50))


def test_micro_batches_have_one_size_and_lose_nobody():
    for n in range(12):
        chunks = list(micro_batches(np.arange(n), 5))
        assert all(len(chunk) == 5 for chunk in chunks)
        joined = np.concatenate(chunks) if chunks else np.zeros(0)
        assert joined[joined >= 0].tolist() == list(range(n))


def test_without_privacy_nothing_is_exported_and_no_certificate_is_written(recipe, tmp_path):
    recipe = changed(recipe, "privacy", epsilon=None, no_privacy=True)
    recipe = changed(recipe, "data", declared_public=True)
    result = train(recipe, tmp_path / "run")
    assert result.certificate is None and not (tmp_path / "run").exists()
    assert not (result.folder / "privacy.json").exists()
    assert "WITHOUT privacy" in (result.folder / "README.md").read_text()


def test_an_export_that_changes_nothing_fails(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "apply_update", lambda *arguments: None)
    with pytest.raises(RunError, match="change nothing"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_written_recipe_is_complete_and_runs_again(recipe, tmp_path):
    result = train(changed(recipe, "privacy", gamma=None), tmp_path / "run")
    from dp_peft_diffusion.recipe import load_recipe

    resolved = load_recipe(result.private_folder / "recipe.yaml")
    assert resolved.privacy.gamma is not None and resolved.data.class_names == ("left", "right")
    assert resolved.adapter.class_rows == (10, 11)
    again = run(prepare(resolved, tmp_path / "again"))
    assert verify(again.folder).ok


def test_what_no_certificate_can_hold_is_refused_before_anything_is_spent(recipe, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "left").rename(tmp_path / "images" / ("l" * 250))
    with pytest.raises(UserError, match="cannot be exported.*class_names"):
        train(changed(recipe, "data", dataset_name=str(tmp_path / "images")), tmp_path / "run")
    assert not (tmp_path / "run.private").exists()


def test_more_than_one_process_is_refused_naming_the_limit(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(UserError, match="2 processes"):
        prepare(recipe, tmp_path / "run")


@pytest.mark.parametrize("slower, chosen", [("bf16", "no"), ("no", "bf16")])
def test_auto_precision_is_the_faster_one_and_stands_in_the_resolved_recipe(
    recipe, tmp_path, monkeypatch, slower, chosen
):
    clock, original = [0.0], rehearsal.make_loss

    def timed_loss(task, mixed_precision="no"):
        loss_fn = original(task, mixed_precision)

        def run_slowly(unet, batch):
            clock[0] += 2.0 if mixed_precision == slower else 1.0
            return loss_fn(unet, batch)

        return run_slowly

    monkeypatch.setattr(rehearsal, "make_loss", timed_loss)
    monkeypatch.setattr(rehearsal.time, "monotonic", lambda: clock[0])
    prepared = prepare(changed(recipe, "train", mixed_precision="auto"), tmp_path / "run")
    assert prepared.recipe.train.mixed_precision == chosen
    assert any("1.00 s" in note and "2.00 s" in note for note in prepared.notes)
    monkeypatch.setattr(rehearsal, "choose_precision", lambda *args: pytest.fail("measured again"))
    prepare(prepared.recipe, tmp_path / "again")


def test_a_bfloat16_loss_runs_the_network_in_bfloat16_and_itself_in_float32(recipe, tmp_path):
    prepared = prepare(recipe, tmp_path / "run")
    batch = batches.made_up_batch(prepared.task, 2)
    exact = batches.make_loss(prepared.task)(prepared.adapter.unet, batch)
    coarse = batches.make_loss(prepared.task, "bf16")(prepared.adapter.unet, batch)
    assert exact.dtype == coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse) and torch.allclose(exact, coarse, rtol=0.05)


def test_gradients_that_fail_the_self_check_stop_the_run_before_anything_is_spent(recipe, tmp_path, monkeypatch):
    original = rehearsal.make_loss

    def mixing_loss(*args):
        loss_fn = original(*args)
        return lambda unet, batch: loss_fn(unet, batch) * loss_fn(unet, batch).mean()

    monkeypatch.setattr(rehearsal, "make_loss", mixing_loss)
    with pytest.raises(UserError, match="self-check"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run.private").exists()


@pytest.mark.parametrize("skip, recorded", [(False, "passed"), (True, "skipped")])
def test_the_certificate_says_whether_gradients_were_checked(recipe, tmp_path, monkeypatch, skip, recorded):
    ran, original = [], rehearsal.check_gradients
    monkeypatch.setattr(rehearsal, "check_gradients", lambda *args: ran.append(1) or original(*args))
    result = train(changed(recipe, "train", skip_self_check=skip), tmp_path / "run")
    assert result.certificate["gradient_check"] == recorded and bool(ran) is not skip
    sentence = {name: text for name, _, text in verify(result.folder).levels}["gradients"]
    assert ("NOT CHECKED" in sentence) is skip


def test_a_bfloat16_forward_keeps_the_sum_in_float64_and_the_promise(recipe, tmp_path, monkeypatch):
    seen = []
    original = training.privatize
    monkeypatch.setattr(training, "privatize", lambda p, total, *a: seen.append(total) or original(p, total, *a))
    result = train(changed(recipe, "train", mixed_precision="bf16"), tmp_path / "run")
    assert verify(result.folder).ok
    assert all(tensor.dtype == torch.float64 for total in seen for tensor in total.values())
    norm = torch.sqrt(sum(tensor.square().sum() for tensor in seen[0].values()))
    assert 0 < norm <= 12.0  # twelve examples, each clipped to 1


def test_an_unconditional_base_ignores_labels_and_says_so(recipe, tmp_path):
    base = str(tiny_base_folder(tmp_path / "base", num_class_embeds=None))
    prepared = prepare(changed(recipe, "model", pretrained_model_name_or_path=base), tmp_path / "run")
    assert any("labels are ignored" in note for note in prepared.notes)
    assert prepared.recipe.data.class_names is None
    assert run(prepared).certificate is not None


def test_a_link_or_a_nameless_folder_is_refused_before_anything_is_spent(recipe, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for folder in (tmp_path / "link", "/"):
        with pytest.raises(UserError, match="output_dir"):
            prepare(recipe, folder)


def test_a_sampler_that_does_not_fit_is_refused_before_anything_is_spent(recipe, tmp_path):
    with pytest.raises(UserError, match="--scheduler"):
        prepare(changed(recipe, "sample", scheduler="UnCLIPScheduler"), tmp_path / "run")
    with pytest.raises(UserError, match="--scheduler"):
        prepare(changed(recipe, "sample", num_inference_steps=2000), tmp_path / "run")
    assert not (tmp_path / "run.private").exists()


def test_the_certificate_says_where_gamma_comes_from(recipe, tmp_path):
    chosen = train(changed(recipe, "privacy", gamma=None), tmp_path / "chosen").certificate
    given = train(recipe, tmp_path / "given").certificate
    assert chosen["public_inputs"]["gamma_source"] == "images sampled from the base"
    assert given["public_inputs"]["gamma_source"] == "given by the user, declared public"


def test_grids_do_not_tell_when_they_were_made(recipe, tmp_path):
    result = train(recipe, tmp_path / "run")
    assert len({path.stat().st_mtime for path in (result.folder / "samples").iterdir()}) == 1


@pytest.mark.parametrize(("delta", "batch"), [(0.5, 6), (1e-5, 13)])
def test_delta_above_one_over_n_and_batches_above_n_are_refused(recipe, tmp_path, delta, batch):
    recipe = changed(changed(recipe, "privacy", delta=delta), "train", train_batch_size=batch)
    with pytest.raises(UserError, match="delta|train_batch_size"):
        prepare(recipe, tmp_path / "run")
    assert not (tmp_path / "run.private").exists()


def test_an_adapter_that_could_not_be_exported_is_refused_before_anything_is_spent(recipe, tmp_path, monkeypatch):
    def too_large(folder):
        raise PrivacyError("adapter_model.safetensors is larger than 256 MiB.")

    monkeypatch.setattr(rehearsal, "check_adapter", too_large)
    with pytest.raises(UserError, match="cannot be exported: adapter_model.safetensors is larger.*--rank"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run.private").exists()
