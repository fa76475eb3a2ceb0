"""What stock peft 0.21.2 and diffusers 0.42.1 do with adapter files, where a page of ours warns of it.

The pages are docs/how-to/load-in-diffusers-and-web-uis.md and docs/how-to/use-a-strangers-adapter.md. If another
version behaves in another way, a test fails here, and the page is to be changed.
"""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_bases import TEXT, stable_diffusion_1, tiny_text_unet

RANK, ALPHA = 2, 8
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained():
    """A text-conditional UNet with a LoRA of alpha 8 and rank 2 whose B is not zero."""
    unet = tiny_text_unet().eval()
    model = get_peft_model(unet, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v"]))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model.eval()


@torch.no_grad()
def answer(unet):
    torch.manual_seed(5)
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 3, TEXT)).sample


def weights(trained, scale=1.0):
    """The tensors of a diffusers file, B multiplied by `scale`."""
    found = get_peft_model_state_dict(trained)
    renamed = {name.replace("base_model.model.", "unet."): value for name, value in found.items()}
    return {name: value * scale if ".lora_B." in name else value.clone() for name, value in renamed.items()}


def write(folder, tensors, **metadata):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / NAME, metadata={"format": "pt", **metadata})
    return folder


def lora_metadata(trained, **more):
    config = trained.peft_config["default"].to_dict() | {"target_modules": ["to_k", "to_q", "to_v"]} | more
    return json.dumps({f"unet.{key}": value for key, value in config.items()}, default=str)


def loaded(folder):
    """A fresh UNet after diffusers' own loader, told the right prefix."""
    unet = tiny_text_unet().eval()
    unet.load_lora_adapter(folder, prefix="unet", weight_name=NAME)
    return unet


def is_adapted(unet):
    return any("lora_" in name for name, _ in unet.named_parameters())


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def test_another_prefix_loads_nothing_and_raises_nothing(trained, tmp_path):
    folder = write(tmp_path / "a", weights(trained))
    unet = tiny_text_unet().eval()
    unet.load_lora_adapter(folder, weight_name=NAME)  # its default prefix is that of transformers
    assert not is_adapted(unet) and same(answer(unet), answer(tiny_text_unet().eval()))
    assert is_adapted(loaded(folder))


def test_a_pipeline_takes_pefts_own_file_and_loads_nothing(trained, tmp_path):
    trained.save_pretrained(tmp_path / "peft")
    pipe = StableDiffusionPipeline.from_pretrained(stable_diffusion_1(tmp_path / "base"))
    pipe.load_lora_weights(tmp_path / "peft", weight_name="adapter_model.safetensors")
    assert not is_adapted(pipe.unet)
    write(tmp_path / "peft", weights(trained))  # the same folder with diffusers' file in it
    pipe.load_lora_weights(tmp_path / "peft")
    assert is_adapted(pipe.unet)


def test_alpha_is_lost_without_metadata_unless_it_is_folded_into_b(trained, tmp_path):
    right, base = answer(trained), answer(tiny_text_unet().eval())
    assert not same(right, base)
    assert not same(answer(loaded(write(tmp_path / "lost", weights(trained)))), right)
    assert same(answer(loaded(write(tmp_path / "folded", weights(trained, ALPHA / RANK)))), right)
    said = write(tmp_path / "said", weights(trained), lora_adapter_metadata=lora_metadata(trained))
    assert same(answer(loaded(said)), right)


def test_an_unknown_key_among_the_loras_metadata_stops_the_loader_and_one_beside_them_does_not(trained, tmp_path):
    inside = lora_metadata(trained, dp_peft="epsilon 1")
    with pytest.raises(TypeError, match="LoraConfig.* class could not be instantiated"):
        loaded(write(tmp_path / "inside", weights(trained), lora_adapter_metadata=inside))
    beside = write(
        tmp_path / "beside", weights(trained), lora_adapter_metadata=lora_metadata(trained), dp_peft="epsilon 1"
    )
    assert same(answer(loaded(beside)), answer(trained))


def test_a_folder_without_weight_name_is_looked_through_for_a_pickle(trained, tmp_path):
    folder = write(tmp_path / "a", weights(trained))
    with pytest.raises(OSError, match=r"pytorch_lora_weights\.bin"):
        tiny_text_unet().load_lora_adapter(folder, prefix="unet")


@pytest.mark.parametrize("dtype, least, most", [(torch.float32, 0.999, 1.0), (torch.bfloat16, 0.15, 0.35)])
def test_a_small_change_is_mostly_lost_when_it_is_merged_in_bfloat16(dtype, least, most):
    """A change of 1/1000 of a 320x320 weight, and the share of it that is there after merging."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(320, 320, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B.default.weight)
    before = layer.base_layer.weight.detach().to(dtype).float().clone()
    layer.lora_B.default.weight.data *= 1e-3 * before.norm() / layer.get_delta_weight("default").norm()
    change = layer.get_delta_weight("default").detach().clone()
    merged = model.to(dtype).merge_and_unload()[0].weight.detach().float() - before
    assert least <= 1 - ((merged - change).norm() / change.norm()).item() <= most


def save_altered(trained, folder, config=None, **tensors):
    trained.save_pretrained(folder)
    held = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({name: value for name, value in held.items() if value is not None}, folder / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return PeftModel.from_pretrained(tiny_text_unet().eval(), folder)


def a_tensor(trained):
    return next((name, value) for name, value in get_peft_model_state_dict(trained).items() if ".lora_B." in name)


def test_peft_loads_numbers_that_are_not_finite(trained, tmp_path):
    name, value = a_tensor(trained)
    model = save_altered(trained, tmp_path / "a", **{name: torch.full_like(value, float("nan"))})
    assert answer(model).isnan().any()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_peft_leaves_what_is_missing_at_its_first_values(trained, tmp_path):
    name, _ = a_tensor(trained)
    model = save_altered(trained, tmp_path / "a", **{name: None})
    assert is_adapted(model) and not same(answer(model), answer(trained))


def test_peft_takes_a_text_in_target_modules_for_a_regular_expression(trained, tmp_path):
    model = save_altered(trained, tmp_path / "a", {"target_modules": r".*\.to_[qkv]"})
    assert same(answer(model), answer(trained))
