"""pytorch_lora_weights.safetensors of a stranger: it says what the checked files beside it say, or it is refused."""

import json

import pytest

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE
from dp_peft_diffusion.privacy.certificate import read, verify
from dp_peft_diffusion.privacy.lora_files import check_lora_file, diffusers_takes, lora_metadata, lora_name
from tests.privacy import strangers
from tests.privacy.strangers import A, B

FILE = "pytorch_lora_weights.safetensors"
CONFIG = {"peft_type": "LORA", "target_modules": ["to_q"], "r": 2, "lora_alpha": 2}


def write(folder, arrays=None, metadata=None, **named):
    """The file, beside a certified adapter; arrays by the names of diffusers."""
    if arrays is None:
        arrays = renamed(strangers.tensors())
    if metadata is None:
        metadata = good_metadata(folder)
    (folder / FILE).write_bytes(strangers.safetensors(arrays, metadata=metadata, **named))
    return folder


def renamed(arrays):
    return {lora_name(name): array for name, array in arrays.items()}


def good_metadata(folder):
    return lora_metadata(strangers.config(), read(folder))


@pytest.fixture
def folder(tmp_path):
    strangers.certify(strangers.write_adapter(tmp_path))
    return tmp_path


def levels(folder):
    return {name: (ok, text) for name, ok, text in verify(folder).levels}


def test_a_file_that_says_the_same_verifies_and_is_named(folder):
    strangers.certify(write(folder))
    ok, text = levels(folder)["weights"]
    assert ok and f"{FILE} holds the same 8, bit for bit" in text
    assert FILE in read(folder)["sha256"] and verify(folder).ok


def test_a_file_that_was_not_certified_is_found(folder):
    write(folder)
    ok, text = levels(folder)["files"]
    assert not ok and FILE in text and "not certified" in text


def with_config(**changes):
    def change(metadata):
        said = json.loads(metadata["lora_adapter_metadata"]) | {f"unet.{key}": value for key, value in changes.items()}
        return metadata | {"lora_adapter_metadata": json.dumps(said)}

    return change


def with_promise(**changes):
    return lambda metadata: metadata | {"dp_peft": json.dumps(json.loads(metadata["dp_peft"]) | changes)}


def without(key):
    return lambda metadata: {name: text for name, text in metadata.items() if name != key}


HOSTILE_METADATA = {
    "a pattern for a name": (with_config(target_modules="(([a-z_])+)+.X"), "target_modules"),
    "a pattern in a list": (with_config(target_modules=["(a+)+b"]), "target_modules"),
    "a rank of two million": (with_config(r=2_000_000), "rank"),
    "another rank": (with_config(r=3), "does not say of 'r' what adapter_config.json says"),
    "another alpha": (with_config(lora_alpha=4.0), "'lora_alpha'"),
    "a rank that is a float": (with_config(r=2.0), "rank"),
    "a key that says the usual": (with_config(bias="none"), "'bias'"),
    "a key that peft does not know": (with_config(dp=1), "never writes"),
    "code to import": (with_config(megatron_core="os"), "megatron_core"),
    "no config": (without("lora_adapter_metadata"), "but 'dp_peft, format'"),
    "no promise": (without("dp_peft"), "but 'format, lora_adapter_metadata'"),
    "no format": (without("format"), "but 'dp_peft, lora_adapter_metadata'"),
    "another format": (lambda metadata: metadata | {"format": "tf"}, '"format": "pt"'),
    "more metadata": (lambda metadata: metadata | {"ss_output_name": "x"}, "ss_output_name"),
    "a steering terminal": (lambda metadata: metadata | {"\x1b[2J": "x"}, r"\\x1b"),
    "a config without the prefix": (
        lambda metadata: metadata | {"lora_adapter_metadata": json.dumps({"r": 2})},
        "begin with 'unet.'",
    ),
    "a config that is a list": (lambda metadata: metadata | {"lora_adapter_metadata": "[]"}, "not a JSON object"),
    "a config with a key twice": (lambda metadata: metadata | {"lora_adapter_metadata": '{"a": 1, "a": 2}'}, "twice"),
    "a smaller epsilon": (with_promise(epsilon=0.1), "does not say of 'epsilon' what privacy.json says"),
    "another statement": (with_promise(statement="Nobody can be recognised."), "'statement'"),
    "another base": (with_promise(base={"name": "x", "revision": None, "sha256": "0" * 64}), "'base'"),
    "a promise that says more": (with_promise(note="x"), "'note'"),
    "a promise that is text": (lambda metadata: metadata | {"dp_peft": '"epsilon 1"'}, "not a JSON object"),
}


@pytest.mark.parametrize("plant", HOSTILE_METADATA)
def test_metadata_that_say_otherwise_are_refused(folder, plant):
    change, message = HOSTILE_METADATA[plant]
    strangers.certify(write(folder, metadata=change(good_metadata(folder))))
    ok, text = levels(folder)["weights"]
    assert not ok
    with pytest.raises(PrivacyError, match=message):
        check_lora_file(folder, read(folder))


def altered(name, value):
    arrays = strangers.tensors()
    arrays[name][0, 0] = value
    return renamed(arrays)


def reshaped():
    arrays = strangers.tensors()
    return renamed(arrays | {A: arrays[A].T.copy()})


def lacking(name):
    return renamed({other: array for other, array in strangers.tensors().items() if other != name})


HOSTILE_TENSORS = {
    "other numbers": (lambda: altered(B, 7.0), "holds other numbers"),
    "NaN": (lambda: altered(A, float("nan")), "holds other numbers"),
    "peft's prefix": (strangers.tensors, "does not begin with 'unet.'"),
    "a transformer's prefix": (
        lambda: {name.replace("unet.", "transformer."): array for name, array in altered(A, 1.0).items()},
        "without a word",
    ),
    "a missing tensor": (lambda: lacking(A), "differ in"),
    "a further tensor": (lambda: renamed(strangers.tensors()) | {"unet.x.lora_A.weight": strangers.tensors()[A]}, "x"),
    "another shape": (reshaped, "differ in"),
    "another rank": (lambda: renamed(strangers.tensors(rank=3)), "differ in"),
    "half precision": (
        lambda: {name: array.astype("float16") for name, array in renamed(strangers.tensors()).items()},
        "its type",
    ),
}


@pytest.mark.parametrize("plant", HOSTILE_TENSORS)
def test_tensors_other_than_those_of_the_peft_file_are_refused(folder, plant):
    make, message = HOSTILE_TENSORS[plant]
    strangers.certify(write(folder, arrays=make()))
    ok, text = levels(folder)["weights"]
    assert not ok and FILE in text
    with pytest.raises(PrivacyError, match=message):
        check_lora_file(folder, read(folder))


def test_a_file_that_is_no_safetensors_file_is_refused(folder):
    (folder / FILE).write_bytes(b"\x80\x04pickle")
    strangers.certify(folder)
    ok, text = levels(folder)["weights"]
    assert not ok and "no safetensors file" in text


@pytest.mark.parametrize("change", [{"bias": "all"}, {"trainable_token_indices": {CLASS_TABLE: [1]}}])
def test_no_such_file_may_lie_beside_an_adapter_that_diffusers_would_load_in_part(folder, change):
    write(folder)
    arrays = strangers.tensors()
    if "bias" in change:
        arrays["base_model.model.conv_in.bias"] = arrays[A][0]
    else:
        arrays[f"base_model.model.{CLASS_TABLE}.token_adapter.trainable_tokens_delta"] = arrays[A][:1]
    strangers.write_tensors(folder, arrays)
    strangers.write_config(folder, strangers.config(**change))
    with pytest.raises(PrivacyError, match="cannot load in this way"):
        check_lora_file(folder, read(folder))


def test_no_such_file_may_lie_beside_a_whole_model(tmp_path):
    strangers.certify(strangers.write_model(tmp_path))
    (tmp_path / FILE).write_bytes(strangers.safetensors(renamed(strangers.tensors())))
    strangers.certify(tmp_path)
    ok, text = levels(tmp_path)["weights"]
    assert not ok and "whole model" in text


@pytest.mark.parametrize(
    ("config", "takes"),
    [
        (CONFIG, True),
        (CONFIG | {"use_dora": True, "bias": "none"}, True),
        (CONFIG | {"bias": "all"}, False),
        (CONFIG | {"trainable_token_indices": {CLASS_TABLE: [1]}}, False),
        (CONFIG | {"target_modules": ["to_q", CLASS_TABLE]}, False),
        (CONFIG | {"peft_type": "LOKR"}, False),
    ],
)
def test_only_lora_without_biases_and_class_rows_has_such_a_file(config, takes):
    assert diffusers_takes(config) is takes


def test_the_config_in_the_file_leaves_out_what_goes_without_saying():
    said = json.loads(
        lora_metadata(strangers.config(rank_pattern={}, use_dora=False, use_rslora=True), document())[
            "lora_adapter_metadata"
        ]
    )
    wanted = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": strangers.TARGETS, "use_rslora": True}
    assert said == {f"unet.{key}": value for key, value in wanted.items()}


def document():
    base = {"name": "x", "revision": None, "sha256": "0" * 64, "parts_sha256": None}
    return {"statement": "s", "guarantee": {"epsilon": 1.0, "delta": 1e-5}, "base": base}
