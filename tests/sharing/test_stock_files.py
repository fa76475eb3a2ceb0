"""The files of other tools: what stock diffusers and web UIs read, and what is refused with a way out."""

import copy
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dp_peft_diffusion.cli.exporting import export_command
from dp_peft_diffusion.cli.program import Program
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.adapter_layers import AdapterLayers
from dp_peft_diffusion.sharing.reloading import made_up_inputs
from dp_peft_diffusion.sharing.stock_files import family, file_of, write_kohya
from dp_peft_diffusion.sharing.stock_reload import answers
from tests.privacy.folders import promise
from tests.sharing.exported_adapters import DOCUMENT, LORA_KINDS, exported

PIPELINES = {"stable_diffusion_1": StableDiffusionPipeline, "stable_diffusion_xl": StableDiffusionXLPipeline}
FAST = {("stable_diffusion_1", "lora_conv"), ("stable_diffusion_xl", "dora")}
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """(base, adapter, conditions, folder) of a LoRA on Stable Diffusion."""
    return exported(bases, "stable_diffusion_1", tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copied(run, tmp_path):
    """The folder, as a copy of its own."""
    return shutil.copytree(run[3], tmp_path / "run")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def pipeline(base):
    kind = StableDiffusionPipeline if base.unet.config.addition_embed_type is None else StableDiffusionXLPipeline
    return kind.from_pretrained(base.name)


def difference(base, conditions, network, other):
    """Of the outputs of two networks, relative to the largest."""
    given = made_up_inputs(base, conditions)
    first, second = (answers(copy.deepcopy(net), given) for net in (network, other))
    return ((first - second).abs().max() / second.abs().max()).item()


@pytest.mark.parametrize(
    ("base_family", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in FAST else pytest.mark.slow)
        for name in PIPELINES
        for kind in LORA_KINDS
    ],
)
def test_a_pipeline_loads_the_folder_as_any_lora(bases, tmp_path, base_family, kind):
    base, adapter, conditions, folder = exported(bases, base_family, tmp_path / "run", kind)
    pipe = pipeline(base)
    pipe.load_lora_weights(folder)
    assert difference(base, conditions, pipe.unet, adapter.unet) < 1e-5
    assert difference(base, conditions, base.unet, adapter.unet) > 1e-3
    unet = copy.deepcopy(base.unet)
    unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE)
    assert difference(base, conditions, unet, adapter.unet) < 1e-5
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert difference(base, conditions, pipe.unet, adapter.unet) < 1e-4  # merged in float32


def test_alpha_is_the_rank_of_every_layer_and_the_promise_stands_beside_the_config(run):
    _, _, _, folder = run
    said = metadata_of(folder / LORA_FILE)
    assert set(said) == {"format", "lora_adapter_metadata", "dp_peft"}
    config = json.loads(said["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == config["unet.r"] == 2 and all(key.startswith("unet.") for key in config)
    promise = json.loads(said["dp_peft"])
    assert promise["statement"] == DOCUMENT["statement"] and promise["epsilon"] == 1.0 and promise["delta"] == 1e-5
    assert promise["base"] == DOCUMENT["base"] and promise["certificate"] == "privacy.json"
    assert metadata_of(folder / "adapter_model.safetensors") == {"format": "pt"}


@pytest.mark.parametrize("kind", ["lokr", "bitfit", "attention"])
def test_kinds_that_diffusers_loads_in_part_or_not_at_all_have_no_such_file(bases, tmp_path, kind):
    base, _, _, folder = exported(bases, "stable_diffusion_1", tmp_path / "run", kind)
    assert not (folder / LORA_FILE).exists()


def test_diffusers_pipelines_refuse_lokr(bases, tmp_path):
    base, _, _, folder = exported(bases, "stable_diffusion_1", tmp_path / "run", "lokr")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", "unet."): tensor for name, tensor in tensors.items()}
    (folder / LORA_FILE).write_bytes(file_of(renamed, {"format": "pt"}))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # diffusers 0.42.1
        pipeline(base).load_lora_weights(folder)


def test_a_network_without_diffusers_loader_has_no_such_file(bases, tmp_path):
    *_, folder = exported(bases, "pixel_classes", tmp_path / "run")
    assert not (folder / LORA_FILE).exists()


def test_the_same_adapter_makes_the_same_file():
    tensors = {"b": torch.ones(2), "a": torch.arange(3, dtype=torch.float16)}
    metadata = {name: "x" for name in "zyxwv"}
    content = file_of(tensors, metadata)
    assert content == file_of(tensors, metadata) and content.index(b'"z"') < content.index(b'"y"')
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


@pytest.mark.parametrize(
    ("base_family", "kind"), [("stable_diffusion_1", "rslora"), ("stable_diffusion_xl", "lora_conv")]
)
def test_the_file_for_web_uis_says_what_the_adapter_says(bases, tmp_path, base_family, kind):
    base, _, conditions, folder = exported(bases, base_family, tmp_path / "run", kind)
    written = write_kohya(folder)
    assert written.path == tmp_path / "run.kohya.safetensors"
    pipe = pipeline(base)
    pipe.load_lora_weights(written.path)
    merged = PeftModel.from_pretrained(copy.deepcopy(base.unet), folder).merge_and_unload()
    assert difference(base, conditions, pipe.unet, merged) < 1e-5
    assert difference(base, conditions, base.unet, merged) > 1e-3


def test_the_names_for_web_uis_are_kohyas(run, tmp_path):
    *_, folder = run
    tensors = load_file(write_kohya(folder, tmp_path / "it.safetensors").path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{layer}.alpha"].item() == 2
    assert tensors[f"{layer}.lora_down.weight"].shape == (2, 8) and tensors[f"{layer}.lora_up.weight"].shape == (8, 2)
    ends = {name.partition(".")[2] for name in tensors}
    assert ends == {"alpha", "lora_down.weight", "lora_up.weight"} and len(tensors) == 3 * 32
    said = metadata_of(tmp_path / "it.safetensors")
    wanted = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2"}
    assert wanted.items() <= said.items() and "ss_base_model_version" not in said, "8 numbers a word: no known family"


@pytest.mark.parametrize(
    ("shapes", "known"),
    [
        ({"a.attn1.to_k": (320, 320), "a.attn2.to_k": (320, 768)}, "sd_v1"),
        ({"a.attn2.to_v": (320, 1024)}, "sd_v2"),
        ({"a.attn2.to_k": (640, 2048)}, "sdxl_base_v1-0"),
        ({"a.attn2.to_k": (640, 99)}, None),
        ({"a.attn1.to_k": (768, 768)}, None),
    ],
)
def test_the_family_of_a_base_is_told_by_the_width_of_its_prompts(shapes, known):
    assert family(AdapterLayers(shapes, {}, frozenset(), {})) == known


def strangers_scales(folder, **changes):
    """Other scales in the config than our kinds write; of to_q another rank."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".to_q." in name:
            tensors[name] = tensor[:1].contiguous() if "lora_A" in name else tensor[:, :1].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"to_q": 1}} | changes))
    (folder / LORA_FILE).unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 0.5, "alpha_pattern": {"to_q": 3, "to_v": 5.5}, "use_rslora": True},
    ],
)
def test_the_file_for_web_uis_has_the_scale_of_every_layer_of_a_strangers_adapter(run, copied, tmp_path, changes):
    base, _, conditions, _ = run
    strangers_scales(copied, **changes)
    pipe = pipeline(base)
    pipe.load_lora_weights(write_kohya(copied, tmp_path / "it.safetensors").path)
    assert len({layer.lora_alpha["default_0"] for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)}) == 1
    merged = PeftModel.from_pretrained(copy.deepcopy(base.unet), copied).merge_and_unload()
    assert difference(base, conditions, pipe.unet, merged) < 1e-5
    assert difference(base, conditions, base.unet, merged) > 1e-3


def test_diffusers_leaves_out_alphas_that_differ_from_layer_to_layer(run, tmp_path):
    base, _, conditions, folder = run
    tensors = load_file(write_kohya(folder, tmp_path / "it.safetensors").path)
    pipe = pipeline(base)
    pipe.load_lora_weights(tmp_path / "it.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.alpha"
    tensors[name] *= 100
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    other = pipeline(base)
    other.load_lora_weights(tmp_path / "other.safetensors")
    assert difference(base, conditions, other.unet, pipe.unet) == 0, "diffusers 0.42.1; kohya_tensors may be simpler"


def certified(folder, **said):
    """A certificate for the adapter in a folder."""
    (folder / "recipe.yaml").write_text("train: {}\n")
    told = {"clipping": "flat", "gamma": None, "noise_multiplicity": 1, "public_inputs": {}, "base": DOCUMENT["base"]}
    return certificate.write(folder, certificate.certificate(promise(), folder=folder, **told, **said))


def test_the_promise_travels_in_the_file_for_web_uis(copied, tmp_path):
    folder = copied
    (folder / LORA_FILE).unlink()
    document = certified(folder)
    said = json.loads(metadata_of(write_kohya(folder).path)["dp_peft"])
    assert said["statement"] == document["statement"] and said["epsilon"] == document["guarantee"]["epsilon"]


def test_a_promise_that_does_not_verify_travels_nowhere(copied, tmp_path):
    folder = copied
    (folder / LORA_FILE).unlink()
    certified(folder, key_source="given")
    recipe = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(recipe))
    with pytest.raises(PrivacyError, match=r"\(files, key\).*type: dp-peft verify .*run"):
        write_kohya(folder, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_the_file_of_an_adapter_without_a_certificate_says_so(run, tmp_path):
    said = json.loads(metadata_of(write_kohya(run[3], tmp_path / "it.safetensors").path)["dp_peft"])
    assert said["certificate"] is None and "nothing is promised" in said["statement"]


@pytest.mark.parametrize(
    ("base_family", "fields", "message"),
    [
        ("pixel_classes", {}, "no web UI takes UNet2DModel"),
        ("stable_diffusion_1", {"kind": "dora"}, "LoRA alone, and this is DoRA"),
        ("stable_diffusion_1", {"kind": "ia3"}, "LoRA alone, and this is IA3"),
        ("stable_diffusion_1", {"kind": "lokr"}, "this is LOKR"),
        ("stable_diffusion_1", {"kind": "bitfit"}, "this is LORA with more than LoRA layers"),
        ("stable_diffusion_1", {"target_modules": ("linear_1",)}, "do not adapt the layer time_embedding.linear_1"),
        ("pixel_classes", {"kind": "full"}, "whole model"),
    ],
)
def test_what_web_uis_cannot_take_is_refused_with_what_can(bases, tmp_path, base_family, fields, message):
    *_, folder = exported(bases, base_family, tmp_path / "run", **fields)
    with pytest.raises(UserError, match=rf"{message}.*(stock peft|from_pretrained)"):
        write_kohya(folder)
    assert list(tmp_path.iterdir()) == [folder]


def command(*words):
    return CliRunner().invoke(Program(commands={"export": export_command}), ["export", *map(str, words)])


def test_the_command_writes_beside_the_folder_and_never_into_it(run, tmp_path):
    *_, folder = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = command(folder, "--format", "kohya", "--output", tmp_path / "it.safetensors")
    assert done.exit_code == 0 and "LoRA on 32 layers" in done.output
    assert f"warning: {folder} has no privacy.json. No certificate belongs to this adapter" in done.stderr
    refused = {
        "exists. Remove it": tmp_path / "it.safetensors",
        "lies in": folder / "it.safetensors",
        "End it with .safetensors": tmp_path / "it.ckpt",
    }
    for message, output in refused.items():
        ended = command(folder, "--format", "kohya", "--output", output)
        assert ended.exit_code == 2 and message in ended.output and "Traceback" not in ended.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command(tmp_path / "nowhere", "--format", "kohya").exit_code == 2
    assert command(folder).exit_code == 2 and command(folder, "--format", "onnx").exit_code == 2


def test_a_hostile_adapter_is_refused_before_anything_is_written(copied, tmp_path):
    folder = copied
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "(([a-z_])+)+.X"}))
    ended = command(folder, "--format", "kohya")
    assert ended.exit_code == 3 and "target_modules" in ended.output
    assert list(tmp_path.iterdir()) == [folder]
