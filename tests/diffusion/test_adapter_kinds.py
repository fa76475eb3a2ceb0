"""Every adapter kind, on a UNet with classes and a text-conditional one: train, ship, reload with stock peft, merge."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from tiny_models import tiny_base_folder, tiny_unet

from dp_peft_diffusion.diffusion.adapter_kinds import KINDS
from dp_peft_diffusion.diffusion.adapters import as_peft, inject_adapter, inject_into, to_peft
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.merging import merge_adapter
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Clip, loop_clipped_sum
from dp_peft_diffusion.recipe import ADAPTER_KINDS, Adapter

INJECTED = [kind for kind in ADAPTER_KINDS if kind not in ("class_rows", "code_moments", "full")]
VMAP = ("dora", "ia3", "lokr", "oft", "vera")
FAMILIES = ("classes", "text")
TRAINS = {  # parts of names of parameters that train, each of which must occur
    "lora": {"lora_A", "lora_B"},
    "lora_conv": {"lora_A", "lora_B"},
    "ffa_lora": {"lora_B"},
    "rslora": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "ia3": {"ia3_l"},
    "lokr": {"lokr_w1", "lokr_w2"},
    "oft": {"oft_R"},
    "vera": {"vera_lambda_b", "vera_lambda_d"},
    "bitfit": {"bias"},
    "norm": {"ln_tuning_layers"},
    "attention": {"ln_tuning_layers"},
    "full": {"weight", "bias"},
}


def text_unet():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return unet.requires_grad_(False).eval()


def fresh(family):
    return tiny_unet() if family == "classes" else text_unet()


def made_up_batch(n=3):
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(n, 1, 8, 8, generator=generator),
        "t": torch.arange(n) * 300 + 5,
        "rows": torch.arange(n) + 9,
        "text": torch.randn(n, 5, 12, generator=generator),
    }


def answer(unet, batch):
    if "cross_attention_dim" in unet.config:
        return unet(batch["x"], batch["t"], batch["text"]).sample
    return unet(batch["x"], batch["t"], class_labels=batch["rows"]).sample


def losses(unet, batch):
    return answer(unet, batch).square().flatten(1).mean(dim=1)


@torch.no_grad()
def far(left, right):
    batch = made_up_batch()
    return (answer(left, batch) - answer(right, batch)).abs().max().item()


@torch.no_grad()
def perturb(unet, size=0.1):
    generator = torch.Generator().manual_seed(2)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def injected(family, kind, **spec):
    model = fresh(family)
    return model, inject_into(model, Adapter(kind=kind, **spec))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [*INJECTED, "full"])
def test_exactly_the_kinds_parameters_train(family, kind):
    model, _ = injected(family, kind)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in names:
        assert any(part in name for part in TRAINS[kind]), name
    for part in TRAINS[kind]:
        assert any(part in name for name in names), part
    if kind == "bitfit":
        assert not any("lora" in name for name in names)
        assert len(names) == sum("bias" in name for name, _ in fresh(family).named_parameters())
    if kind == "norm":
        assert len(names) == 2 * sum("Norm" in type(module).__name__ for module in fresh(family).modules())
    if kind == "full":
        assert len(names) == len(list(fresh(family).parameters()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", INJECTED)
def test_a_fresh_adapter_changes_nothing(family, kind):
    assert far(injected(family, kind)[0], fresh(family)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", INJECTED)
def test_stock_peft_reloads_and_merges_what_trained(family, kind, tmp_path):
    model, config = injected(family, kind, rank=2, lora_alpha=5.0)
    perturb(model)
    as_peft(fresh(family), model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(fresh(family), tmp_path).eval()
    assert far(stock, model) < 1e-5 and far(fresh(family), model) > 1e-3
    assert far(stock.merge_and_unload(), model) < 1e-4
    merged = merge_adapter(fresh(family), tmp_path)
    assert far(merged, model) < 1e-4
    assert type(merged) is type(fresh(family)) and merged.state_dict().keys() == fresh(family).state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_saved_as_stock_diffusers_opens_it(family, tmp_path):
    model, config = injected(family, "full")
    perturb(model)
    model.save_pretrained(tmp_path)
    assert config is None and far(type(model).from_pretrained(tmp_path).eval(), model) == 0.0
    assert far(fresh(family), model) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [*INJECTED, "full"])
def test_a_clipped_sum_is_the_one_by_one_loops_and_moves_every_tensor(family, kind):
    model, _ = injected(family, kind, rank=2)
    perturb(model)
    clipper = PerSampleClipper(model, max_grad_norm=0.01)
    assert clipper.path == ("vmap" if kind in VMAP else "hooks")
    found = clipper.clipped_sum_of(losses, made_up_batch())
    wanted = loop_clipped_sum(model, losses, made_up_batch(), Clip(max_grad_norm=0.01))
    scale = torch.stack([total.norm() for total in wanted.values()]).norm()
    assert found.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, total in wanted.items():
        assert (found[name] - total).norm() < 1e-5 * scale, name
        assert found[name].any(), name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny_base_folder(tmp_path_factory.mktemp("base") / "base", packing=1)))


@pytest.mark.parametrize("code_rank", [None, 3])
@pytest.mark.parametrize("kind", [*INJECTED, "class_rows"])
def test_private_class_rows_travel_with_every_kind(base, kind, code_rank, tmp_path):
    adapter = inject_adapter(base, Adapter(kind=kind, rank=2, lora_alpha=5.0, class_code_rank=code_rank), 3)
    assert torch.equal(adapter.class_rows.codes.weight, torch.zeros(3, code_rank or 32))
    perturb(adapter.unet, 0.3)
    to_peft(base, adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path).eval()
    assert far(stock, adapter.unet) < 1e-5
    assert far(stock.merge_and_unload(), adapter.unet) < 1e-4
    merged = merge_adapter(copy.deepcopy(base.unet), tmp_path)
    moved = (merged.class_embedding.weight != base.unet.class_embedding.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [10, 11, 12]
    assert "class_embedding" in adapter.adapted_modules


def test_a_whole_model_with_class_rows_keeps_the_rest_of_the_class_table(base):
    trainable = inject_adapter(base, Adapter(kind="full"), 3).trainable
    table = {name for name in trainable if name.startswith("class_embedding.")}
    assert table == {"class_embedding.codes.weight"}
    assert len(trainable) == len(list(base.unet.parameters()))


def test_recipes_know_the_same_kinds_as_the_table():
    assert list(KINDS) == list(ADAPTER_KINDS)


def test_own_targets_that_a_net_lacks_are_left_out_but_given_ones_are_not():
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4), "conv1": torch.nn.Conv2d(4, 4, 3)})
    assert inject_into(net, Adapter(kind="lora_conv")).target_modules == {"to_q", "conv1"}
    with pytest.raises(UserError, match="to_qq.*Did you mean 'to_q'"):
        inject_into(fresh("text"), Adapter(kind="dora", target_modules=("to_q", "to_qq")))


def test_a_net_without_any_of_the_kinds_targets_is_refused_by_name():
    with pytest.raises(UserError, match=r"--adapter lora trains to_q.*There is: 0"):
        inject_into(torch.nn.Sequential(torch.nn.Linear(2, 2)), Adapter())


def test_a_net_without_the_kinds_layers_is_sent_to_another_kind():
    with pytest.raises(
        UserError, match="trains GroupNorm or LayerNorm or RMSNorm, and this base has none.*such as lora"
    ):
        inject_into(torch.nn.Sequential(torch.nn.Linear(2, 2)), Adapter(kind="norm"))


def test_norm_takes_norms_only():
    with pytest.raises(UserError, match="'to_q' matches no GroupNorm"):
        inject_into(fresh("text"), Adapter(kind="norm", target_modules=("to_q",)))


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_random_matrices_come_from_the_public_seed_and_leave_the_generator_alone(kind):
    model, state = fresh("text"), torch.random.get_rng_state()
    inject_into(model, Adapter(kind=kind), seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = fresh("text")
    torch.manual_seed(99)
    inject_into(again, Adapter(kind=kind), seed=7)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
