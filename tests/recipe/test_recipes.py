"""The recipes that come with the package: what their heads say, the true size of their adapters, and that they run."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny_bases import BASES
from tiny_models import tiny_image_folder

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.cli.recipes import facts_of, said
from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.architectures import trainable_count
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.pretraining.networks import build_unet
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.recipe import load_pretrain_recipe, load_recipe, recipe_path
from dp_peft_diffusion.typed_fields import options

FOLDER = recipe_path("digits").parent
ARCHITECTURES = Path(__file__).parent / "architectures"
# A tiny base of the family that each recipe is for.
STAND_INS = {
    "bitfit-cifar10": "latent",
    "digits": "pixel_classes",
    "digits-captions": "stable_diffusion_1",
    "dp-finetune-camelyon17": "pixel_classes",
    "dp-finetune-cifar10": "pixel_classes",
    "dp-ldm-celeba64": "latent_vq",
    "dp-lora-celeba32": "latent",
    "dp-lora-celeba64": "latent_vq",
    "dp-lora-celebahq": "latent",
    "dp-lora-cifar10": "latent",
    "dp-lora-fmnist": "latent",
    "dp-lora-mnist": "latent",
    "dpdm-celeba32": "edm",
    "dpdm-fmnist": "edm",
    "dpdm-mnist": "edm",
    "mnist": "pixel_classes",
    "mnist-codes": "pixel_codes",
    "sd15-lora": "stable_diffusion_1",
    "sdxl-lora": "stable_diffusion_xl",
}
OWN_BASE = ("digits-captions",)  # the layer that it trains is in no tiny base, and its own is small
# One of each family trains in every run of the tests; the others differ from one of these in numbers only.
TRAINED = ("bitfit-cifar10", "dp-finetune-cifar10", "dp-lora-celeba64", "dp-lora-cifar10", "dpdm-mnist", "mnist")
TRAINED += ("mnist-codes", "sd15-lora", "sdxl-lora")
SMALLER = "--train_batch_size 4 --max_train_steps 1 --lr_warmup_steps 0 --micro_batch_size 2 --skip_self_check"
SMALLER += " --no_record_spending --sample_num_images 2 --sample_num_inference_steps 1"


def head(name: str) -> str:
    return "".join(line for line in recipe_path(name).read_text().splitlines(True) if line.startswith("#"))


def command(name: str) -> list[str]:
    """The words of a recipe's first line, after `# dp-peft`."""
    return shlex.split(head(name).partition("\n")[0])[2:]


NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PRIVATE = [name for name in NAMES if command(name)[0] == "train"]


def invoke(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="dp-peft")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def true_size(name: str) -> int:
    """N of the images that a recipe is meant for."""
    return int(number(re.search(r"N = ([\d,]+)", said(head(name), "Data"))[1]))


# ---- what the files say


def test_every_private_recipe_has_a_stand_in():
    assert PRIVATE == sorted(STAND_INS)
    assert {STAND_INS[name] for name in PRIVATE} == {STAND_INS[name] for name in TRAINED} <= set(BASES)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_of_a_recipe_names_it_and_its_command(name):
    words = command(name)
    assert words[0] in ("train", "pretrain") and words[1:3] == ["--recipe", name]


@pytest.mark.parametrize("name", PRIVATE)
def test_a_recipe_loads_and_says_every_key(name):
    recipe = load_recipe(recipe_path(name))
    table = yaml.safe_load(recipe_path(name).read_text())
    written = [(section, key) for section, keys in table.items() for key in keys]
    assert written == [(section, spec.name) for section, spec, _ in options(recipe)]


@pytest.mark.parametrize("name", PRIVATE)
def test_a_recipe_asks_on_the_command_line_for_what_it_does_not_know(name):
    recipe, words = load_recipe(recipe_path(name)), command(name)
    assert ("--dataset_name" in words) == (recipe.data.dataset_name == "PATH_TO_YOUR_IMAGES")
    own_base = recipe.model.pretrained_model_name_or_path == "PATH_TO_YOUR_BASE"
    assert ("--pretrained_model_name_or_path" in words) == own_base
    for made in re.findall(r"dp-peft pretrain --recipe (\S+)", head(name)):
        load_pretrain_recipe(recipe_path(made), {"dataset_name": "x"})


@pytest.mark.parametrize("name", PRIVATE)
def test_a_recipe_says_where_it_comes_from_whether_it_ran_and_what_it_costs(name):
    data, status, cost = (said(head(name), label) for label in ("Data", "Status", "Cost"))
    assert "N = " in data and cost
    assert re.match(r"never run in full|not measured|measured", status)
    assert not re.search(r"(^|[\s(`'\"])[/~]\w", recipe_path(name).read_text())  # no folder of one machine


@pytest.mark.parametrize("name", PRIVATE)
def test_the_arithmetic_of_a_head_is_right_and_is_what_the_recipe_does(name):
    recipe = load_recipe(recipe_path(name))
    size = true_size(name)
    text = re.sub(r"\n#\s+", " ", head(name))
    for epochs, n, batch, steps in re.findall(r"([\d,]+) \* ([\d,]+) / ([\d,]+) = ([\d,]+) updates", text):
        assert round(number(epochs) * number(n) / number(batch)) == number(steps) == recipe.train.max_train_steps
        assert (number(n), number(batch)) == (size, recipe.train.train_batch_size)
    for base, batch, rate in re.findall(r"([\d.]+e-\d) \* ([\d,]+) = ([\d.e-]+), as", text):
        assert math.isclose(number(base) * number(batch), number(rate), rel_tol=0.05)
        assert (number(batch), number(rate)) == (recipe.train.train_batch_size, recipe.train.learning_rate)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_recipe_fits_its_images(name):
    recipe, size = load_recipe(recipe_path(name)), true_size(name)
    assert recipe.train.train_batch_size <= size and recipe.privacy.delta < 1 / size


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIVATE)
def test_the_promise_of_a_recipe_has_a_price_at_its_true_size(name):
    recipe, size = load_recipe(recipe_path(name)), true_size(name)
    batch, steps = recipe.train.train_batch_size, recipe.train.max_train_steps
    mechanism = DPMechanism(sampling_prob=batch / size, steps=steps, expected_batch_size=batch, num_examples=size)
    noise = mechanism.calibrate(recipe.privacy.epsilon, recipe.privacy.delta).noise_multiplier
    assert 0.5 < noise < 50


# ---- the true architectures


def architecture(name: str) -> dict:
    return json.loads((ARCHITECTURES / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "net", "published"),
    [
        ("dp-lora-mnist", "dp-lora-mnist32", 56_880),
        ("dp-lora-cifar10", "dp-lora-cifar10", 428_032),
        ("dp-lora-celebahq", "cin256", 975_872),
    ],
)
def test_lora_is_as_large_as_the_released_code_has_it_but_for_the_output_projection_it_misses(name, net, published):
    adapter = load_recipe(recipe_path(name)).adapter
    released = replace(adapter, target_modules=("to_q", "to_k", "to_v"))
    assert trainable_count(architecture(net), released) == published
    ours = trainable_count(architecture(net), adapter)
    assert ours > published
    assert f"{published:,}" in head(name) and f"{ours:,}" in head(name)


@pytest.mark.parametrize(
    ("name", "net", "size"),
    [
        ("dp-lora-celeba64", "dp-lora-celeba64", 479_232),  # the paper's 0.47 million, rank 16 on a fused q, k, v
        ("sd15-lora", "stable-diffusion-v1-5", 797_184),
        ("sdxl-lora", "stable-diffusion-xl-base-1.0", 5_806_080),
        # The released code's 7,959,808 has the group norms in front of attention, 2 * 4,992 numbers.
        ("dp-ldm-celeba64", "dp-lora-celeba64", 7_959_808 - 2 * 4_992),
    ],
)
def test_an_adapter_is_as_large_as_the_paper_says(name, net, size):
    assert trainable_count(architecture(net), load_recipe(recipe_path(name)).adapter) == size
    assert f"{size:,}" in head(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bitfit-cifar10", 62_723),
        ("dp-ldm-celeba64", 7_949_824),
        ("dp-lora-celeba32", 356_352),
        ("dp-lora-celeba64", 479_232),
        ("dp-lora-cifar10", 237_568),
        ("dp-lora-fmnist", 237_568),
        ("dp-lora-mnist", 45_056),
    ],
)
def test_an_adapter_has_the_size_its_head_says_on_the_base_that_is_made_for_it(name, size):
    made = load_pretrain_recipe(recipe_path(facts_of(recipe_path(name))["base"]), {"dataset_name": "x"})
    with torch.device("meta"):
        unet = build_unet(made, made.resolution, made.latent_channels, None)
    config = dict(unet.config) | {"_class_name": "UNet2DModel"}
    assert trainable_count(config, load_recipe(recipe_path(name)).adapter) == size
    assert f"{size:,}" in head(name)


@pytest.mark.parametrize(("name", "net"), [("dpdm-mnist", "dpdm_mnist"), ("dpdm-celeba32", "dpdm_celeba32")])
def test_dpdm_trains_every_weight_of_a_net_of_about_the_papers_size(name, net):
    config = json.loads((FOLDER.parent / "dp_peft_diffusion/bases" / net / "unet/config.json").read_text())
    size = trainable_count(config, load_recipe(recipe_path(name)).adapter)
    paper = 1e6 * float(re.search(r"the paper says ([\d.]+) million", head(name))[1])
    assert abs(size - paper) < 0.05 * paper and f"{size:,}" in head(name)


def test_rank_12_on_separate_projections_is_as_large_as_rank_16_on_fused_ones():
    """Released: qkv is one layer d -> 3d, rank * (d + 3d), and proj_out rank * 2d; ours: four layers d -> d."""
    widths = [128, 256, 512] * 5 + [512]  # two attentions down and three up on each level, and one in the middle
    released = sum(16 * (d + 3 * d) + 16 * (d + d) for d in widths)
    assert released == sum(4 * 12 * (d + d) for d in widths) == 479_232


def test_the_size_of_the_released_celeba32_follows_from_its_other_two_configurations():
    widths = 479_232 / (16 * 4)  # of configuration qkv: rank 16, q, k, v alone
    assert 2_875_392 == 64 * 6 * widths, "r64"
    recipe = load_recipe(recipe_path("dp-lora-celeba32"))
    assert 16 * 6 * widths == 4 * recipe.adapter.rank * 2 * widths == 718_848, "k2, and this recipe on the same net"
    assert f"{widths:,.0f}" in head("dp-lora-celeba32") and "718,848" in head("dp-lora-celeba32")


def test_the_null_row_of_dpdm_stays_at_its_random_start_and_the_head_counts_it_out():
    for name in ("dpdm-mnist", "dpdm-fmnist"):
        recipe = load_recipe(recipe_path(name))
        base = load_base(recipe.model.pretrained_model_name_or_path, from_scratch=True)
        trainable = inject_adapter(base, recipe.adapter, 10).trainable.values()
        assert f"{sum(tensor.numel() for tensor in trainable):,} train with ten classes" in head(name)


# ---- that they run


def smaller(name: str, folder: Path) -> list[object]:
    """The command of a recipe on a tiny base and a few made-up images, in one small update."""
    recipe = load_recipe(recipe_path(name))
    own = recipe.model.pretrained_model_name_or_path
    base = own if name in OWN_BASE else BASES[STAND_INS[name]](folder / "base")
    images = tiny_image_folder(folder / "images", {"dark": 60, "light": 190}, 5)
    words = ["train", "--recipe", name, "--pretrained_model_name_or_path", base, "--dataset_name", images]
    words += SMALLER.split() + ["--output_dir", folder / "run"]
    words += ["--train_batch_size", 10] if recipe.adapter.kind == "code_moments" else []  # all images
    words += ["--gamma", 0.01] if recipe.privacy.clipping == "automatic" else []
    return words + (["--class_code_rank", 2] if recipe.adapter.class_code_rank else [])


@pytest.mark.parametrize("name", [name for name in PRIVATE if name not in TRAINED])
def test_a_recipe_is_planned(name, tmp_path):
    result = invoke(*smaller(name, tmp_path), "--dry_run")
    assert result.exit_code == 0, result.output
    assert f"epsilon = {load_recipe(recipe_path(name)).privacy.epsilon:g}" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow) for name in PRIVATE]
)
def test_a_recipe_is_planned_and_trains_a_step(name, tmp_path):
    result = invoke(*smaller(name, tmp_path))
    assert result.exit_code == 0, result.output
    epsilon = load_recipe(recipe_path(name)).privacy.epsilon
    assert f"epsilon = {epsilon:g}" in result.stdout
    certificate = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert certificate["guarantee"]["epsilon"] <= epsilon


@pytest.mark.parametrize("name", [name for name in PRIVATE if "PATH_TO_YOUR_IMAGES" in head(name)])
def test_a_recipe_without_its_images_says_what_to_type(name, tmp_path):
    result = invoke("train", "--recipe", name, "--output_dir", tmp_path / "run")
    assert result.exit_code == 2 and "--dataset_name" in result.stderr.splitlines()[-1]


# ---- dp-peft recipes


def test_every_recipe_is_listed_on_one_line():
    result = invoke("recipes")
    assert result.exit_code == 0
    for name in NAMES:
        lines = [line for line in result.stdout.splitlines() if line.split()[:1] == [name]]
        assert len(lines) == 1, name
        assert len(lines[0]) < 200
    digits = next(line for line in result.stdout.splitlines() if line.startswith("digits "))
    assert re.search(r"builtin:handwriting +scikit-learn's digits +1\.0 +measured$", digits)


def test_programs_get_the_same_rows():
    rows = json.loads(invoke("recipes", "--format", "json").stdout)
    assert [row["name"] for row in rows] == NAMES
    by_name = {row["name"]: row for row in rows}
    assert by_name["dp-lora-celeba64"]["base"] == "imagenet64" and by_name["dp-lora-celeba64"]["epsilon"] == 10.0
    assert by_name["sd15-lora"]["base"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert by_name["handwriting"]["command"] == "pretrain" and by_name["handwriting"]["epsilon"] is None
    assert [row for row in rows if row["command"] == "train" and None in row.values()] == []


def test_one_recipe_is_printed_as_it_is():
    assert invoke("recipes", "digits").stdout == recipe_path("digits").read_text()
    printed = json.loads(invoke("recipes", "digits", "--format", "json").stdout)
    assert printed["recipe"]["train"]["max_train_steps"] == load_recipe(recipe_path("digits")).train.max_train_steps


def test_a_mistyped_name_gets_a_suggestion():
    result = invoke("recipes", "dp-lora-mnits")
    assert result.exit_code == 2 and result.stdout == ""
    assert "dp-lora-mnist" in result.stderr and len(result.stderr.splitlines()) == 1
