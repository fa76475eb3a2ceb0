"""`dp-peft plan` and `dp-peft verify`: what a promise costs, and whether a folder keeps one."""

import json
import re

import pytest
from click.testing import CliRunner
from PIL import Image

from dp_peft_diffusion.cli import certificates, main
from dp_peft_diffusion.privacy import certificate, planning
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import make_promise
from tests.privacy.folders import make_folder
from tests.privacy.strangers import HANDWRITING_SHA256, write_adapter


def invoke(*words, **settings):
    return CliRunner(**settings).invoke(main, [str(word) for word in words], prog_name="dp-peft")


def refused(*words):
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def planned(*words):
    result = invoke("plan", *words, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_plan_finds_the_noise_and_from_the_noise_the_promise():
    one = ["--num_examples", 60000, "--train_batch_size", 4096, "--max_train_steps", 1000]
    (row,) = planned(*one, "--epsilon", 1)["rows"]
    assert row["noise_multiplier"] == pytest.approx(8.134, abs=2e-3)  # PLD; Opacus' PRV and RDP ask for more
    assert row["noise_per_step"] == row["noise_multiplier"] / 4096
    (back,) = planned(*one, "--noise_multiplier", row["noise_multiplier"])["rows"]
    assert back["epsilon"] == pytest.approx(1, abs=1e-3) and back["epsilon"] <= 1
    assert row["passes"] == pytest.approx(1000 * 4096 / 60000)


def test_plan_prints_a_table_of_all_batches_and_steps():
    words = [
        "--num_examples",
        5000,
        "--noise_multiplier",
        20,
        "--train_batch_size",
        "50, 100",
        "--max_train_steps",
        "5,10",
    ]
    result = invoke("plan", *words)
    lines = result.stdout.splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == [
        "batch", "steps", "epsilon", "noise multiplier", "noise per step", "passes over data"
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[1:]] == [[b, t] for b in ("50", "100") for t in ("5", "10")]
    assert len({len(line) for line in lines}) == 1
    assert "--trainable_parameters" in result.stderr


def test_plan_chooses_batches_that_fit_the_data():
    for n, expected in ((60000, [1024, 4096, 30000]), (1437, [64, 256, 718]), (2, [1])):
        rows = planned("--num_examples", n, "--noise_multiplier", 20, "--max_train_steps", 2)["rows"]
        assert [row["train_batch_size"] for row in rows] == expected


def test_plan_finds_the_most_updates_for_an_epsilon_and_a_noise():
    words = ["--num_examples", 60000, "--train_batch_size", 4096, "--epsilon", 1, "--noise_multiplier", 8.134]
    (row,) = planned(*words)["rows"]
    assert row["max_train_steps"] == pytest.approx(1000, abs=1)


def test_plan_marks_the_knee_and_says_what_it_is():
    words = ["--num_examples", 60000, "--epsilon", 1, "--train_batch_size", "4096,256,1024", "--max_train_steps", 1000]
    result = invoke("plan", *words)
    marked = [line for line in result.stdout.splitlines() if line.endswith("<- knee")]
    assert [line.split()[0] for line in marked] == ["1,024"]
    assert "10 % above that of a full batch" in result.stdout


def test_plan_prices_other_units_relations_and_compositions(tmp_path):
    make_folder(tmp_path / "run")
    one = ["--num_examples", 1797, "--train_batch_size", 500, "--max_train_steps", 200, "--noise_multiplier", 14.78]
    alone = planned(*one)["rows"][0]["epsilon"]
    for more, factor in (
        (["--max_examples_per_group", 4], 4.75),
        (["--neighboring_relation", "replace_one"], 2.13),
        (["--truncated_batch_size", 500], 3.2),
        (["--tuning_runs", 10], 3.6),
        (["--prior_event", tmp_path / "run"], 1.45),
    ):
        assert planned(*one, *more)["rows"][0]["epsilon"] / alone == pytest.approx(factor, rel=0.15), more
    hidden = ["--neighboring_relation", "add_or_remove_one", "--sampling_prob", 500 / 1797]
    assert planned(*one[2:], *hidden)["rows"][0]["epsilon"] == alone


def test_plan_shows_the_price_of_selection_with_its_conditions():
    words = "--num_examples 60000 --train_batch_size 4096 --max_train_steps 1000 --noise_multiplier 8.821".split()
    shown = invoke("plan", *words, "--tuning_runs", 10).stdout
    for part in ("pays for 10 runs", "2.127 (geometric)", "drawn at random", "winner", "without private data"):
        assert part in shown
    assert "winner" not in invoke("plan", *words).stdout


def test_plan_draws_its_pictures(tmp_path):
    words = ["--num_examples", 2000, "--noise_multiplier", 2, "--train_batch_size", 500, "--max_train_steps", 5]
    result = invoke("plan", *words, "--output_dir", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    for name in ("delta-by-epsilon.png", "noise-by-batch.png"):
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.size == (960, 660) and len(picture.convert("L").getcolors(256)) > 20
        assert name in result.stderr
    hidden = ["--neighboring_relation", "add_or_remove_one", "--sampling_prob", 0.25, "--train_batch_size", 500]
    invoke("plan", *hidden, "--epsilon", 3, "--max_train_steps", 5, "--output_dir", tmp_path / "hidden")
    assert [path.name for path in (tmp_path / "hidden").iterdir()] == ["delta-by-epsilon.png"]


def test_cross_checks_agree_and_say_where_there_is_no_other_opinion(certified, monkeypatch):
    words = ["--num_examples", 100, "--noise_multiplier", 4, "--train_batch_size", 50, "--max_train_steps", 2]
    (row,) = planned(*words)["rows"]
    last = json.loads(invoke("verify", certified, "--cross_check", "--format", "json").stdout)["levels"][-1]
    by_prv = float(re.search(r"costs epsilon ([0-9.]+[0-9])", last["text"])[1])
    assert last["ok"] and row["epsilon"] * 0.999 <= by_prv <= row["epsilon"] + 0.02
    monkeypatch.setattr("dp_peft_diffusion.privacy.cross_check.prv_epsilon", lambda promise: promise.priced)
    assert f"costs epsilon {row['epsilon']:g}," in invoke("plan", *words, "--cross_check").stdout
    monkeypatch.undo()
    refusal = refused("plan", *words, "--cross_check", "--max_examples_per_group", 2)
    assert "has no price for groups" in refusal


def test_plan_tells_what_to_expect_of_the_best_row():
    words = ["--num_examples", 1437, "--noise_multiplier", 8, "--max_train_steps", "10,40", "--train_batch_size", 700]
    facts = planned(*words, "--trainable_parameters", 6080)
    ratios = [row["signal_to_noise"] for row in facts["rows"]]
    best = DPMechanism(
        sampling_prob=700 / 1437, steps=40, noise_multiplier=8, expected_batch_size=700, num_examples=1437
    )
    assert ratios[1] == max(ratios) == planning.signal_to_noise(best, 6080)
    assert facts["outlook"] == planning.outlook(best, 6080)
    shown = invoke("plan", *words, "--trainable_parameters", 6080).stdout
    assert "batch 700, 40 steps" in shown and facts["outlook"] in shown


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--num_examples", "100"], "--epsilon 1"),
        (["--num_examples", "100", "--epsilon", "1", "--noise_multiplier", "1", "--max_train_steps", "5"], "together"),
        (["--epsilon", "1"], "--num_examples"),
        (["--num_examples", "0", "--epsilon", "1"], "--num_examples"),
        (["--num_examples", "100", "--epsilon", "1", "--train_batch_size", "101"], "--train_batch_size 101"),
        (["--num_examples", "100", "--epsilon", "1", "--train_batch_size", "0"], "--train_batch_size 0"),
        (["--num_examples", "100", "--epsilon", "1", "--max_train_steps", "0"], "--max_train_steps"),
        (["--num_examples", "100", "--epsilon", "1", "--max_train_steps", "x"], "--max_train_steps"),
        (["--num_examples", "100", "--epsilon", "1", "--trainable_parameters", "0"], "--trainable_parameters"),
        (["--num_examples", "100", "--epsilon", "1", "--delta", "0.01"], "--delta"),
        *[(["--num_examples", "100", "--epsilon", value], "--epsilon") for value in ("0", "-1", "nan", "inf", "x")],
        *[(["--num_examples", "100", "--epsilon", "1", "--delta", value], "--delta") for value in ("0", "nan", "1")],
        *[(["--num_examples", "100", "--noise_multiplier", value], "--noise_multiplier") for value in ("0", "nan")],
    ],
)
def test_plan_refuses_what_cannot_be_promised(words, shown):
    assert shown in refused("plan", *words)


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certified") / "run"
    folder.mkdir()
    write_adapter(folder)
    (folder / "recipe.yaml").write_text("privacy: {epsilon: 5}\n")
    mechanism = DPMechanism(sampling_prob=0.5, steps=2, noise_multiplier=4.0, expected_batch_size=50, num_examples=100)
    document = certificate.certificate(
        make_promise(mechanism, delta=1e-5, epsilon=5.0),
        clipping="flat",
        gamma=None,
        noise_multiplicity=1,
        public_inputs={},
        base={"name": "builtin:handwriting", "revision": None, "sha256": HANDWRITING_SHA256},
        folder=folder,
    )
    certificate.write(folder, document)
    return folder


def test_verify_shows_every_level_the_promise_and_what_it_cannot_prove(certified):
    result = invoke("verify", certified)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("✓ ") == len(certificate.verify(certified).levels) > 3
    assert "✗" not in result.stdout
    assert "epsilon 5" in result.stdout
    for claim in certificate.CANNOT_PROVE:
        assert claim in result.stdout


def test_verify_exits_with_3_after_one_byte_changed(certified):
    weights = certified / "adapter_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + b"\x01")
        result = invoke("verify", certified)
        facts = json.loads(invoke("verify", certified, "--format", "json").stdout)
    finally:
        weights.write_bytes(whole)
    assert result.exit_code == 3
    assert "✗ files" in result.stdout and "consistent with a promise" not in result.stdout
    assert result.stderr.startswith("error: ") and "(files)" in result.stderr
    assert facts["ok"] is False
    assert [level["name"] for level in facts["levels"] if not level["ok"]] == ["files"]


def test_verify_for_programs_says_the_same(certified):
    facts = json.loads(invoke("verify", certified, "--format", "json").stdout)
    assert facts["ok"] is True and facts["epsilon"] == 5.0
    assert facts["cannot_prove"] == list(certificate.CANNOT_PROVE)


def test_verify_without_a_certificate_fails_and_without_a_folder_is_a_mistake(tmp_path):
    assert invoke("verify", tmp_path).exit_code == 3
    assert "not a folder" in refused("verify", tmp_path / "absent")


def test_marks_and_text_suit_the_terminal(monkeypatch):
    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(certificates.sys, "stdout", Ascii())
    assert all(mark.isascii() for mark in certificates.marks())
    assert certificates.printable("é \x1b[2J\n") == "é \\x1b[2J\\x0a"
