"""Adapters on networks and pipelines, loaded by stock peft and merged: against what is added by hand."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import shared
from tiny_bases import BASES, tiny_autoencoder

from dp_peft_diffusion import load_adapter, merge_adapter
from dp_peft_diffusion.diffusion.adapters import as_peft, inject_into
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.merging import attach_adapters, change_of, merge_adapters
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.recipe import ADAPTER_KINDS, Adapter, Data

KINDS = [kind for kind in ADAPTER_KINDS if kind not in ("full", "code_moments")]  # which needs another base
UNLABELLED = Data(label_column=None, prompt_template="a cat")
PIPELINES = {
    "pixel": DDPMPipeline,
    "stable_diffusion_1": StableDiffusionPipeline,
    "stable_diffusion_xl": StableDiffusionXLPipeline,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("merging")


@pytest.fixture(scope="module")
def base_folder(place):
    return BASES["pixel_classes"](place / "pixel_classes")


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder))


@pytest.fixture(scope="module")
def adapters(place, base_folder):
    """Three LoRAs, of which two move class rows in public directions."""
    specs = [
        Adapter(rank=2, target_modules=("to_q", "conv1"), class_rows=(10, 11), class_code_rank=3),
        Adapter(rank=3, lora_alpha=1.0, target_modules=("to_q",)),
        Adapter(rank=1, target_modules=("to_k", "to_q"), class_rows=(12, 13), class_code_rank=2),
    ]
    return [shared(place / f"adapter-{i}", base_folder, spec, seed=i) for i, spec in enumerate(specs)]


@pytest.fixture(scope="module")
def of_kind(place, base_folder):
    """Kind -> folder of an adapter that moves class rows too, each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = shared(place / kind, base_folder, Adapter(kind=kind, rank=2, class_rows=(10, 11)))
        return made[kind]

    return get


@torch.no_grad()
def answer(net):
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 300, 600, 999])
    return net(x, t, class_labels=torch.tensor([10, 11, 12, 9])).sample


def far(left, right):
    return (left - right).abs().max().item()


def change_by_hand(folder):
    """B @ A of each linear layer of a LoRA; alpha is folded into B."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".to_q.lora_A.weight")]
    return {
        f"{module.removeprefix('base_model.model.')}.weight": tensors[f"{module}.lora_B.weight"].double()
        @ tensors[f"{module}.lora_A.weight"].double()
        for module in modules
    }


def test_merging_adds_weight_times_b_times_a_and_touches_nothing_else(base, adapters):
    weight, folder = 0.7, adapters[1]
    merged = merge_adapter(copy.deepcopy(base.unet), folder, weight).state_dict()
    change = change_by_hand(folder)
    assert change
    for name, value in base.unet.state_dict().items():
        wanted = value.double() + weight * change[name] if name in change else value
        assert far(merged[name], wanted) < 1e-6 and (name in change or torch.equal(merged[name], value)), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_as_stock_peft_does_and_is_taken_off_again_bit_for_bit(base, of_kind, kind):
    net = copy.deepcopy(base.unet)
    change_of(net, of_kind(kind))
    left = net.state_dict()
    assert left.keys() == base.unet.state_dict().keys()
    assert all(torch.equal(left[name], value) for name, value in base.unet.state_dict().items())
    stock = PeftModel.from_pretrained(copy.deepcopy(base.unet), str(of_kind(kind))).merge_and_unload().state_dict()
    ours = merge_adapters(net, [of_kind(kind)], [1.0]).state_dict()
    assert stock.keys() == ours.keys() and all(torch.equal(ours[name], value) for name, value in stock.items())


def test_several_adapters_add_up_in_any_order(base, adapters):
    weights = [0.5, -0.25, 1.5]
    orders = [
        merge_adapters(copy.deepcopy(base.unet), *zip(*order, strict=True)).state_dict()
        for order in itertools.islice(itertools.permutations(zip(adapters, weights, strict=True)), 0, 6, 2)
    ]
    single = [merge_adapters(copy.deepcopy(base.unet), [folder], [1.0]).state_dict() for folder in adapters]
    for name, value in base.unet.state_dict().items():
        wanted = value + sum(w * (one[name] - value) for w, one in zip(weights, single, strict=True))
        assert far(orders[0][name], wanted) < 1e-5, name
        assert all(torch.equal(other[name], orders[0][name]) for other in orders[1:]), name


@pytest.mark.parametrize(("which", "weights"), [((0,), (1.0,)), ((0,), (0.3,)), ((0, 1, 2), (0.5, -0.25, 1.5))])
def test_unmerged_adapters_answer_as_merged_ones(base, adapters, which, weights):
    folders = [adapters[i] for i in which]
    unmerged = attach_adapters(copy.deepcopy(base.unet), folders, weights)
    merged = merge_adapters(copy.deepcopy(base.unet), folders, weights)
    assert far(answer(unmerged), answer(merged)) < 1e-5
    assert far(answer(merged), answer(base.unet)) > 1e-2


@pytest.mark.parametrize("kind", ["dora", "ia3", "attention", "bitfit", "lora"])
def test_any_kind_stays_unmerged_alone_but_only_plain_lora_is_weighed(base, of_kind, kind):
    folder = of_kind(kind)  # of LoRA: its class rows travel whole
    unmerged = attach_adapters(copy.deepcopy(base.unet), [folder], [1.0])
    assert far(answer(unmerged), answer(merge_adapters(copy.deepcopy(base.unet), [folder], [1.0]))) < 1e-5
    with pytest.raises(UserError, match=f"{kind}: only layers of plain LoRA can be weighed and added.*--unmerged"):
        attach_adapters(copy.deepcopy(base.unet), [folder], [0.5])


def small(place, base_folder):
    """An adapter whose change is a few thousandths of the weights."""
    folder = shared(place, base_folder, Adapter(rank=2, target_modules=("to_q",)))
    path = folder / "adapter_model.safetensors"
    tensors = {name: value * (0.007 if "lora_B" in name else 1) for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_merging_into_bfloat16_would_lose_most_of_a_small_change_and_says_so(base, base_folder, tmp_path):
    folder = small(tmp_path / "run", base_folder)
    change, before = change_of(copy.deepcopy(base.unet), folder), base.unet.state_dict()
    name = next(name for name in change if name.endswith("to_q.weight"))
    assert change[name].norm() < 5e-3 * before[name].norm()
    half = copy.deepcopy(base.unet).to(torch.bfloat16)
    held = half.state_dict()[name].double()
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 takes away [5-9]\d% of the adapter's change") as said:
        merged = merge_adapter(half, folder)
    assert {each.filename for each in said} == {__file__} and merged.dtype == torch.bfloat16
    kept = merged.state_dict()[name].double() - held
    assert (kept - change[name]).norm() > 0.5 * change[name].norm()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rounding")
        whole = merge_adapter(copy.deepcopy(base.unet), folder).state_dict()[name].double()
    assert (whole - before[name].double() - change[name]).norm() < 1e-3 * change[name].norm()


def test_another_network_of_the_same_shape_is_told_by_its_weights(base, base_folder, tmp_path):
    folder = shared(tmp_path / "run", base_folder, certified=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(copy.deepcopy(base.unet), folder)
        merge_adapter(copy.deepcopy(base.unet), folder)
    other = copy.deepcopy(base.unet)
    other.conv_in.weight.data += 1
    for deed in (load_adapter, merge_adapter):
        with pytest.warns(UserWarning, match=f"trained on ./pixel_classes with weights {base.sha256[:12]}") as said:
            deed(copy.deepcopy(other), folder)
        assert said[0].filename == __file__, "the warning points at the line that asked"
    for net in (base.unet, other):  # whose bits are others anyhow
        with pytest.warns(UserWarning, match="NOT CHECKED whether .* ./pixel_classes: in half precision"):
            load_adapter(copy.deepcopy(net).to(torch.bfloat16), folder)
    (folder / "privacy.json").unlink()
    with pytest.warns(UserWarning, match="NOT CHECKED whether .* it has no privacy.json"):
        merge_adapter(copy.deepcopy(base.unet), folder)


@pytest.mark.parametrize("deed", [load_adapter, merge_adapter])
def test_a_network_of_another_shape_is_refused(adapters, base, deed):
    other = type(base.unet).from_config({**base.unet.config, "block_out_channels": (8, 24)})
    with pytest.raises(UserError, match="Is this model the base it was trained on"):
        deed(other, adapters[0])
    with pytest.raises(UserError, match="list is no network, and no pipeline with a unet or a transformer"):
        deed([], adapters[0])


def pictures(pipe, family):
    told = {"batch_size": 2} if family == "pixel" else {"prompt": "a cat", "height": 16, "width": 16}
    pipe.set_progress_bar_config(disable=True)
    found = pipe(**told, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    return torch.tensor(found.images)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_pipeline_with_other_parts_beside_the_same_network_is_told(tmp_path, part):
    made = BASES["stable_diffusion_1"](tmp_path / "base")
    folder = shared(tmp_path / "run", made, Adapter(rank=2), UNLABELLED, certified=True)
    pipe = StableDiffusionPipeline.from_pretrained(made)
    getattr(pipe, part).half()
    with pytest.warns(UserWarning, match="NOT CHECKED whether .* in half precision"):
        merge_adapter(copy.deepcopy(pipe), folder, weight=0.0)
    next(getattr(pipe, part).float().parameters()).data += 1
    with pytest.warns(UserWarning, match="with another autoencoder or other text encoders than this pipeline has"):
        load_adapter(pipe, folder)


@pytest.mark.parametrize("second", [load_adapter, merge_adapter])
@pytest.mark.parametrize("family", ["bare", "pixel"])
def test_a_second_adapter_beside_a_loaded_one_is_refused_until_it_is_taken_off(adapters, base, second, family):
    net = copy.deepcopy(base.unet)
    model = net if family == "bare" else DDPMPipeline(net, base.scheduler)
    loaded = load_adapter(model, adapters[1])
    for given in (loaded, model):
        with pytest.raises(UserError, match="an adapter is already on this model. Give a fresh one, or take"):
            second(given, adapters[1])
    if family == "bare":
        second(loaded.unload(), adapters[1])
    else:
        loaded.unet = loaded.unet.unload()
        second(loaded, adapters[1])


@pytest.mark.parametrize("weights", [[math.inf], [math.nan], [], [1.0, 1.0], 0.5])
def test_weights_are_one_finite_number_for_each_adapter(base, adapters, weights):
    for deed in (merge_adapters, attach_adapters):
        with pytest.raises(UserError, match="^weights .* give"):
            deed(base.unet, adapters[:1], weights)
        with pytest.raises(UserError, match="there is no adapter"):
            deed(base.unet, [], [])


def same(net, other):
    left, right = net.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], value) and left[name].dtype == value.dtype for name, value in right.items()
    )


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1e200), (torch.float16, 1e9)])
def test_a_weight_that_leads_beyond_the_numbers_changes_nothing(base, adapters, dtype, weight):
    half = copy.deepcopy(base.unet).to(dtype)
    net = copy.deepcopy(half)
    with pytest.raises(UserError, match=f"is beyond {str(dtype)[6:]}. Give smaller weights"):
        merge_adapter(net, adapters[0], weight)
    assert same(net, half)


@pytest.mark.parametrize("fails", ["LoraModel.merge_and_unload", "PeftModel.load_adapter"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(base, adapters, monkeypatch, fails):
    net, half = (copy.deepcopy(base.unet).to(torch.bfloat16) for _ in range(2))
    kind = {"LoraModel": LoraModel, "PeftModel": PeftModel}[fails.partition(".")[0]]

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(kind, fails.partition(".")[2], fail)
        merge_adapter(net, adapters[0])
    assert same(net, half)
    assert same(merge_adapter(net, adapters[0]), merge_adapter(half, adapters[0]))


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_takes_an_adapter_in_one_line(place, tmp_path, family):
    made = BASES[family](tmp_path / family)
    folder = shared(tmp_path / "run", made, Adapter(rank=2), UNLABELLED, certified=True)
    stock = PIPELINES[family].from_pretrained(made)
    before, bare = pictures(stock, family), copy.deepcopy(stock.unet)
    stock.unet = PeftModel.from_pretrained(stock.unet, str(folder))
    wanted = pictures(stock, family)
    assert far(wanted, before) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_adapter(PIPELINES[family].from_pretrained(made), folder)
        merged = merge_adapter(PIPELINES[family].from_pretrained(made), folder)
        nothing = merge_adapter(PIPELINES[family].from_pretrained(made), folder, weight=0.0)
    assert isinstance(loaded, PIPELINES[family]) and isinstance(loaded.unet, PeftModel)
    assert same(loaded.unet, stock.unet) and same(nothing.unet, bare)
    assert all(far(pictures(other, family), wanted) < 1e-5 for other in (loaded, merged))
    assert far(pictures(nothing, family), before) < 1e-5  # nets round alike only where weights lie alike in memory
    merged.save_pretrained(tmp_path / "saved")
    assert far(pictures(PIPELINES[family].from_pretrained(tmp_path / "saved"), family), wanted) < 1e-5


def test_a_pipeline_with_a_transformer_takes_an_adapter_in_one_line(tmp_path):
    torch.manual_seed(0)
    fresh = DiTTransformer2DModel(2, 8, 4, 4, num_layers=1, sample_size=8, num_embeds_ada_norm=6)
    fresh.requires_grad_(False).eval()
    trained = copy.deepcopy(fresh)
    config = inject_into(trained, Adapter(rank=2))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    as_peft(copy.deepcopy(fresh), trained, config).save_pretrained(tmp_path, save_embedding_layers=False)

    def pipe():
        return DiTPipeline(copy.deepcopy(fresh), tiny_autoencoder(), DDIMScheduler())

    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return torch.tensor(pipe([1, 2], 1.0, noise, num_inference_steps=2, output_type="np").images)

    alone = pipe()
    alone.transformer = trained
    assert far(drawn(load_adapter(pipe(), tmp_path)), drawn(alone)) < 1e-5
    assert far(drawn(merge_adapter(pipe(), tmp_path)), drawn(alone)) < 1e-5
    assert far(drawn(pipe()), drawn(alone)) > 1e-3
    net = merge_adapter(copy.deepcopy(fresh), tmp_path)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        found, wanted = (each(x, t, class_labels=torch.tensor([1, 2])).sample for each in (net, trained))
    assert far(found, wanted) < 1e-5 * wanted.abs().max()
