"""Bases in several files, and what a stranger's folder may not bring along."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy import untrusted
from dp_peft_diffusion.privacy.model_files import check_model, has_weights, read_base
from tests.privacy import strangers

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path):
    """The built-in base in two files and an index, every other tensor in each."""
    tensors = load_file(strangers.HANDWRITING / "unet" / WEIGHTS)
    where = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    (tmp_path / "unet").mkdir()
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
        save_file(part, tmp_path / "unet" / shard, {"format": "pt"})
    (tmp_path / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tmp_path


def test_a_base_in_several_files_has_the_fingerprint_of_the_same_base_in_one(sharded):
    assert has_weights(sharded) and not has_weights(sharded / "unet" / "nothing")
    assert read_base(sharded) == read_base(strangers.HANDWRITING)


def test_the_limit_on_strangers_files_is_none_of_a_base(sharded, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_MODEL_BYTES", 10)
    monkeypatch.setattr(untrusted, "MAX_ADAPTER_BYTES", 10)
    assert read_base(sharded).sha256 == strangers.HANDWRITING_SHA256
    assert read_base(strangers.HANDWRITING).sha256 == strangers.HANDWRITING_SHA256


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": f"../{SHARDS[0]}"}},
        {"weight_map": {"a": 1}},
    ],
)
def test_an_index_that_names_anything_but_shards_is_refused(sharded, index):
    (sharded / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(PrivacyError, match="does not name the files of its tensors"):
        read_base(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    (sharded / "unet" / SHARDS[1]).write_bytes((sharded / "unet" / SHARDS[0]).read_bytes())
    with pytest.raises(PrivacyError, match="which another file holds too"):
        read_base(sharded)


@pytest.mark.parametrize(
    "name", ["vae/config.json", "vqvae/config.json", "encoder/config.json", f"unet/{WEIGHTS}.index.json"]
)
def test_a_strangers_model_may_not_bring_more_than_is_checked(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(PrivacyError, match="is no part of a net that trained as a whole"):
        check_model(tmp_path)
