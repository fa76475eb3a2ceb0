import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_bases import BASES
from tiny_models import tiny_base_folder

from dp_peft_diffusion.diffusion.adapters import inject_adapter, inject_into, to_peft
from dp_peft_diffusion.diffusion.architectures import trainable_count
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.class_rows import code_directions
from dp_peft_diffusion.diffusion.merging import load_adapter, load_whole_model, merge_adapter
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import check_adapter
from dp_peft_diffusion.recipe import ADAPTER_KINDS, Adapter
from dp_peft_diffusion.sharing.export import write_adapter, write_model

SPEC = Adapter(rank=2, lora_alpha=6.0, target_modules=("to_q", "to_out.0", "conv1"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny_base_folder(tmp_path_factory.mktemp("base") / "base")))


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(4, 4, 8, 8), torch.tensor([1, 100, 500, 999]), torch.tensor([10, 12, 9, 0])


def moved(base, spec=SPEC, num_classes=3):
    adapter = inject_adapter(base, spec, num_classes)
    for parameter in adapter.trainable.values():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def answer(unet, inputs):
    x, t, rows = inputs
    with torch.no_grad():
        return unet(x, t, class_labels=rows).sample


def test_a_fresh_adapter_changes_nothing(base, inputs):
    assert torch.equal(answer(inject_adapter(base, SPEC, 3).unet, inputs), answer(base.unet, inputs))


def test_only_lora_and_class_codes_train(base):
    names = set(inject_adapter(base, SPEC, 3).trainable)
    assert all(".lora_A." in name or ".lora_B." in name or name == "class_embedding.codes.weight" for name in names)
    assert "class_embedding.codes.weight" in names


def test_only_private_rows_move_and_the_null_row_stays(base):
    adapter = moved(base)
    rows = torch.arange(30)
    before, after = base.unet.class_embedding(rows), adapter.class_rows(rows).detach()
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [row in (10, 11, 12) for row in range(30)]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        Adapter(kind="ffa_lora", rank=1, target_modules=("to_k",)),
        Adapter(rank=1, target_modules=("to_k",), class_code_rank=3),
        Adapter(kind="class_rows", class_code_rank=3),
    ],
)
def test_stock_peft_reloads_the_same_outputs(base, inputs, tmp_path, spec):
    adapter = moved(base, spec)
    to_peft(base, adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path).eval()
    assert torch.allclose(answer(stock, inputs), answer(adapter.unet, inputs), atol=1e-5)
    assert not torch.allclose(answer(stock, inputs), answer(base.unet, inputs), atol=1e-3)


def test_alpha_is_folded_into_the_file(base, tmp_path):
    to_peft(base, moved(base)).save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2


def test_only_the_private_rows_are_saved(base, tmp_path):
    to_peft(base, moved(base)).save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = [tensor for name, tensor in tensors.items() if "class_embedding" in name]
    assert [tuple(row.shape) for row in rows] == [(3, base.unet.class_embedding.embedding_dim)]


@pytest.mark.parametrize("spec", [SPEC, Adapter(kind="class_rows", class_code_rank=3)])
def test_merging_gives_a_plain_unet_with_the_same_outputs(base, inputs, tmp_path, spec):
    adapter = moved(base, spec)
    to_peft(base, adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    merged = merge_adapter(copy.deepcopy(base.unet), tmp_path)
    assert type(merged) is type(base.unet)
    assert torch.allclose(answer(merged, inputs), answer(adapter.unet, inputs), atol=1e-4)


def test_weight_zero_merges_to_the_base_and_weights_are_linear(base, inputs, tmp_path):
    to_peft(base, moved(base)).save_pretrained(tmp_path, save_embedding_layers=False)
    none = merge_adapter(copy.deepcopy(base.unet), tmp_path, weight=0.0)
    assert torch.equal(answer(none, inputs), answer(base.unet, inputs))
    half = merge_adapter(copy.deepcopy(base.unet), tmp_path, weight=0.5).state_dict()
    full = merge_adapter(copy.deepcopy(base.unet), tmp_path).state_dict()
    for name, value in base.unet.state_dict().items():
        assert torch.allclose(half[name] - value, (full[name] - value) / 2, atol=1e-6)


def test_code_directions_span_the_public_rows(base):
    table, layout = base.unet.class_embedding.weight, base.layout
    offsets = table[: layout.null_class] - table[layout.null_class]
    directions = code_directions(base, 9)
    projected = offsets @ torch.linalg.pinv(directions) @ directions
    assert torch.allclose(projected, offsets, atol=1e-4)


def test_code_directions_are_those_of_public_rows_wherever_the_null_row_lies(base):
    moved = copy.deepcopy(base.unet)
    moved.class_embedding.weight.data = moved.class_embedding.weight.roll(1, dims=0)  # the null row becomes row 10
    moved.class_embedding.weight.data[0] = moved.class_embedding.weight[10]
    moved.class_embedding.weight.data[10:] = 1e3  # spare now, and no direction
    layout = replace(base.layout, null_class=0, spare_classes=(10, 30))
    found = code_directions(replace(base, unet=moved, layout=layout), None)
    assert torch.allclose(found, code_directions(base, None))


def test_an_adapter_of_which_nothing_trains_is_refused(base):
    with pytest.raises(UserError, match="nothing would train"):
        inject_adapter(base, Adapter(kind="class_rows"))


def test_every_target_name_must_match(base):
    with pytest.raises(UserError, match="to_qq.*Did you mean 'to_q'"):
        inject_adapter(base, Adapter(target_modules=("to_k", "to_qq")))


def test_a_full_class_table_is_refused_with_the_way_out(base):
    with pytest.raises(UserError, match="--class_rows"):
        inject_adapter(base, SPEC, num_classes=21)


def test_given_rows_may_be_overwritten(base):
    spec = Adapter(target_modules=("to_q",), class_rows=(0, 1, 2))
    assert inject_adapter(base, spec, 3).class_rows.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "(([a-z_])+)+.X"}, "target_modules"),
        ({"target_modules": ["(a+)+b"]}, "target_modules"),
        ({"r": 2_000_000}, "rank"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"r": 3}, "not of rank"),
    ],
)
def test_a_strangers_config_is_checked_before_peft_sees_it(base, tmp_path, change, message):
    to_peft(base, moved(base)).save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(PrivacyError, match=message):
        load_adapter(copy.deepcopy(base.unet), tmp_path)


@pytest.mark.parametrize("plant", ["nan", "missing", "extra"])
def test_wrong_tensors_are_refused(base, tmp_path, plant):
    to_peft(base, moved(base)).save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    if plant == "nan":
        tensors[first][0] = float("nan")
    elif plant == "missing":
        del tensors[first]
    else:
        tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(PrivacyError):
        load_adapter(copy.deepcopy(base.unet), tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter(torch.nn.Linear(1, 1), tmp_path)


TEXT_BASES = ("stable_diffusion_1", "stable_diffusion_xl")
SD15 = {  # unet/config.json of stable-diffusion-v1-5, as far as it differs from diffusers' defaults
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="module")
def other_bases(tmp_path_factory):
    """Name of a family -> (folder, base)."""
    place = tmp_path_factory.mktemp("bases")
    folders = {name: BASES[name](place / name) for name in ("edm", "latent", *TEXT_BASES)}
    return {name: (folder, load_base(str(folder))) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("stable_diffusion_1", "lora"),
        ("stable_diffusion_1", "lora_conv"),
        ("stable_diffusion_1", "attention"),
        ("stable_diffusion_xl", "lora"),
        ("stable_diffusion_xl", "dora"),
        ("stable_diffusion_xl", "bitfit"),
    ],
)
def test_adapters_of_a_text_conditional_base_come_back_from_stock_peft(other_bases, family, kind, tmp_path):
    folder, base = other_bases[family]
    adapter = moved(base, Adapter(kind=kind, rank=2), num_classes=0)
    write_adapter(base, adapter, tmp_path)
    text, x, t = base.text.encode(["a cat", "dog"]), torch.randn(2, *base.input_shape), torch.tensor([10, 700])
    nets = {
        "trained": adapter.unet,
        "stock": PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path).eval(),
        "ours": load_adapter(copy.deepcopy(base.unet), tmp_path),
        "merged": merge_adapter(copy.deepcopy(base.unet), tmp_path),
        "base": base.unet,
    }
    with torch.no_grad():
        answers = {name: base.predict(net, x, t, text) for name, net in nets.items()}
    scale = answers["trained"].abs().max()
    assert all((answers[name] - answers["trained"]).abs().max() < 1e-5 * scale for name in ("stock", "ours", "merged"))
    assert (answers["base"] - answers["trained"]).abs().max() > 1e-3 * scale
    assert "all finite. Fits" in check_adapter(tmp_path, folder)


@pytest.mark.parametrize("family", TEXT_BASES)
def test_a_whole_text_conditional_base_is_refused_before_it_trains(other_bases, family):
    with pytest.raises(UserError, match="--adapter full on a text-conditional base is not exported by this version"):
        inject_adapter(other_bases[family][1], Adapter(kind="full"))


def test_a_text_conditional_base_has_no_class_rows(other_bases):
    with pytest.raises(UserError, match="no class table"):
        inject_adapter(other_bases["stable_diffusion_1"][1], Adapter(), num_classes=2)


@pytest.mark.parametrize("family", ["edm", "latent"])
def test_a_net_from_scratch_trains_whole_and_comes_back_with_its_classes(other_bases, family, tmp_path):
    base = load_base(str(other_bases[family][0]), from_scratch=True)
    adapter = moved(base, Adapter(kind="full"), num_classes=5)
    write_model(base, adapter, tmp_path)
    loaded = load_whole_model(tmp_path)
    first, end = base.layout.spare_classes
    assert loaded.layout.spare_classes == (first + 5, end)
    assert type(loaded.scheduler) is type(base.scheduler)
    for name in ("sigma_data", "beta_start", "beta_schedule", "prediction_type"):
        assert loaded.scheduler.config.get(name) == base.scheduler.config.get(name)
    x, t = torch.randn(3, *base.input_shape), torch.tensor([0.1, 0.5, 0.9])
    told = {"class_labels": torch.tensor([first, first + 4, base.layout.null_class])}
    with torch.no_grad():
        trained = base.predict(adapter.unet, x, t, told)
        assert torch.allclose(
            base.predict(loaded.unet, x, t, told), trained, rtol=1e-5, atol=1e-5 * trained.abs().max()
        )


@pytest.mark.parametrize("more", ["vae/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_a_strangers_model_with_more_to_load_than_was_checked_is_refused(other_bases, more, tmp_path):
    base = other_bases["edm"][1]
    write_model(base, inject_adapter(base, Adapter(kind="full")), tmp_path)
    (tmp_path / more).parent.mkdir(exist_ok=True)
    (tmp_path / more).write_text("{}")
    with pytest.raises(PrivacyError, match=f"{more.split('/')[-1] if 'unet' in more else 'vae'} is no part"):
        load_whole_model(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTER_KINDS if kind not in ("class_rows", "code_moments")])
def test_what_trains_is_counted_without_weights_as_with_them(other_bases, kind):
    spec, unet = Adapter(kind=kind, rank=2), other_bases["stable_diffusion_xl"][1].unet
    model = copy.deepcopy(unet)
    inject_into(model, spec)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_count({**unet.config, "_class_name": "UNet2DConditionModel"}, spec) == real > 0


def test_rank_4_on_the_attention_of_stable_diffusion_1_trains_797184_numbers():
    assert trainable_count(SD15, Adapter(rank=4)) == 797_184
