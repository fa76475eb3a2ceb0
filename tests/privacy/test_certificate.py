import copy
import json
import shutil

import pytest

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.certificate import CANNOT_PROVE, verify
from dp_peft_diffusion.privacy.certificate_levels import mechanism_of
from tests.privacy.folders import N, make_folder, mechanism, safetensors_bytes, two_tensors


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certified") / "run"
    make_folder(folder)
    return folder


@pytest.fixture
def folder(certified, tmp_path):
    return shutil.copytree(certified, tmp_path / "run")


def failed(report):
    return {name for name, ok, _ in report.levels if not ok}


def tamper(folder, *path, value):
    document = json.loads((folder / "privacy.json").read_text())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "privacy.json").write_text(json.dumps(document))


def test_an_honest_folder_passes_every_level(folder):
    report = verify(folder)
    assert report.ok, report.levels
    assert report.epsilon == 1.0
    assert [name for name, _, _ in report.levels] == [
        "certificate", "files", "weights", "mechanism", "epsilon", "figures", "key", "gradients",
    ]  # fmt: skip
    assert all(sentence.endswith(".") for _, _, sentence in report.levels)
    assert len(CANNOT_PROVE) == 6


def test_the_certificate_has_the_documented_keys_and_exact_numbers(folder):
    document = certificate.read(folder)
    assert " ".join(document) == (
        "schema statement guarantee unit neighboring_relation mechanism accounting public_inputs tuning "
        "other_releases base key_source gradient_check covers excludes sha256"
    )
    assert " ".join(document["guarantee"]) == "epsilon delta mu_gdp profile max_tpr_at_fpr"
    assert document["public_inputs"] == {"class_names": ["0", "1", "déjà vu"], "resolution": 32, "num_examples": N}
    assert mechanism_of(document) == mechanism()
    assert document["accounting"]["epsilon_priced"] == mechanism().epsilon(1e-5)
    assert document["mechanism"]["count"] == 200
    assert set(document["sha256"]) == {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "README.md"}


def test_the_statement_says_relation_n_factor_and_attack_odds(folder):
    words = certificate.read(folder)["statement"]
    for part in ("replaced by nothing", "e^1 = 2.718", "1e-05", "1797", "zero_out", "1 %", "-GDP"):
        assert part in words


def test_asked_for_epsilon_is_stated_and_otherwise_the_price_rounded_up(tmp_path):
    priced = mechanism().epsilon(1e-5)
    assert certificate.promised_epsilon(mechanism(), 1e-5, 1.0) == 1.0
    assert priced <= certificate.promised_epsilon(mechanism(), 1e-5) <= priced * 1.002
    with pytest.raises(UserError, match="costs epsilon 1 .* above 0.9"):
        certificate.promised_epsilon(mechanism(), 1e-5, 0.9)
    with pytest.raises(UserError, match="costs epsilon inf"):
        certificate.promised_epsilon(mechanism(noise_multiplier=0.01), 1e-5)
    assert make_folder(tmp_path / "run", epsilon=None)["guarantee"]["epsilon"] == 1.0
    assert verify(tmp_path / "run").ok


def test_under_add_or_remove_one_n_appears_nowhere(tmp_path):
    private_n = mechanism(num_examples=None, neighboring_relation="add_or_remove_one", sampling_prob=0.27)
    make_folder(tmp_path / "run", mechanism=private_n)
    assert verify(tmp_path / "run").ok
    assert str(N) not in json.dumps({**certificate.read(tmp_path / "run"), "sha256": {}})
    tamper(tmp_path / "run", "public_inputs", "num_examples", value=N)
    assert "mechanism" in failed(verify(tmp_path / "run"))


def test_a_given_key_fails_verification(tmp_path):
    make_folder(tmp_path / "run", key_source="given")
    assert failed(verify(tmp_path / "run")) == {"key"}


@pytest.mark.parametrize(
    ("path", "value", "level"),
    [
        (("guarantee", "epsilon"), 0.9, "epsilon"),
        (("guarantee", "delta"), 1e-6, "epsilon"),
        (("guarantee", "delta"), 9e-4, "epsilon"),
        (("guarantee", "mu_gdp"), 0.1, "figures"),
        (("guarantee", "max_tpr_at_fpr", "0.01"), 0.011, "figures"),
        (("guarantee", "profile", 4, "epsilon"), 0.5, "figures"),
        (("accounting", "epsilon_priced"), 0.5, "figures"),
        (("statement",), "Perfectly private.", "figures"),
        (("neighboring_relation",), "add_or_remove_one", "mechanism"),
        (("mechanism", "sampling_prob"), 0.1, "mechanism"),
        (("mechanism", "expected_batch_size"), 400, "mechanism"),
        (("mechanism", "noise_multiplier"), 10.0, "epsilon"),
        (("mechanism", "count"), 400, "epsilon"),
        (("public_inputs", "num_examples"), 60000, "mechanism"),
        (("public_inputs", "num_examples"), "1797", "mechanism"),
        (("sha256", "recipe.yaml"), "b" * 64, "files"),
        (("key_source",), "given", "key"),
    ],
)
def test_a_changed_certificate_fails_at_its_level(folder, path, value, level):
    tamper(folder, *path, value=value)
    report = verify(folder)
    assert not report.ok
    assert level in failed(report)


def every_path(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from every_path(inner, (*path, key))


FREE_TEXT = {("base", "name"), ("base", "revision"), ("accounting", "version"), ("public_inputs",)}


@pytest.mark.parametrize("bad", ["x", True, [[]], {"a": 1}, -1, 1e300])
def test_no_field_takes_a_value_of_another_kind(certified, bad):
    original = json.loads((certified / "privacy.json").read_text())
    for path in every_path(original):
        if path[:1] in FREE_TEXT or path[:2] in FREE_TEXT or not path or path == ("statement",):
            continue
        document = copy.deepcopy(original)
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = bad
        with pytest.raises(PrivacyError, match=r"privacy\.json"):
            certificate.check_form(document)


def test_no_key_may_be_missing_or_added_anywhere(certified):
    original = json.loads((certified / "privacy.json").read_text())
    for path in every_path(original):
        document = copy.deepcopy(original)
        place = document
        for key in path:
            place = place[key]
        if not isinstance(place, dict) or path == ("public_inputs",):
            continue
        added, missing = copy.deepcopy(document), document
        place = added
        for key in path:
            place = place[key]
        place["note"] = "hello"
        with pytest.raises(PrivacyError):
            certificate.check_form(added)
        if path != ("sha256",):
            place = missing
            for key in path:
                place = place[key]
            place.pop(next(iter(place)))
            with pytest.raises(PrivacyError):
                certificate.check_form(missing)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema": NaN}',
        b'{"schema": -Infinity}',
        b'{"schema": 1e999}',
        b'{"schema": 1, "schema": 1}',
        b'{"schema": "\\ud800"}',
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 10_000 + b"}",
        b" " * 2_000_000,
    ],
)
def test_a_broken_certificate_is_a_failed_level_and_no_traceback(folder, text):
    (folder / "privacy.json").write_bytes(text)
    report = verify(folder)
    assert (report.ok, report.epsilon, failed(report)) == (False, None, {"certificate"})


def test_a_nan_in_any_number_is_refused(folder):
    text = (folder / "privacy.json").read_text()
    for number in ("14.78", "1e-05", "1797", "200"):
        (folder / "privacy.json").write_text(text.replace(f": {number}", ": NaN", 1))
        assert failed(verify(folder)) == {"certificate"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "README.md"])
def test_a_changed_or_missing_file_is_seen(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert "files" in failed(verify(folder))
    (folder / name).unlink()
    assert "files" in failed(verify(folder))


def test_a_missing_folder_or_certificate_is_a_failed_level(folder, tmp_path):
    (folder / "privacy.json").unlink()
    assert failed(verify(folder)) == {"certificate"}
    assert failed(verify(tmp_path / "nowhere")) == {"certificate"}


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.bin", "other.SAFETENSORS"])
def test_weights_beside_the_certified_ones_are_refused(folder, name):
    (folder / name).write_bytes(b"anything")
    assert failed(verify(folder)) == {"files"}


def test_samples_and_metrics_may_lie_in_the_folder(folder):
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "samples").mkdir()
    assert verify(folder).ok


def test_metadata_in_certified_weights_is_refused(tmp_path):
    make_folder(tmp_path / "run")
    header, data = two_tensors()
    header["__metadata__"]["note"] = "patient 17"
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(safetensors_bytes(header, data))
    certificate.write(tmp_path / "run", json.loads((tmp_path / "run" / "privacy.json").read_text()))
    assert failed(verify(tmp_path / "run")) == {"weights"}


def test_writing_refuses_what_verify_would_not_read(folder):
    document = certificate.read(folder)
    before = (folder / "privacy.json").read_bytes()
    with pytest.raises(PrivacyError, match=r"guarantee\.epsilon"):
        certificate.write(folder, {**document, "guarantee": {**document["guarantee"], "epsilon": 101}})
    (folder / "recipe.yaml").unlink()
    with pytest.raises(PrivacyError, match=r"recipe\.yaml is missing"):
        certificate.write(folder, document)
    assert (folder / "privacy.json").read_bytes() == before


def test_gamma_goes_with_automatic_clipping_only(folder):
    tamper(folder, "mechanism", "gamma", value=None)
    assert failed(verify(folder)) == {"certificate"}
    tamper(folder, "mechanism", "clipping", value="flat")
    assert verify(folder).ok
