import hashlib
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy.untrusted import (
    MAX_DEPTH,
    MAX_ENTRIES,
    file_names,
    parse_json,
    read_json,
    safetensors_header,
    sha256_of,
)
from tests.privacy.folders import safetensors_bytes, two_tensors


def write(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    return path


def test_the_header_of_a_file_by_the_stock_library_is_read(tmp_path):
    tensors = {"b.weight": np.zeros((2, 3), np.float32), "a": np.zeros((), np.float16), "c": np.zeros((0, 4), np.uint8)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header = safetensors_header(tmp_path / "w.safetensors")
    assert header.metadata == {"format": "pt"}
    assert header.tensors == {"b.weight": ("F32", (2, 3)), "a": ("F16", ()), "c": ("U8", (0, 4))}


def test_every_truncation_and_appended_byte_is_refused(tmp_path):
    whole = safetensors_bytes(*two_tensors())
    safetensors_header(write(tmp_path, whole))
    for content in [whole[:n] for n in range(len(whole))] + [whole + b"\0"]:
        with pytest.raises(PrivacyError):
            safetensors_header(write(tmp_path, content))


TENSOR = "base_model.model.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"},
        {"dtype": "F99"},
        {"dtype": ["F32"]},
        {"dtype": {}},
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": [2.0, 3]},
        {"shape": [True, 6]},
        {"shape": "23"},
        {"shape": [2, 3] + [1] * 7},
        {"shape": [2**63, 0]},
        {"data_offsets": [24, 48]},
        {"data_offsets": [0, 23]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 24, 48]},
        {"data_offsets": [-24, 0]},
        {"extra": 1},
    ],
)
def test_a_malformed_tensor_entry_is_refused(tmp_path, change):
    header, data = two_tensors()
    header[TENSOR] |= change
    with pytest.raises(PrivacyError):
        safetensors_header(write(tmp_path, safetensors_bytes(header, data)))


@pytest.mark.parametrize("metadata", [{"format": "np"}, {"format": "pt", "a": "b"}, {"a": "b"}, "pt", None, [], 1])
def test_metadata_other_than_the_format_is_refused(tmp_path, metadata):
    header, data = two_tensors()
    header["__metadata__"] = metadata
    with pytest.raises(PrivacyError, match="metadata"):
        safetensors_header(write(tmp_path, safetensors_bytes(header, data)))


@pytest.mark.parametrize("name", ["../../etc/x", "", "a b", "a" * 257, "\x1b[31m", "a\n"])
def test_unusual_tensor_names_are_refused(tmp_path, name):
    header, data = two_tensors()
    header[name] = header.pop(TENSOR)
    with pytest.raises(PrivacyError, match="unusual name"):
        safetensors_header(write(tmp_path, safetensors_bytes(header, data)))


@pytest.mark.parametrize("text", [b"[]", b"null", b"{" * 50_000, b'{"a": NaN}', b'{"a": {}, "a": {}}', b" " * 8])
def test_a_header_that_is_no_strict_json_object_is_refused(tmp_path, text):
    with pytest.raises(PrivacyError):
        safetensors_header(write(tmp_path, safetensors_bytes(text)))


def test_a_huge_header_length_allocates_nothing(tmp_path):
    with pytest.raises(PrivacyError, match="header is cut off"):
        safetensors_header(write(tmp_path, b"\xff" * 8 + b"{}"))


def test_pipes_folders_and_missing_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        for read in (sha256_of, safetensors_header):
            with pytest.raises(PrivacyError, match="missing, or not a regular file"):
                read(path)


def test_strict_json_keeps_exact_numbers():
    assert parse_json(b'{"a": 0.27824151363383415, "b": [1, 1e-05]}', "x") == {"a": 500 / 1797, "b": [1, 1e-5]}


@pytest.mark.parametrize(
    "text", [b"NaN", b"-Infinity", b"[1e999]", b'{"a": 1, "a": 1}', b'{"b": {"a": 1, "a": 1}}', b'"\xff"']
)
def test_what_two_readers_may_read_differently_is_no_strict_json(text):
    with pytest.raises(PrivacyError, match="x is not strict JSON"):
        parse_json(text, "x")


def test_a_hash_is_that_of_the_bytes(tmp_path):
    content = os.urandom(3_000_000)
    assert sha256_of(write(tmp_path, content)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("README.md", 1 << 20),
        ("adapter_config.json", 1 << 20),
        ("adapter_model.safetensors", 256 << 20),
        ("pytorch_lora_weights.safetensors", 256 << 20),
        ("diffusion_pytorch_model.safetensors", 2 << 30),
    ],
)
def test_a_file_above_the_limit_of_its_name_is_not_read(tmp_path, name, limit):
    path = tmp_path / name
    path.touch()
    os.truncate(path, limit + 1)
    for read in (sha256_of, safetensors_header, read_json):
        with pytest.raises(PrivacyError, match=f"{name} is larger than {limit} bytes"):
            read(path)


def test_a_disk_that_fails_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = write(tmp_path, b"{}")
    monkeypatch.setattr(type(path), "open", fail)
    for read in (sha256_of, safetensors_header, read_json):
        with pytest.raises(PrivacyError, match=r"weights.safetensors cannot be read: Input/output error"):
            read(path)


@pytest.mark.parametrize("read", [sha256_of, read_json, safetensors_header])
@pytest.mark.parametrize("bottomless", ["status", "pagemap"])
def test_a_link_to_a_file_that_says_it_is_empty_and_never_ends_is_refused(tmp_path, read, bottomless):
    if not os.path.exists(f"/proc/self/{bottomless}"):
        pytest.skip("needs /proc")
    (tmp_path / "README.md").symlink_to(f"/proc/self/{bottomless}")
    signal.alarm(20)  # so that a regression ends the tests instead of keeping them for ever
    with pytest.raises(PrivacyError):
        read(tmp_path / "README.md")
    signal.alarm(0)


def test_the_files_of_a_folder_are_listed_with_links_to_files_and_not_with_folders(tmp_path):
    (tmp_path / "unet" / "empty").mkdir(parents=True)
    (tmp_path / "unet" / "config.json").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").write_text("{}")
    assert file_names(tmp_path) == ["blob", "unet/config.json"]
    with pytest.raises(PrivacyError, match="cannot be read"):
        file_names(tmp_path / "nowhere")


def test_a_folder_too_deep_too_full_or_with_a_link_to_a_folder_is_refused(tmp_path):
    deep, full, linked = (tmp_path / name for name in ("deep", "full", "linked"))
    (deep / "/".join("a" * (MAX_DEPTH + 1))).mkdir(parents=True)
    assert file_names(deep) == []
    (deep / "/".join("a" * (MAX_DEPTH + 2))).mkdir()
    with pytest.raises(PrivacyError, match=f"deeper than {MAX_DEPTH}"):
        file_names(deep)
    full.mkdir()
    for number in range(MAX_ENTRIES + 1):
        (full / str(number)).touch()
    with pytest.raises(PrivacyError, match="more than 10,000 entries"):
        file_names(full)
    (full / "0").unlink()
    assert len(file_names(full)) == MAX_ENTRIES
    linked.mkdir()
    (linked / "unet").symlink_to(full)
    with pytest.raises(PrivacyError, match="link to a folder"):
        file_names(linked)
