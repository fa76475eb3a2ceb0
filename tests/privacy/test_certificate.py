import copy
import json
import shutil
import subprocess
import sys

import pytest

from dp_peft_diffusion.errors import PrivacyError
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.privacy.certificate import CANNOT_PROVE, verify
from dp_peft_diffusion.privacy.certificate_form import EARLIER_ATTEMPT, assumptions, unit
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.promise import Release, make_promise
from dp_peft_diffusion.privacy.promise import statement as promise_statement
from tests.privacy.folders import N, make_folder, mechanism, promise
from tests.privacy.strangers import tensors, write_tensors


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
        "certificate", "files", "weights", "adapter", "mechanism", "epsilon", "figures", "tuning", "releases", "key",
        "gradients",
    ]  # fmt: skip
    assert all(sentence.endswith(".") for _, _, sentence in report.levels)
    assert len(CANNOT_PROVE) == 6


def test_the_certificate_has_the_documented_keys_and_exact_numbers(folder):
    document = certificate.read(folder)
    assert " ".join(document) == (
        "schema statement guarantee unit neighboring_relation mechanism accounting public_inputs tuning "
        "other_releases assumptions base key_source key_after_export gradient_check covers excludes sha256"
    )
    assert " ".join(document["guarantee"]) == (
        "epsilon delta mu_gdp mu_gdp_smallest_delta profile max_tpr_at_fpr epsilon_replace_one epsilon_per_image"
    )
    assert document["public_inputs"] == {"class_names": ["0", "1", "déjà vu"], "resolution": 32, "num_examples": N}
    assert promise_of(document) == promise()
    priced = mechanism().epsilon(1e-5)
    assert priced <= document["accounting"]["epsilon_priced"] <= priced * (1 + 1e-5)
    assert document["mechanism"]["count"] == 200
    assert set(document["sha256"]) == {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "README.md"}


def test_the_statement_says_relation_n_factor_and_attack_odds(folder):
    words = certificate.read(folder)["statement"]
    for part in ("replaced by nothing", "e^1 = 2.718", "1e-05", "1797", "zero_out", "1 %", "-GDP"):
        assert part in words


def release(**changes):
    return Release(mechanism=mechanism(**changes), runs=2, source=EARLIER_ATTEMPT)


PROMISES = {
    "asked for": lambda: promise(1.0),
    "priced": lambda: promise(None),
    "tuned": lambda: promise(None, tuning_runs=3),
    "tuned, unpaid": lambda: promise(None, unpaid_runs=8),
    "composed": lambda: promise(6.0, prior=(release(), release(steps=7))),
    "groups": lambda: promise(None, max_examples_per_group=3, prior=(release(max_examples_per_group=3),)),
    "capped": lambda: promise(None, truncated_batch_size=600),
    "replaced": lambda: promise(None, neighboring_relation="replace_one"),
    "all images": lambda: promise(None, sampling_prob=1.0, expected_batch_size=N, noise_multiplier=60.0),
    "delta near 1/N": lambda: promise(None, delta=5.5e-4),
}


@pytest.mark.parametrize("kind", PROMISES)
def test_every_kind_of_promise_passes_and_reads_back_as_it_was(tmp_path, kind):
    made = PROMISES[kind]()
    document = make_folder(tmp_path / "run", promise=made)
    report = verify(tmp_path / "run")
    assert report.ok, report.levels
    assert promise_of(certificate.read(tmp_path / "run")) == made
    assert document["guarantee"]["epsilon"] == made.epsilon


def test_what_cannot_be_checked_is_said(tmp_path):
    make_folder(tmp_path / "run", key_after_export="escrowed", gradient_check="skipped", promise=PROMISES["composed"]())
    said = {name: text for name, _, text in verify(tmp_path / "run").levels}
    assert "Undeclared" in said["tuning"] and "escrow" in said["key"] and "NOT CHECKED" in said["gradients"]
    assert EARLIER_ATTEMPT in said["releases"]
    document = certificate.read(tmp_path / "run")
    assert [words.split()[0] for words in document["assumptions"]] == ["The", "What", "The"]
    assert "computational" in document["assumptions"][0] and "backups" in document["assumptions"][1]
    make_folder(tmp_path / "run", promise=PROMISES["tuned"]())
    said = {name: text for name, _, text in verify(tmp_path / "run").levels}
    assert "3 runs" in said["tuning"] and "None listed" in said["releases"] and "deleted" in said["key"]
    assert len(certificate.read(tmp_path / "run")["assumptions"]) == 2


def test_runs_that_nobody_pays_for_are_told_in_the_statement_and_by_verify(tmp_path):
    document = make_folder(tmp_path / "run", promise=PROMISES["tuned, unpaid"]())
    said = {name: text for name, _, text in verify(tmp_path / "run").levels}
    assert "NOT counted: 8 earlier run(s)" in document["statement"] and "8 earlier runs" in said["tuning"]
    assert "NOT paid for" in said["tuning"] and document["tuning"] == {"runs": 8, "priced": "no"}
    assert document["guarantee"] == make_folder(tmp_path / "other", promise=promise(None))["guarantee"]
    for hidden in ("undeclared", {"runs": 2, "priced": "no"}):
        (tmp_path / "run" / "privacy.json").write_text(json.dumps(document | {"tuning": hidden}))
        assert not verify(tmp_path / "run").ok


def test_the_adapter_is_checked_against_its_base(folder, tmp_path):
    said = {name: text for name, _, text in verify(folder).levels}
    assert "Fits builtin:handwriting" in said["adapter"]
    (tmp_path / "other").mkdir()
    assert failed(verify(folder, base=tmp_path / "other")) == {"adapter"}


def test_under_add_or_remove_one_n_appears_nowhere(tmp_path):
    private_n = mechanism(num_examples=None, neighboring_relation="add_or_remove_one", sampling_prob=0.27)
    make_folder(tmp_path / "run", promise=make_promise(private_n, delta=1e-5, epsilon=1.0))
    assert verify(tmp_path / "run").ok
    assert str(N) not in json.dumps({**certificate.read(tmp_path / "run"), "sha256": {}})
    tamper(tmp_path / "run", "public_inputs", "num_examples", value=N)
    assert "mechanism" in failed(verify(tmp_path / "run"))


def test_a_given_key_fails_verification(tmp_path):
    make_folder(tmp_path / "run", key_source="given")
    assert failed(verify(tmp_path / "run")) == {"key"}


RELEASE = ("other_releases", 0)
TAMPERED = [  # field, what a forger would like there, the level that sees it
    (("schema",), "dp-peft/privacy/1", "certificate"),
    (("statement",), "Perfectly private.", "figures"),
    (("guarantee", "epsilon"), 3.0, "epsilon"),
    (("guarantee", "delta"), 1e-6, "epsilon"),
    (("guarantee", "delta"), 9e-4, "epsilon"),
    (("guarantee", "mu_gdp"), 0.1, "figures"),
    (("guarantee", "mu_gdp_smallest_delta"), 1e-12, "certificate"),
    (("guarantee", "max_tpr_at_fpr", "0.001"), 0.0011, "figures"),
    (("guarantee", "max_tpr_at_fpr", "0.01"), 0.011, "figures"),
    (("guarantee", "max_tpr_at_fpr", "0.1"), 0.11, "figures"),
    *[(("guarantee", "profile", i, "epsilon"), 0.5, "figures") for i in range(8)],
    (("guarantee", "profile", 0, "delta"), 1e-4, "certificate"),
    (("guarantee", "epsilon_replace_one"), 5.0, "figures"),
    (("guarantee", "epsilon_replace_one"), None, "figures"),
    (("guarantee", "epsilon_per_image"), 0.1, "figures"),
    (("unit",), "one group: all images of one owner with their labels", "certificate"),
    (("neighboring_relation",), "add_or_remove_one", "mechanism"),
    (("neighboring_relation",), "replace_one", "epsilon"),
    (("mechanism", "event"), "self-composed truncated Poisson-sampled Gaussian", "certificate"),
    (("mechanism", "sampling_prob"), 0.1, "mechanism"),
    (("mechanism", "noise_multiplier"), 5.4, "epsilon"),
    (("mechanism", "noise_multiplier"), 10.0, "figures"),
    (("mechanism", "count"), 400, "epsilon"),
    (("mechanism", "expected_batch_size"), 400, "mechanism"),
    (("mechanism", "truncated_batch_size"), 500, "certificate"),
    (("mechanism", "max_examples_per_group"), 4, "certificate"),
    (("mechanism", "gamma"), None, "certificate"),
    (("mechanism", "clipping"), "flat", "certificate"),
    (("accounting", "accountant"), "gdp", "certificate"),
    (("accounting", "library"), "mine", "certificate"),
    (("accounting", "discretization_interval"), 1.0, "certificate"),
    (("accounting", "epsilon_priced"), 0.5, "figures"),
    (("accounting", "epsilon_rdp"), 0.5, "figures"),
    (("accounting", "epsilon_rdp"), None, "figures"),
    (("public_inputs", "num_examples"), 60000, "mechanism"),
    (("public_inputs", "num_examples"), "1797", "certificate"),
    (("tuning",), {"runs": 100, "priced": "composition"}, "epsilon"),
    (("tuning",), {"runs": 100, "priced": "selection"}, "certificate"),
    ((*RELEASE, "mechanism", "sampling_prob"), 0.1, "mechanism"),
    ((*RELEASE, "mechanism", "noise_multiplier"), 5.0, "epsilon"),
    ((*RELEASE, "mechanism", "count"), 2000, "epsilon"),
    ((*RELEASE, "mechanism", "expected_batch_size"), 400, "mechanism"),
    ((*RELEASE, "num_examples"), None, "mechanism"),
    ((*RELEASE, "runs"), 9, "epsilon"),
    ((*RELEASE, "source"), "a certificate that got lost", "certificate"),
    (("other_releases",), [], "certificate"),
    (("assumptions",), [], "certificate"),
    (("base", "sha256"), "b" * 64, "adapter"),
    (("base", "name"), "builtin:none", "adapter"),
    (("key_source",), "given", "key"),
    (("covers",), ["everything"], "certificate"),
    (("excludes",), [], "certificate"),
    *[(("sha256", name), "b" * 64, "files") for name in ("adapter_config.json", "adapter_model.safetensors")],
    *[(("sha256", name), "b" * 64, "files") for name in ("recipe.yaml", "README.md")],
]
# What no level can contradict: it enters no price, or only whoever trained knows it.
UNPROVABLE = [
    ("mechanism", "max_grad_norm"),
    ("mechanism", "noise_multiplicity"),
    ("accounting", "version"),
    ("public_inputs", "class_names"),
    ("public_inputs", "resolution"),
    ("base", "revision"),
    ("base", "parts_sha256"),
    ("key_after_export",),
    ("gradient_check",),
    (*RELEASE, "mechanism", "max_grad_norm"),
    # known, but bound to another field
    (*RELEASE, "mechanism", "event"),
    (*RELEASE, "mechanism", "truncated_batch_size"),
    (*RELEASE, "mechanism", "max_examples_per_group"),
    *[("guarantee", "profile", i, "delta") for i in range(1, 8)],
]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed") / "run"
    make_folder(folder, promise=promise(None, prior=(release(),), noise_multiplier=5.5))
    assert verify(folder).ok
    return folder


@pytest.mark.parametrize(("path", "value", "level"), TAMPERED)
def test_a_changed_certificate_fails_at_its_level(composed, path, value, level, tmp_path):
    folder = shutil.copytree(composed, tmp_path / "run")
    tamper(folder, *path, value=value)
    assert level in failed(verify(folder))


def test_every_field_is_tampered_with_or_known_to_be_unprovable(composed):
    document = json.loads((composed / "privacy.json").read_text())
    leaves = {path for path in every_path(document) if path and not list(every_path_below(document, path))}
    known = {path for path, _, _ in TAMPERED} | set(UNPROVABLE)
    assert len({path for path, _, _ in TAMPERED}) >= 40
    missed = {path for path in leaves if not any(path[: len(k)] == k for k in known)}
    assert not missed


def every_path(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from every_path(inner, (*path, key))


def every_path_below(document, path):
    for key in path:
        document = document[key]
    return list(every_path(document))[1:]


FREE_TEXT = {("base", "name"), ("base", "revision"), ("accounting", "version")}
FREE_TEXT |= {("public_inputs", "class_names")}


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
        if not isinstance(place, dict):
            continue
        added, missing = copy.deepcopy(document), document
        place = added
        for key in path:
            place = place[key]
        place["note"] = "hello"
        with pytest.raises(PrivacyError):
            certificate.check_form(added)
        if path not in {("sha256",), ("public_inputs",)}:
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


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lora_weights.safetensors",
        "adapter_model.bin",
        "other.SAFETENSORS",
        "a.gguf",
        "model.index.json",
        "x.py",
    ],
)
def test_weights_beside_the_certified_ones_are_refused(folder, name):
    (folder / name).write_bytes(b"anything")
    assert failed(verify(folder)) == {"files"}


@pytest.mark.parametrize(
    "path", [("guarantee", "mu_gdp"), ("guarantee", "profile", 4, "epsilon"), ("guarantee", "max_tpr_at_fpr", "0.01")]
)
def test_a_figure_may_be_smaller_than_recomputed_only_where_another_version_computed_it(folder, path):
    place = certificate.read(folder)
    for key in path:
        place = place[key]
    tamper(folder, *path, value=place * 0.9995)
    document = certificate.read(folder)
    said = promise_statement(promise_of(document), document["guarantee"])
    tamper(folder, "statement", value=said)
    assert failed(verify(folder)) == {"figures"}
    tamper(folder, "accounting", "version", value="0.0.1")
    report = verify(folder)
    assert (
        report.ok and "computed by dp-accounting '0.0.1'" in dict((name, s) for name, _, s in report.levels)["figures"]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("note", "x"),
        ("gamma_source", "x" * 201),
        ("grid_labels", ["x"]),
        ("group_column", 3),
        ("class_names", ["x" * 201]),
        ("class_names", ["x"] * 10_001),
        ("class_names", "x"),
        ("resolution", 32.0),
        ("image_channels", True),
    ],
)
def test_public_inputs_carry_nothing_else(folder, name, value):
    tamper(folder, "public_inputs", name, value=value)
    assert failed(verify(folder)) == {"certificate"}


def test_samples_and_metrics_may_lie_in_the_folder(folder):
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "samples").mkdir()
    assert verify(folder).ok


def test_metadata_in_certified_weights_is_refused(tmp_path):
    make_folder(tmp_path / "run")
    write_tensors(tmp_path / "run", tensors(), metadata={"format": "pt", "note": "patient 17"})
    certificate.write(tmp_path / "run", json.loads((tmp_path / "run" / "privacy.json").read_text()))
    assert failed(verify(tmp_path / "run")) == {"weights", "adapter"}


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


# A stranger's certificate is refused before an accountant sees it, and never keeps verify busy.

PROGRAM = """
import json, sys, time
from dp_peft_diffusion.privacy.certificate import verify
began = time.process_time()
report = verify(sys.argv[1])
heavy = sorted({"torch", "peft", "dp_accounting", "scipy", "opacus"} & set(sys.modules))
(peak,) = (int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
failed = [name for name, ok, _ in report.levels if not ok]
print(json.dumps({"failed": failed, "heavy": heavy, "seconds": time.process_time() - began, "peak": peak}))
"""


def verify_apart(folder):
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("path", "value"), [(("mechanism", "noise_multiplier"), float("nan")), (("mechanism", "count"), 10**30)]
)
def test_a_malformed_certificate_reaches_no_accountant(folder, path, value):
    tamper(folder, *path, value=value)
    found = verify_apart(folder)
    assert found["failed"] == ["certificate"] and found["heavy"] == []


def test_verify_imports_no_torch(folder):
    found = verify_apart(folder)
    assert not found["failed"] and not {"torch", "peft", "opacus"} & set(found["heavy"])


def hostile(number):
    """Well-formed certificates that a careless accountant would work on for minutes, or fill the memory with."""
    n, steps = 10**12, 100_000
    one = {"event": "self-composed Poisson-sampled Gaussian", "max_grad_norm": 1.0, "truncated_batch_size": None}
    one |= {"max_examples_per_group": 1, "sampling_prob": 1e-6, "expected_batch_size": 1e6, "count": steps}
    group = {"event": "self-composed mixture of Gaussians, of Poisson-sampled groups", "max_examples_per_group": 1024}
    group |= {"sampling_prob": 0.5, "expected_batch_size": 5e11}
    many = [{**one, "noise_multiplier": 0.3 + k / 100, "count": steps // 64} for k in range(64)]
    return [
        ([{**one, "noise_multiplier": 0.3}], 1),
        ([{**one, "sampling_prob": 0.9, "expected_batch_size": 9e11, "noise_multiplier": 225.0}], 1),
        ([{**one, **group, "noise_multiplier": 4500.0}], 1),
        (many, 1),
        ([{**one, "noise_multiplier": 1.0, "count": 6}], 100_000),
    ][number], n


@pytest.mark.parametrize("number", range(5))
def test_a_hostile_certificate_keeps_verify_neither_long_nor_large(folder, number):
    (mechanisms, runs), n = hostile(number)
    document = certificate.read(folder)
    own = {name: document["mechanism"][name] for name in ("clipping", "gamma", "noise_multiplicity")}
    document["mechanism"] = mechanisms[0] | own
    document["public_inputs"]["num_examples"] = n
    document["guarantee"] |= {"epsilon": 100, "delta": 1e-12}
    document["tuning"] = {"runs": runs, "priced": "composition"} if runs > 1 else "undeclared"
    document["other_releases"] = [
        {"mechanism": other, "num_examples": n, "runs": 1, "source": EARLIER_ATTEMPT} for other in mechanisms[1:]
    ]
    k = mechanisms[0]["max_examples_per_group"]
    document["unit"], document["assumptions"] = unit(k), assumptions(document["other_releases"])
    document["guarantee"]["epsilon_per_image"] = None if k == 1 else 1.0
    (folder / "privacy.json").write_text(json.dumps(document))
    found = verify_apart(folder)
    assert found["failed"] and "certificate" not in found["failed"]
    assert found["seconds"] < 10 and found["peak"] < 500, found
