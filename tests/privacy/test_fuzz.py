"""Files altered at random, from fixed seeds: refused with a sentence, or read as the stock libraries read them.

500 in the fast suite; 10,000 with `pytest -m slow tests/privacy/test_fuzz.py`.
"""

import copy
import json
import random
import re
import struct
import time

import numpy as np
import pytest
import safetensors.numpy

from dp_peft_diffusion.cli.inspection import inspect_files
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import read_adapter
from dp_peft_diffusion.privacy.adapter_layers import check_fit
from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.model_files import read_base
from dp_peft_diffusion.privacy.untrusted import sha256_of
from tests.privacy import strangers

MUTANTS = 20  # of each seed
FAST, SLOW = range(20), range(100, 500)  # seeds of adapters: config and tensors
FAST_CERTIFICATES, SLOW_CERTIFICATES = range(5), range(100, 200)
MAX_SECONDS = 10
BASE = read_base(strangers.HANDWRITING)
SPITEFUL = (
    *("NaN", "-Infinity", "1e999", "-1", "0", "9" * 5000, "1e-400", "18446744073709551616", "2.0", "-0.0", "01"),
    *("true", "null", "[]", "{}", '""', r'"\ud800"', '"\x00"', '"(a+)+$"', '"../../x"', "[" * 3000, '{"a":' * 3000),
    *('"BF16"', '"F8_E4M3"', "[0, 1]", "[-1, 1]", "[[1]]", '{"format": "pt", "x": "y"}', "'", "//", "\ufeff", "\u202e"),
)
VALUES = [
    0,
    -1,
    1,
    2,
    3,
    257,
    10**30,
    0.5,
    -0.0,
    1e300,
    True,
    False,
    None,
    "",
    "x",
    "(a+)+$",
    "\x1b",
    [],
    {},
    [[]],
    {"a": 1},
]


def altered_bytes(rng, content):
    """One of the ways in which bytes go wrong."""
    content, at = bytearray(content), rng.randrange(len(content))
    end = min(len(content), at + rng.choice((1, 2, 8, 100)))
    way = rng.randrange(7)
    if way == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del content[at:]
    elif way == 2:
        del content[at:end]
    elif way == 3:
        content[at:at] = rng.randbytes(end - at)
    elif way == 4:
        content[at:end] = rng.randbytes(end - at)
    elif way == 5:
        content[at:at] = content[at:end]
    else:
        content[at:end] = rng.choice(SPITEFUL).encode()
    return bytes(content)


def places(document, path=()):
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def altered_document(rng, document):
    """JSON text of a document of which one place has another value, another name, is gone or stands twice."""
    *path, last = rng.choice([place for place in places(document) if place])
    document = copy.deepcopy(document)
    parent = document
    for key in path:
        parent = parent[key]
    way = rng.randrange(5)
    if way == 0:
        del parent[last]
    elif way == 1:
        parent[last] = rng.choice(VALUES)
    elif way == 2:
        parent[last] = "SPITE"
        return json.dumps(document).replace('"SPITE"', rng.choice(SPITEFUL)).encode()
    elif way == 3 and isinstance(parent, dict):
        parent[rng.choice(("x", "__proto__", "peft_type", "__metadata__", last + "\u200b"))] = parent.pop(last)
    else:
        text = json.dumps(document)
        key = json.dumps(last) if isinstance(last, str) else '"r"'
        return re.sub(re.escape(key) + r": ", lambda found: f"{key}: 7, {found[0]}", text, count=1).encode()
    return json.dumps(document).encode()


def altered_safetensors(rng, content):
    if rng.random() < 0.4:
        return altered_bytes(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    header = altered_document(rng, json.loads(header)) if rng.random() < 0.7 else altered_bytes(rng, header)
    length = rng.choice((len(header), len(header), len(header), len(header) + 1, 0, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + data


def altered_json(rng, content):
    return altered_document(rng, json.loads(content)) if rng.random() < 0.6 else altered_bytes(rng, content)


def refused(deed):
    """Whether something is refused by an error of ours; any other error is the test's failure."""
    begin = time.perf_counter()
    try:
        deed()
    except (PrivacyError, UserError) as error:
        assert str(error) and len(str(error)) < 2000
        str(error).encode()  # can be printed
        return True
    finally:
        assert time.perf_counter() - begin < MAX_SECONDS
    return False


def check(folder):
    adapter = read_adapter(folder)
    check_fit(adapter.config, adapter.layers, BASE.shapes, "the base")


def check_that_what_is_accepted_is_harmless(folder):
    """Everything that was accepted reads the same with the stock libraries, and is small, finite and literal."""
    arrays = safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())
    assert set(arrays) == {name for name in strangers.tensors()}
    assert all(np.isfinite(array).all() for array in arrays.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(set(config["target_modules"])) == strangers.TARGETS
    assert config["r"] == 2 and 0 < config["lora_alpha"] <= 128
    assert all(array.shape in ((2, 96), (96, 2)) for array in arrays.values())
    assert set(config) <= {*strangers.config(), *("revision", "peft_version", "use_dora")}


def fuzz_adapter(folder, seed):
    rng = random.Random(seed)
    strangers.write_adapter(folder)
    files = {"adapter_config.json": altered_json, "adapter_model.safetensors": altered_safetensors}
    good = {name: (folder / name).read_bytes() for name in files}
    certified = {name: sha256_of(folder / name) for name in files}
    for _ in range(MUTANTS):
        name = rng.choice(list(files))
        changed = files[name](rng, good[name])
        (folder / name).write_bytes(changed)
        if not refused(lambda: check(folder)):
            check_that_what_is_accepted_is_harmless(folder)
        assert changed == good[name] or sha256_of(folder / name) != certified[name]
        refused(lambda: inspect_files(folder))
        (folder / name).write_bytes(good[name])
    assert not refused(lambda: check(folder))


def fuzz_certificate(folder, seed):
    rng = random.Random(seed)
    path = folder / "privacy.json"
    good = path.read_bytes()
    for _ in range(MUTANTS):
        changed = altered_json(rng, good)
        path.write_bytes(changed)
        assert not refused(lambda: check_that_the_promise_is_no_smaller(folder, json.loads(good)))
        refused(lambda: inspect_files(folder))
    path.write_bytes(good)


def check_that_the_promise_is_no_smaller(folder, original):
    """`verify` reports and never raises; what it lets pass promises as much as the original."""
    report = verify(folder)
    assert all(text for _, _, text in report.levels)
    if not report.ok:
        return
    document = json.loads((folder / "privacy.json").read_text())
    for key in ("statement", "unit", "neighboring_relation", "tuning", "covers", "excludes", "sha256", "key_source"):
        assert document[key] == original[key], key
    assert report.epsilon == original["guarantee"]["epsilon"]
    if document["mechanism"] == original["mechanism"]:
        for rate, odds in document["guarantee"]["max_tpr_at_fpr"].items():
            assert odds >= original["guarantee"]["max_tpr_at_fpr"][rate] * (1 - 2e-3)


@pytest.fixture(scope="module")
def certified_folder(tmp_path_factory):
    folder = strangers.write_adapter(tmp_path_factory.mktemp("certified") / "folder")
    strangers.certify(folder)
    assert verify(folder).ok
    return folder


@pytest.mark.parametrize("seed", FAST_CERTIFICATES)
def test_an_altered_certificate_is_refused_or_promises_no_less(certified_folder, seed):
    fuzz_certificate(certified_folder, seed)


@pytest.mark.slow
def test_two_thousand_altered_certificates_are_refused_or_promise_no_less(certified_folder):
    for seed in SLOW_CERTIFICATES:
        fuzz_certificate(certified_folder, seed)


@pytest.mark.parametrize("seed", FAST)
def test_an_altered_adapter_is_refused_or_harmless(tmp_path, seed):
    fuzz_adapter(tmp_path, seed)


@pytest.mark.slow
def test_eight_thousand_altered_adapters_are_refused_or_harmless(tmp_path):
    for seed in SLOW:
        fuzz_adapter(tmp_path, seed)
