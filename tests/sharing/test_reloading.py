"""What is exported is loaded again with stock tools, and a run whose files do not come back publishes nothing."""

import ast
import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_bases
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bases import BASES
from tiny_models import tiny_unet

from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.conditions import condition_table
from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.recipe import ADAPTER_KINDS, Adapter
from dp_peft_diffusion.sharing import reloading, stock_reload
from dp_peft_diffusion.sharing.reloading import Reloaded, check_reload, judge, layers_that_train, made_up_inputs
from tests.sharing.exported_adapters import DOCUMENT, LORA_KINDS, exported, load, trained, write

FRESH = reloading.in_fresh_process
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT = ("stable_diffusion_1", "stable_diffusion_2", "stable_diffusion_xl")
PAIRS = [(family, kind) for family in BASES for kind in ADAPTER_KINDS]
FAST = {("pixel", "vera"), ("edm", "attention"), ("latent_vq", "oft"), ("stable_diffusion_xl", "dora")}
FAST |= {("pixel_classes", kind) for kind in ("lora_conv", "bitfit", "norm", "class_rows", "full")}
FAST |= {("pixel_codes", "code_moments")}
FAST |= {("latent", kind) for kind in ("ia3", "lokr")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def here(monkeypatch):
    """Stock tools in this process, which saves the seconds that a fresh one takes to import them."""
    monkeypatch.setattr(reloading, "in_fresh_process", stock_reload.reload)


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory):
    """A LoRA on Stable Diffusion, made once."""
    return exported(bases, "stable_diffusion_1", tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def adapter_folder(made, tmp_path):
    """(base, adapter, conditions, folder); the folder is a copy of its own."""
    return *made[:3], shutil.copytree(made[3], tmp_path / "run")


@pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS]
)
def test_every_kind_on_every_family_comes_back_from_stock_tools(here, bases, tmp_path, family, kind):
    text, labelled = family in TEXT, family in ("pixel_classes", "pixel_codes", "edm", "latent")
    if (kind == "full" and text) or (kind == "class_rows" and not labelled):
        pytest.skip("there is no such adapter: the test of adapters shows the refusal")
    if kind == "code_moments" and family != "pixel_codes":
        pytest.skip("there is no such adapter: the test of adapters shows the refusal")
    base, adapter, conditions, folder = exported(bases, family, tmp_path / "run", kind)
    found = check_reload(base, adapter, conditions, folder, DOCUMENT)
    loaders = {"whole"} if kind == "full" else {"peft", "diffusers"} if text and kind in LORA_KINDS else {"peft"}
    assert set(found.layers) == loaders
    assert found.difference < 1e-6 and found.change > 1e-4
    if kind != "full":
        assert set(found.layers.values()) == {len(layers_that_train(base, adapter))}


@pytest.mark.parametrize("family", ["pixel_classes", "edm"])
def test_a_net_from_scratch_comes_back_from_stock_diffusers(here, bases, tmp_path, family):
    load(bases, family)
    base = load(bases, family, from_scratch=True)
    adapter, conditions = trained(base, Adapter(kind="full"))
    found = check_reload(base, adapter, conditions, write(base, adapter, tmp_path / "run"), None)
    assert found.layers.keys() == {"whole"} and found.difference < 1e-6 and found.change > 1e-3


@pytest.mark.parametrize("code_rank", [None, 2])
def test_class_rows_travel_whole_or_as_lora(here, bases, tmp_path, code_rank):
    spec = {"target_modules": ("to_q",), "class_code_rank": code_rank}
    base, adapter, conditions, folder = exported(bases, "pixel_classes", tmp_path / "run", **spec)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["trainable_token_indices"] is None) == (code_rank is not None)
    assert "class_embedding" in layers_that_train(base, adapter)
    assert check_reload(base, adapter, conditions, folder, None).difference < 1e-6
    adapter.class_rows.codes.weight.data[0] += 0.1
    with pytest.raises(RunError, match="stock peft, differ from the trained"):
        check_reload(base, adapter, conditions, folder, None)


@pytest.mark.parametrize("code_rank", [None, 2])
def test_weights_so_large_that_they_magnify_the_rounding_of_float32_come_back_all_the_same(
    here, bases, tmp_path, code_rank
):
    base = load(bases, "pixel_classes")
    spec = Adapter(rank=2, lora_alpha=6.1, class_code_rank=code_rank)
    adapter, conditions = trained(base, spec, size=1000.0)
    folder = write(base, adapter, tmp_path / "run")
    assert check_reload(base, adapter, conditions, folder, None).difference < 1e-9


def test_class_rows_other_than_those_of_the_trained_net_are_caught(here, bases, tmp_path):
    base = load(bases, "pixel_classes")
    adapter, conditions = trained(base, Adapter(rank=2))
    stale = copy.deepcopy(adapter.class_rows)
    stale.codes.weight.data += 1.0
    adapter = dataclasses.replace(adapter, class_rows=stale)  # which the exporter reads
    with pytest.raises(RunError, match="stock peft, differ from the trained"):
        check_reload(base, adapter, conditions, write(base, adapter, tmp_path / "run"), None)


MANY = 150  # classes, more than there are conditions


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """A base with a class table of `MANY` spare rows and a null row."""
    folder = tmp_path_factory.mktemp("many") / "base"
    tiny_bases.write(folder, unet=tiny_bases.tiny_unet2d(3, MANY + 6), scheduler=DDPMScheduler())
    layout = {"pixel_packing": 1, "null_class": MANY, "spare_classes": [0, MANY], "class_code_rank": 4}
    (folder / "dp_peft_base.json").write_text(json.dumps(layout))
    return load_base(str(folder))


@pytest.mark.parametrize(
    ("spec", "tensor"),
    [
        (Adapter(rank=2, target_modules=("to_q",), class_code_rank=4), "class_embedding.lora_embedding_A"),
        (Adapter(rank=2, target_modules=("to_q",)), "class_embedding.token_adapter.trainable_tokens_delta"),
        (Adapter(kind="ia3", target_modules=("to_q",)), "class_embedding.weight"),
        (Adapter(kind="norm"), "class_embedding.ln_tuning_layers.weight"),
        (Adapter(kind="full"), "class_embedding.weight"),
    ],
)
def test_no_row_of_a_large_class_table_comes_back_otherwise(here, many_rows, tmp_path, spec, tensor):
    base, row = many_rows, 75
    adapter = inject_adapter(base, spec, MANY)
    for parameter in adapter.trainable.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    conditions = condition_table(base, adapter.class_rows.rows.tolist(), [f"{i}" for i in range(MANY)], "{label}")
    assert row not in made_up_inputs(base, conditions)["told.class_labels"], "its outputs would tell"
    folder = write(base, adapter, tmp_path / "run")
    assert check_reload(base, adapter, conditions, folder, None).difference < 1e-6
    whole = spec.kind == "full"
    path = folder / ("unet/diffusion_pytorch_model.safetensors" if whole else "adapter_model.safetensors")
    tensors = load_file(path)
    name = tensor if whole else f"base_model.model.{tensor}"
    assert name in tensors, sorted(tensors)
    tensors[name].movedim(-1 if tensor.endswith("_A") else 0, 0)[row] += 0.01
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RunError, match=f"row {row} of the class table .* differs from the trained by"):
        check_reload(base, adapter, conditions, folder, None)


def test_no_row_of_a_later_draw_comes_back_otherwise(here, bases, tmp_path):
    base, adapter, conditions, folder = exported(
        bases, "pixel_codes", tmp_path / "run", "code_moments", rows_per_class=3
    )
    assert made_up_inputs(base, conditions)["told.class_labels"].max() == 2, "its outputs would tell"
    assert check_reload(base, adapter, conditions, folder, None).difference < 1e-6
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.class_embedding.lora_embedding_A"][:, 6] += 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="row 6 of the class table .* differs from the trained by"):
        check_reload(base, adapter, conditions, folder, None)


def test_a_fresh_process_with_stock_tools_says_what_it_loaded(monkeypatch, adapter_folder):
    monkeypatch.setattr(reloading, "in_fresh_process", FRESH)
    base, adapter, conditions, folder = adapter_folder
    found = check_reload(base, adapter, conditions, folder, DOCUMENT)
    assert found.layers == {"peft": 32, "diffusers": 32}
    assert found.sentence.startswith(
        "reloaded with stock peft: 32 layers; stock diffusers: 32 layers; outputs differ by"
    )
    given = reloading.made_up_inputs(base, conditions)
    by_hand = copy.deepcopy(base.unet)
    with torch.no_grad():
        for name, product in products(folder).items():
            by_hand.get_parameter(name).add_(product)
    moved = stock_reload.answers(by_hand, given) - stock_reload.answers(copy.deepcopy(base.unet), given)
    assert found.change == pytest.approx(moved.abs().max().item(), rel=1e-4)


def products(folder):
    """Weight of the base -> B A, of a LoRA on linear layers."""
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {name: name.replace("lora_A", "lora_B") for name in tensors if name.endswith("lora_A.weight")}
    return {
        a.removeprefix("base_model.model.").replace("lora_A.", ""): tensors[b] @ tensors[a] for a, b in pairs.items()
    }


def ended_by(monkeypatch, tmp_path, code):
    """A fresh process that runs other code."""
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(stock_reload, "__file__", str(script))
    return FRESH({"tensors": str(tmp_path / "tensors.safetensors")})


def test_a_killed_process_loses_nothing_and_says_so(monkeypatch, tmp_path):
    with pytest.raises(RunError, match=r"killed by signal 9 .*memory.*Nothing was published.*the same command"):
        ended_by(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 9)")


def test_a_process_that_fails_is_quoted(monkeypatch, tmp_path):
    with pytest.raises(RunError, match=r"exit code 1: .*ModuleNotFoundError: No module named 'no_such'.*Nothing was"):
        ended_by(monkeypatch, tmp_path, "import no_such")


def test_the_process_sees_no_secret_of_the_environment_and_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    seen = ended_by(monkeypatch, tmp_path, "import json, os; print('hello'); print(json.dumps(dict(os.environ)))")
    assert "HF_TOKEN" not in seen and seen["HF_HUB_OFFLINE"] == "1" and seen["PYTHONPATH"] == "/somewhere"
    assert set(seen) <= {*reloading.KEPT, "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "LC_CTYPE"}


def test_the_script_imports_stock_tools_and_nothing_of_this_package():
    tree = ast.parse(Path(stock_reload.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tools = {"torch", "diffusers", "peft", "safetensors", "json", "sys", "pathlib", "typing"}
    assert {name.split(".")[0] for name in imported} == tools


def rewritten(folder, change, metadata=True):
    """Other tensors in diffusers' file, with or without its metadata."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        said = file.metadata() if metadata else {"format": "pt"}
    save_file(change(load_file(folder / LORA_FILE)), folder / LORA_FILE, said)


def test_a_wrong_prefix_is_caught_by_our_checks_and_by_the_count_of_layers(here, adapter_folder):
    base, adapter, conditions, folder = adapter_folder
    rewritten(folder, lambda tensors: {name.replace("unet.", "transformer.", 1): x for name, x in tensors.items()})
    with pytest.raises(RunError, match=r"would be refused: .*does not begin with 'unet\.'.*Nothing was published"):
        check_reload(base, adapter, conditions, folder, DOCUMENT)
    with pytest.raises(RunError, match="stock diffusers injects 0 layers of the export, and 32 trained"):
        check_reload(base, adapter, conditions, folder, None)


def test_missing_metadata_are_caught(here, adapter_folder):
    base, adapter, conditions, folder = adapter_folder
    rewritten(folder, lambda tensors: tensors, metadata=False)
    with pytest.raises(RunError, match="would be refused: the metadata of pytorch_lora_weights"):
        check_reload(base, adapter, conditions, folder, DOCUMENT)


def test_other_numbers_in_diffusers_file_are_caught_by_our_checks_and_by_the_outputs(here, adapter_folder):
    base, adapter, conditions, folder = adapter_folder
    rewritten(folder, lambda tensors: {name: 1.01 * x for name, x in tensors.items()})
    with pytest.raises(RunError, match="holds other numbers"):
        check_reload(base, adapter, conditions, folder, DOCUMENT)
    with pytest.raises(RunError, match="loaded with stock diffusers, differ from the trained"):
        check_reload(base, adapter, conditions, folder, None)


def test_half_of_the_layers_is_caught_by_the_count(here, adapter_folder):
    base, adapter, conditions, folder = adapter_folder
    rewritten(folder, lambda tensors: {name: x for name, x in tensors.items() if "attn1" in name})
    with pytest.raises(RunError, match="stock diffusers injects 16 layers of the export, and 32 trained"):
        check_reload(base, adapter, conditions, folder, None)


def test_a_wrong_rank_is_caught(here, adapter_folder):
    base, adapter, conditions, folder = adapter_folder
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3, "lora_alpha": 3}))
    with pytest.raises(RunError, match="would be refused: .* not of rank 3"):
        check_reload(base, adapter, conditions, folder, None)


def test_a_base_that_changed_since_the_run_began_is_caught(here, tmp_path):
    base, adapter, conditions, folder = exported(tmp_path, "pixel_classes", tmp_path / "run")
    place = Path(base.name) / "unet"
    kept = shutil.copytree(place, tmp_path / "kept")
    tensors = load_file(place / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] += 1e-6
    save_file(tensors, place / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"the base .*pixel_classes has changed since the run began"):
        check_reload(base, adapter, conditions, folder, None)
    shutil.rmtree(place)
    tiny_unet().save_pretrained(place)
    with pytest.raises(RunError, match="has changed since the run began"):
        check_reload(base, adapter, conditions, folder, None)
    shutil.rmtree(place)
    kept.rename(place)
    assert check_reload(base, adapter, conditions, folder, None).difference < 1e-6


def test_an_adapter_that_does_nothing_is_caught(here, bases, tmp_path):
    base, adapter, conditions, folder = exported(bases, "pixel", tmp_path / "run")
    for name, parameter in adapter.trainable.items():
        parameter.data *= "lora_A" in name
    write(base, adapter, folder)
    with pytest.raises(RunError, match="change nothing: no step moved them"):
        check_reload(base, adapter, conditions, folder, None)


GIVEN = {"trained": torch.tensor([0.5, -30.0])}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"layers": 3, "difference": 2e-4, "change": 0.1}, None),
        ({"layers": 3, "difference": 4e-4, "change": 0.1}, "differ from the trained by 0.0004"),
        ({"layers": 3, "difference": float("nan"), "change": 0.1}, "differ from the trained by nan"),
        ({"layers": 2, "difference": 0.0, "change": 0.1}, "tool injects 2 layers of the export, and 3 trained"),
        ({"layers": 3, "difference": 0.0, "change": 0.0}, "change nothing"),
        ({"error": "TypeError: x"}, "tool cannot load the exported weights: TypeError: x"),
    ],
)
def test_the_tolerance_is_relative_to_the_outputs_and_nan_is_no_agreement(found, message):
    if message is None:
        judge("tool", found, 3, GIVEN)
        return
    with pytest.raises(RunError, match=message):
        judge("tool", found, 3, GIVEN)


def test_what_stock_tools_raise_is_told(here, bases, tmp_path, monkeypatch):
    base, adapter, conditions, folder = exported(bases, "pixel", tmp_path / "run")
    monkeypatch.setattr(reloading, "check_files", lambda *_: str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="stock peft cannot load the exported weights: OSError"):
        check_reload(base, adapter, conditions, folder, None)


def test_the_sentence_says_of_whole_models_that_training_moved_them():
    told = Reloaded({"whole": 0}, difference=2e-15, change=0.3).sentence
    assert told == "reloaded with stock diffusers; outputs differ by 2e-15 from the trained; training moves them by 0.3"
