"""`--adapter code_moments`: one whole run, what it shares, and what it refuses."""

import copy
import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from tiny_adapters import ONE_SUM
from tiny_bases import pixel_classes, pixel_codes
from tiny_models import tiny_image_folder
from tiny_runs import KEY, changed

from dp_peft_diffusion import training
from dp_peft_diffusion.cli import evaluation, main
from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.code_moments import draw, gaussians_of
from dp_peft_diffusion.diffusion.generation import generate, open_source
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.plan import plan_text
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.recipe import Adapter, Data, Model, Privacy, Recipe, Sample, load_recipe, validate
from dp_peft_diffusion.resolution import resolve
from dp_peft_diffusion.training import prepare, run, train

N, R = 12, 3  # images, and rows of each class
NAMES = ("dark", "light")
ROWS = "base_model.model.class_embedding.lora_embedding_A"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    pixel_codes(place / "base")
    tiny_image_folder(place / "images", {"dark": 60, "light": 190}, N // 2)
    return place


@pytest.fixture(scope="module")
def recipe(place):
    return Recipe(
        model=Model(pretrained_model_name_or_path=str(place / "base")),
        data=Data(dataset_name=str(place / "images")),
        adapter=Adapter(kind="code_moments", rows_per_class=R),
        privacy=dataclasses.replace(ONE_SUM["privacy"], epsilon=8.0),
        train=dataclasses.replace(ONE_SUM["train"], train_batch_size=N, micro_batch_size=5),
        sample=Sample(num_images=4, num_inference_steps=1),
    )


@pytest.fixture(scope="module")
def whole(recipe, place):
    """(what the plan said, the run that nobody interrupted)."""
    prepared = prepare(recipe, place / "run")
    return plan_text(prepared), run(prepared).folder


# ---- a run


def test_the_folder_verifies_and_says_how_its_rows_are_used(whole, place):
    _, folder = whole
    report = verify(folder)
    assert report.ok and report.epsilon <= 8
    found = validate(load_recipe(folder / "recipe.yaml")).adapter
    assert (found.kind, found.class_rows, found.rows_per_class) == ("code_moments", (1, 2), R)
    assert found.rows_in_turn == (1, 2, 3, 4, 5, 6)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {ROWS, ROWS[:-1] + "B"}
    used = tensors[ROWS].any(dim=0).nonzero().flatten().tolist()
    assert used == [1, 2, 3, 4, 5, 6] and torch.allclose(tensors[ROWS][:, used].norm(dim=0), torch.ones(6))


def test_the_card_lists_every_row_in_turn(whole):
    _, folder = whole
    card = (folder / "README.md").read_text()
    lines = re.findall(r"^class_rows = .*$", card, re.MULTILINE)
    assert len(lines) == 2
    told: dict = {}
    exec("\n".join(lines), told)
    assert told["class_rows"] == [1, 2, 3, 4, 5, 6]
    assert "sums of image codes of 2 classes; rows drawn: 3" in card


def test_the_plan_shows_one_gaussian_over_all_images(whole):
    plan, _ = whole
    assert "1 updates, Poisson q = 1" in plan and "code_moments on class_embedding: 30 trainable" in plan
    assert "clipping 30 of 30 trainable parameters in 1 tensors, by hooks" in plan


def test_the_plan_says_how_well_a_mean_code_is_known_and_offers_no_smaller_adapter(whole):
    plan, folder = whole
    sigma = promise_of(certificate.read(folder)).mechanism.noise_multiplier
    known_to = sigma / (N // 2) * np.hypot(0.15, np.hypot(0.7, 0.7)) / 0.7
    assert f"each number of the mean code is known to {known_to:.1g}; those of a code have root mean square 0.5" in plan
    assert "fewer" not in plan and "trainable parameters instead" not in plan


def test_the_price_is_that_of_the_gaussian_mechanism():
    """One update of everybody: delta(eps) = F(1/2s - eps s) - e^eps F(-1/2s - eps s) (Balle and Wang 2018)."""
    words = "plan --num_examples 55000 --train_batch_size 55000 --max_train_steps 1 --epsilon 1 --delta 1e-5"
    result = CliRunner().invoke(main, [*words.split(), "--format", "json"])
    (row,) = json.loads(result.stdout)["rows"]
    sigma, epsilon = row["noise_multiplier"], 1.0
    near, far = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
    delta = stats.norm.cdf(near) - np.exp(epsilon) * stats.norm.cdf(far)
    assert 0.98e-5 < delta <= 1e-5


def test_images_take_the_rows_of_their_class_in_turn(whole, place):
    _, folder = whole
    source = open_source(folder, base=str(place / "base"))
    assert source.conditions(range(8))["class_labels"].tolist() == [1, 2, 3, 4, 5, 6, 1, 2]
    assert [source.told(i)["label"] for i in range(4)] == ["dark", "light"] * 2
    light = open_source(folder, base=str(place / "base"), class_labels=["light"])
    assert light.conditions(range(4))["class_labels"].tolist() == [2, 4, 6, 2]
    twice = open_source(folder, base=str(place / "base"), class_labels=["light", "light", "dark"])
    assert twice.conditions(range(9))["class_labels"].tolist() == [2, 4, 1, 6, 2, 3, 4, 6, 5], "none twice before all"
    table = source.base.unet.class_embedding.weight
    assert all((table[i] - table[i + 2]).abs().max() > 1e-3 for i in range(1, 5)), "rows of a class differ"
    images, labels = generate(folder, num_images=3, num_inference_steps=1, base=str(place / "base"))
    assert labels == ["dark", "light", "dark"] and images[0].size == (16, 16)


def test_relabelled_images_are_the_same_images_with_the_classes_they_show(whole, place, tmp_path):
    _, folder = whole
    options = {"num_images": 6, "base": str(place / "base"), "num_inference_steps": 1, "seed": 2}
    plain, asked = generate(folder, **options)
    images, labels = generate(folder, relabel=True, **options)
    assert all(np.array_equal(a, b) for a, b in zip(plain, images, strict=True)) and asked == list(NAMES) * 3
    shown = open_source(folder, base=options["base"], relabel=True).shown
    assert labels == shown.classes(torch.from_numpy(np.stack([np.array(image)[None] for image in images])))
    assert labels != asked, "an untrained net draws what nobody asked for"
    drawn, positions = evaluation.sampled(
        open_source(folder, base=options["base"], relabel=True, num_inference_steps=1, seed=2), NAMES, 6
    )
    assert [NAMES[place] for place in positions] == labels and np.array_equal(drawn[0, 0], np.array(images[0]))
    for weight in (0.0, -1.0):
        with pytest.raises(UserError, match="--relabel.*--adapter_weight above 0"):
            open_source(folder, base=options["base"], relabel=True, weights=[weight])
    words = ["--base", options["base"], "--num_images", "6", "--num_inference_steps", "1", "--seed", "2", "--relabel"]
    out = ["--output_dir", str(tmp_path / "out")]
    assert CliRunner().invoke(main, ["sample", "--adapter", str(folder), *words, *out]).exit_code == 0
    with open(tmp_path / "out" / "images" / "metadata.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == labels


def test_without_noise_rows_are_drawn_from_the_moments_of_the_images_codes(recipe, place, tmp_path):
    """From the files of the images to the rows of the export, by numpy and the encoder alone."""
    public = dataclasses.replace(
        changed(recipe, "data", declared_public=True), privacy=Privacy(epsilon=None, no_privacy=True, clipping="flat")
    )
    folder = train(public, tmp_path / "run").folder
    base, sums = load_base(str(place / "base")), []
    (w0, w1, w2) = inject_adapter(base, Adapter(kind="code_moments"), 2).class_rows.weights
    for name in NAMES:
        files = sorted((place / "images" / name).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file), np.float32)[None] for file in files]) / 127.5 - 1
        with torch.no_grad():
            codes = base.codes(torch.from_numpy(pixels)).double().numpy()
        i, j = np.triu_indices(4)
        half = w2 * codes[:, i] * codes[:, j] * np.where(i == j, 1, 2**0.5)
        sums.append(np.concatenate([np.full((len(codes), 1), w0), w1 * codes, half], axis=1).sum(axis=0) / N)
    drawn = draw(*gaussians_of(torch.from_numpy(np.stack(sums)).float().double(), (w0, w1, w2), 0.0), R)
    rows = load_file(folder / "adapter_model.safetensors")[ROWS]
    for j in range(R):
        for c in range(2):
            assert torch.allclose(rows[:, 1 + j * 2 + c].double(), drawn[c, j], atol=2e-3), (j, c)


def test_a_run_stopped_before_its_export_ends_as_if_it_had_not_been(recipe, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop(*arguments):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "export", stop)
        train(recipe, tmp_path / "run", KEY)
    whole, again = train(recipe, tmp_path / "whole", KEY), train(recipe, tmp_path / "run", KEY)
    for name in ("adapter_model.safetensors", "metrics.jsonl", "samples/step-0001.png"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert len((again.private_folder / "ledger.jsonl").read_text().splitlines()) == 1


def test_rows_reckon_with_the_noise_that_the_run_has(recipe, tmp_path):
    prepared = prepare(changed(recipe, "train", skip_self_check=True), tmp_path / "run")
    wanted = prepared.promise.mechanism.noise_stddev / N
    assert prepared.adapter.class_rows.noise_of_mean == wanted > 0
    assert np.hypot.reduce(prepared.adapter.class_rows.weights) == pytest.approx(1.0, rel=2e-5)
    tighter = prepare(changed(changed(recipe, "privacy", max_grad_norm=0.1), "train", skip_self_check=True), tmp_path)
    assert np.hypot.reduce(tighter.adapter.class_rows.weights) == pytest.approx(0.1, rel=2e-5)
    assert tighter.adapter.class_rows.noise_of_mean == pytest.approx(0.1 * wanted)


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "value", "typed"),
    [
        ("privacy", {"clipping": "automatic"}, "--clipping flat"),
        ("train", {"optimizer": "adam"}, "--optimizer sgd"),
        ("train", {"max_train_steps": 2}, "--max_train_steps 1"),
        ("train", {"label_dropout": 0.1}, "--label_dropout 0"),
        ("train", {"noise_multiplicity": 2}, "--noise_multiplicity 1"),
        ("train", {"learning_rate": 0.5}, "--learning_rate 1"),
        ("train", {"momentum": 0.5}, "--momentum 0"),
        ("train", {"ema_decay": 0.5}, "--ema_decay 0"),
        ("train", {"mixed_precision": "bf16"}, "--mixed_precision no"),
        ("adapter", {"class_code_rank": 4}, "--class_code_rank none"),
        ("adapter", {"rank": 8}, "--rank 4"),
    ],
)
def test_an_option_of_descent_is_refused_with_what_to_type(recipe, section, value, typed):
    assert validate(recipe) is recipe
    with pytest.raises(UserError, match=rf"one noisy sum, and no steps of descent. Type {typed}, or start"):
        validate(changed(recipe, section, **value))


def test_a_batch_of_some_images_is_refused_since_it_pays_as_much_for_more_noise(recipe, tmp_path):
    with pytest.raises(UserError, match=f"over all images it has the least noise.*--train_batch_size {N}"):
        prepare(changed(recipe, "train", train_batch_size=N - 1), tmp_path / "run")


def test_rows_per_class_is_no_option_of_other_kinds(recipe):
    with pytest.raises(UserError, match="--rows_per_class .* belongs to --adapter code_moments"):
        validate(changed(recipe, "adapter", kind="class_rows"))


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


def test_all_spare_rows_are_taken_unless_fewer_are_asked_for(recipe, base):
    whole = changed(recipe, "adapter", rows_per_class=None)
    for names, each in ((NAMES, 15), (tuple("abcdefg"), 4), (tuple(map(str, range(30))), 1)):
        found = resolve(whole, base, names)[0].adapter
        assert (found.class_rows, found.rows_per_class) == (tuple(range(1, 1 + len(names))), each)
        assert max(found.rows_in_turn) == len(names) * each <= 30
    assert resolve(recipe, base, NAMES)[0].adapter.rows_per_class == R
    resolved = resolve(recipe, base, NAMES)[0]
    assert resolve(resolved, base, NAMES)[0] == resolved, "a resolved recipe runs again as it stands"


@pytest.mark.parametrize(
    ("adapter", "names", "message"),
    [
        ({"rows_per_class": 16}, NAMES, "--rows_per_class 16: .* 30 spare class rows, 15 .* Take 15 or fewer"),
        ({"class_rows": (3, 4)}, NAMES, "takes all spare class rows. Leave --class_rows out"),
        ({}, None, "needs a class for every image. Give --label_column"),
        ({}, tuple(map(str, range(31))), "30 spare class rows, fewer than the 31 classes"),
        ({"class_rows": tuple(range(1, 32))}, tuple(map(str, range(31))), "fewer than the 31 classes"),
    ],
)
def test_rows_that_are_not_there_are_refused(recipe, base, adapter, names, message):
    with pytest.raises(UserError, match=message):
        resolve(changed(recipe, "adapter", **adapter), base, names)


def test_a_base_that_is_told_no_codes_is_refused(recipe, tmp_path):
    other = load_base(str(pixel_classes(tmp_path / "base")))
    with pytest.raises(UserError, match="has no encoder.*builtin:handwriting_codes"):
        resolve(recipe, other, NAMES)
    with pytest.raises(UserError, match="is told no codes of images"):
        inject_adapter(other, Adapter(kind="code_moments"), 2)


def test_class_rows_of_a_base_that_is_told_codes_move_where_its_codes_do(base):
    adapter = inject_adapter(base, Adapter(kind="class_rows", class_code_rank=4), 2)
    directions = adapter.class_rows.directions.double()
    rows = base.codes.rows(torch.eye(4)).detach().double()
    inside = directions @ torch.linalg.pinv(rows) @ rows
    assert torch.allclose(inside, directions, atol=1e-5) and directions.norm(dim=1).min() > 0
    copied = copy.deepcopy(adapter.unet)
    assert set(dict(copied.named_parameters())) >= {"class_embedding.codes.weight"}
