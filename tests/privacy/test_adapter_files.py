"""What our own kinds write passes, on its base and no other; each way of not fitting is found."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_base_folder, tiny_unet

from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import check_adapter, read_adapter
from dp_peft_diffusion.privacy.adapter_form import MAX_SCALE, check_config
from dp_peft_diffusion.privacy.adapter_layers import adapter_layers, check_fit
from dp_peft_diffusion.privacy.model_files import read_base
from dp_peft_diffusion.privacy.untrusted import EXPONENTS, check_finite, safetensors_header
from dp_peft_diffusion.recipe import ADAPTER_KINDS, Adapter
from dp_peft_diffusion.sharing.export import write_adapter, write_model
from tests.privacy import strangers

INJECTED = [kind for kind in ADAPTER_KINDS if kind not in ("full", "code_moments")]  # which needs another base


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny_base_folder(tmp_path_factory.mktemp("base") / "base", packing=1)


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder))


def certify(folder, base):
    strangers.write_base_of(folder, name="./base", sha256=base.sha256)


@pytest.mark.parametrize("code_rank", [None, 3])
@pytest.mark.parametrize("kind", INJECTED)
def test_what_every_kind_writes_fits_its_base(base, base_folder, kind, code_rank, tmp_path):
    spec = Adapter(kind=kind, rank=2, lora_alpha=5.0, class_code_rank=code_rank)
    write_adapter(base, inject_adapter(base, spec, 3), tmp_path)
    certify(tmp_path, base)
    said = check_adapter(tmp_path, base_folder)
    assert "all finite. Fits base, whose weights are those certified." in said
    assert "NOT CHECKED: whether it fits its base, ./base. Say where that lies: --base FOLDER" in check_adapter(
        tmp_path
    )
    (tmp_path / "privacy.json").unlink()
    assert "no certificate names its weights" in check_adapter(tmp_path, base_folder)


@pytest.mark.parametrize("kind", [kind for kind in INJECTED if kind != "class_rows"])
def test_no_kind_fits_a_base_of_other_widths(base, kind, tmp_path):
    write_adapter(base, inject_adapter(base, Adapter(kind=kind, rank=2)), tmp_path)
    adapter = read_adapter(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in base.unet.state_dict().items()}
    check_fit(adapter.config, adapter.layers, shapes, "it")
    for name, shape in shapes.items():
        other = shapes | {name: (*shape[:-1], 2 * shape[-1])}
        touched = name.removesuffix(".weight").removesuffix(".bias") in adapter.layers.layers
        # Convolutions and biases of layers whose adapter does not say their inputs or their bias may differ.
        if touched and name.endswith(".weight") and kind not in ("ia3", "vera"):
            with pytest.raises(UserError, match="does not fit"):
                check_fit(adapter.config, adapter.layers, other, "it")
    for module in adapter.layers.layers:
        lacking = {name: shape for name, shape in shapes.items() if name != f"{module}.weight"}
        with pytest.raises(UserError, match=r"which it does not have|does not fit|lacks"):
            check_fit(adapter.config, adapter.layers, lacking, "it")
    target = next(iter(adapter.layers.layers))
    with pytest.raises(UserError, match="for which there are no tensors"):
        check_fit(adapter.config, adapter.layers, shapes | {f"more.{target}.weight": shapes[f"{target}.weight"]}, "it")


def test_another_base_of_the_same_shape_is_found_by_its_fingerprint(base, base_folder, tmp_path):
    other = tiny_base_folder(tmp_path / "other", packing=1)
    tiny_unet(seed=1).save_pretrained(other / "unet")
    write_adapter(base, inject_adapter(base, Adapter(rank=2)), tmp_path)
    certify(tmp_path, base)
    check_adapter(tmp_path, base_folder)
    with pytest.raises(UserError, match=rf"trained on ./base with weights {base.sha256[:12]}.*Give the right one"):
        check_adapter(tmp_path, other)


def test_a_folder_without_a_base_is_refused(tmp_path):
    strangers.write_adapter(tmp_path)
    with pytest.raises(UserError, match="Give the diffusers folder of a base"):
        check_adapter(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_fingerprint_of_a_base_is_that_of_the_net_diffusers_loads(tmp_path, dtype):
    tiny_base_folder(tmp_path)
    tiny_unet(packing=2).to(dtype).save_pretrained(tmp_path / "unet")
    loaded = load_base(str(tmp_path))
    found = read_base(tmp_path)
    assert found.sha256 == loaded.sha256
    assert found.shapes == {name: tuple(value.shape) for name, value in loaded.unet.state_dict().items()}


def test_the_fingerprint_of_a_base_with_the_old_names_of_attention_is_that_of_the_net_diffusers_loads(tmp_path):
    tiny_base_folder(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        arrays = {name.replace(f".{new}.", f".{old}."): array for name, array in arrays.items()}
    save_file(arrays, path, {"format": "pt"})
    assert "mid_block.attentions.0.query.weight" in arrays
    assert read_base(tmp_path).sha256 == load_base(str(tmp_path)).sha256


def test_the_built_in_base_is_found_without_being_named(tmp_path):
    strangers.write_base_of(strangers.write_adapter(tmp_path))
    said = check_adapter(tmp_path)
    assert said.startswith("LORA on 4 layers in 8 tensors, all finite. Fits builtin:handwriting, whose weights are")
    assert strangers.HANDWRITING_SHA256 == load_base("builtin:handwriting").sha256


def test_a_whole_model_fits_the_base_that_it_was(base, base_folder, tmp_path):
    write_model(base, inject_adapter(base, Adapter(kind="full"), 3), tmp_path)
    certify(tmp_path, base)
    assert "A whole model of" in check_adapter(tmp_path, base_folder)
    other = tiny_base_folder(tmp_path / "other", num_class_embeds=None, packing=1)
    (tmp_path / "privacy.json").unlink()
    with pytest.raises(UserError, match="not of the shape"):
        check_adapter(tmp_path, other)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exactly_the_files_with_a_number_that_is_not_finite_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("file") / "adapter_model.safetensors"
    dtype = data.draw(st.sampled_from(sorted(EXPONENTS)))
    kind = EXPONENTS[dtype][0]
    bits = data.draw(st.lists(st.integers(0, 2 ** (8 * np.dtype(kind).itemsize) - 1), min_size=1, max_size=20))
    path.write_bytes(strangers.safetensors({"x": np.array(bits, kind)}, dtypes={"x": dtype}))
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    numbers = torch.frombuffer(bytearray(np.array(bits, kind).tobytes()), dtype=types[dtype])
    finite = bool(torch.isfinite(numbers).all())
    try:
        check_finite(path, safetensors_header(path))
        accepted = True
    except PrivacyError:
        accepted = False
    assert accepted == finite


@pytest.mark.parametrize("at", [0, 2_500_000, 4_999_999])
def test_a_number_that_is_not_finite_is_found_in_any_chunk_of_a_large_tensor(tmp_path, at):
    array = np.zeros(5_000_000, np.float32)
    array[at] = np.nan
    (tmp_path / "w.safetensors").write_bytes(strangers.safetensors({"x": array}))
    with pytest.raises(PrivacyError, match="x holds numbers that are not finite"):
        check_finite(tmp_path / "w.safetensors", safetensors_header(tmp_path / "w.safetensors"))


def test_a_file_that_is_cut_off_between_two_looks_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(strangers.safetensors({"x": np.zeros(10, np.float32)}))
    header = safetensors_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PrivacyError, match="grew shorter"):
        check_finite(path, header)


PLAIN = {"target_modules": ["m"]}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **PLAIN}
LOKR = {"peft_type": "LOKR", "r": 2, "alpha": 2, **PLAIN}
OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 2, **PLAIN}
VERA = {"peft_type": "VERA", "r": 2, "projection_prng_key": 0, "save_projection": True, **PLAIN}
COPY = {"peft_type": "LN_TUNING", **PLAIN}
IA3 = {"peft_type": "IA3", "feedforward_modules": [], **PLAIN}


def shapes(**ends):
    """{"lora_A.weight": shape} -> tensors of module m; a name with a path is taken as it is."""
    return {name if "base_model" in name else f"base_model.model.m.{name}": shape for name, shape in ends.items()}


def vera(a=(2, 6), b=(5, 2), **ends):
    group = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), **ends}
    return shapes(**group, **{"base_model.vera_A": a, "base_model.vera_B": b})


@pytest.mark.parametrize(
    ("config", "tensors", "layer"),
    [
        (LORA, shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2)}), (5, 6)),
        (LORA, shapes(**{"lora_A.weight": (2, 6, 3, 3), "lora_B.weight": (5, 2, 1, 1)}), (5, 6, 3, 3)),
        (LORA, shapes(lora_embedding_A=(2, 9), lora_embedding_B=(4, 2)), (9, 4)),
        (LOKR, shapes(lokr_w1=(2, 3), lokr_w2=(5, 7)), (10, 21)),
        (LOKR, shapes(lokr_w1=(2, 3), lokr_w2=(5, 7, 3, 3)), (10, 189)),
        (LOKR, shapes(lokr_w1_a=(3, 2), lokr_w1_b=(2, 4), lokr_w2_a=(5, 2), lokr_w2_b=(2, 6)), (15, 24)),
        (OFT, shapes(**{"oft_R.weight": (8, 1)}), (None, 16)),
        (OFT, shapes(**{"oft_R.weight": (4, 6)}), (None, 16)),
        (VERA, vera(), (5, None)),
        (COPY, shapes(**{"ln_tuning_layers.weight": (5, 6), "ln_tuning_layers.bias": (5,)}), (5, 6)),
        (COPY, shapes(**{"ln_tuning_layers.weight": (5,)}), (5,)),
        (IA3, shapes(ia3_l=(5, 1)), (5, None)),
        (IA3, shapes(ia3_l=(1, 5, 1, 1)), (5, None)),
    ],
)
def test_the_shape_of_a_layer_follows_from_its_tensors(config, tensors, layer):
    assert adapter_layers(check_config(config), tensors).layers == {"m": layer}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (LORA, shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 3)})),
        (LORA, shapes(**{"lora_A.weight": (2,), "lora_B.weight": (5, 2)})),
        (LORA, shapes(**{"lora_A.weight": (), "lora_B.weight": ()})),
        (LORA, shapes(**{"lora_A.weight": (2, 0), "lora_B.weight": (5, 2)})),
        (LORA, shapes(**{"lora_A.weight": (2, 6, 3, 3), "lora_B.weight": (5, 2, 3, 3)})),
        (LORA, shapes(lora_embedding_A=(3, 9), lora_embedding_B=(4, 3))),
        (LORA, shapes(lora_embedding_A=(2, 9), lora_embedding_B=(4,))),
        (LORA, shapes(**{"lora_A.weight": (2, 6), "lora_embedding_B": (5, 2)})),
        (LORA, shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "lora_magnitude_vector": (5,)})),
        (LORA | {"use_dora": True}, shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2)})),
        (
            LORA | {"use_dora": True},
            shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "lora_magnitude_vector": (6,)}),
        ),
        (LOKR, shapes(lokr_w1=(2, 3))),
        (LOKR, shapes(lokr_w1=(2, 3, 1), lokr_w2=(5, 7))),
        (LOKR, shapes(lokr_w1=(2, 3), lokr_w2_a=(5, 3), lokr_w2_b=(3, 6))),
        (OFT, shapes(**{"oft_R.weight": (8,)})),
        (OFT, shapes(**{"oft_R.weight": (8, 2)})),
        (VERA, vera(vera_lambda_d=(3,))),
        (VERA, vera(vera_lambda_b=(5, 1))),
        (VERA, vera(a=(3, 6))),
        (VERA, vera(a=(2, 0))),
        (VERA, vera(b=(6, 2))),
        (VERA, shapes(vera_lambda_b=(5,), vera_lambda_d=(2,))),
        (LORA, vera()),
        (COPY, shapes(**{"ln_tuning_layers.weight": ()})),
        (COPY, shapes(**{"ln_tuning_layers.weight": (5, 6), "ln_tuning_layers.bias": (6,)})),
        (COPY, shapes(**{"ln_tuning_layers.bias": (5,)})),
        (IA3, shapes(ia3_l=(1, 5))),
        (IA3, shapes(ia3_l=())),
        (IA3 | {"modules_to_save": ["class_embedding"]}, shapes(ia3_l=(5, 1))),
        (IA3, shapes(ia3_l=(5, 1), **{"base_model.model.class_embedding.weight": (9, 4)})),
        (LORA, shapes(**{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "base_model.model.n.bias": (5,)})),
        (LORA, {}),
    ],
)
def test_tensors_that_are_no_whole_adapter_are_refused(config, tensors):
    with pytest.raises(PrivacyError):
        adapter_layers(check_config(config), tensors)


BIASES = LORA | {"bias": "all"}
BIASED = shapes(
    **{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "base_layer.bias": (5,), "base_model.model.n.bias": (3,)}
)
NET = {"m.weight": (5, 6), "m.bias": (5,), "n.weight": (3, 3), "n.bias": (3,)}
ROWS = LORA | {"trainable_token_indices": {"class_embedding": [1, 8]}}
ROWED = shapes(
    **{"lora_A.weight": (2, 6), "lora_B.weight": (5, 2)},
    **{"base_model.model.class_embedding.token_adapter.trainable_tokens_delta": (2, 4)},
)


@pytest.mark.parametrize(
    ("config", "tensors", "good", "bad"),
    [
        (BIASES, BIASED, NET, NET | {"k.bias": (1,)}),
        (BIASES, BIASED, NET, NET | {"n.bias": (4,)}),
        (ROWS, ROWED, NET | {"class_embedding.weight": (9, 4)}, NET | {"class_embedding.weight": (8, 4)}),
        (ROWS, ROWED, NET | {"class_embedding.weight": (9, 4)}, NET | {"class_embedding.weight": (9, 5)}),
        (ROWS, ROWED, NET | {"class_embedding.weight": (9, 4)}, NET),
        (VERA, vera(), NET, NET | {"m.weight": (5, 7)}),
        (VERA, vera(), NET, NET | {"m.weight": (4, 6)}),
        (VERA, vera(), NET, NET | {"m.weight": ()}),
        (COPY, shapes(**{"ln_tuning_layers.weight": (5, 6)}), {"m.weight": (5, 6)}, NET),
        (LOKR, shapes(lokr_w1=(5, 3), lokr_w2=(1, 2)), NET, NET | {"m.weight": (5, 6, 1, 2)}),
    ],
)
def test_whole_parameters_must_fit_the_base_too(config, tensors, good, bad):
    config = check_config(config)
    layers = adapter_layers(config, tensors)
    check_fit(config, layers, good, "it")
    with pytest.raises(UserError):
        check_fit(config, layers, bad, "it")


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "target_modules"])
def test_a_config_needs_its_numbers(missing):
    with pytest.raises(PrivacyError, match=f"lacks {missing}"):
        check_config({key: value for key, value in LORA.items() if key != missing})


@pytest.mark.parametrize("config", [LORA, LOKR])
def test_alpha_may_be_at_most_64_times_the_rank_everywhere(config):
    name = "lora_alpha" if config is LORA else "alpha"
    check_config(config | {name: 2 * MAX_SCALE})
    check_config(config | {name: 3 * MAX_SCALE, "r": 3})
    check_config(config | {"rank_pattern": {"m": 4}, "alpha_pattern": {"m": 4 * MAX_SCALE}})
    for change in ({name: 2 * MAX_SCALE + 1}, {name: 3 * MAX_SCALE, "r": 3, "rank_pattern": {"m": 1}}):
        with pytest.raises(PrivacyError, match="times the rank"):
            check_config(config | change)


def test_the_config_that_stock_peft_writes_for_a_plain_lora_passes(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(copy.deepcopy(base.unet), LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"])).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert "LORA on 1 layers" in check_adapter(tmp_path)


def test_a_whole_model_without_classes_is_read(tmp_path):
    folder = tiny_base_folder(tmp_path / "model", num_class_embeds=None, packing=1)
    assert check_adapter(folder).startswith("A whole model")
