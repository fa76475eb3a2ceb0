"""The third opinion: what is done with it. That it agrees is tested through the commands."""

import json

import pytest

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy import cross_check
from dp_peft_diffusion.privacy.certificate import verify
from tests.privacy.folders import make_folder, mechanism, promise
from tests.privacy.test_promise import release

ECHO = "import json, sys; asked = json.load(sys.stdin); print('a warning'); print({answer})"


def answering(monkeypatch, answer):
    monkeypatch.setattr(cross_check, "SCRIPT", ECHO.format(answer=answer))


def test_everything_that_is_covered_is_asked_for(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    answering(monkeypatch, f"open({str(seen)!r}, 'w').write(json.dumps(asked)) and 5.0")
    covered = promise(9.0, tuning_runs=3, prior=(release(runs=2, steps=7, noise_multiplier=20.0),))
    assert cross_check.prv_epsilon(covered) == 5.0
    q = mechanism().sampling_prob
    assert json.loads(seen.read_text()) == {
        "history": [[14.78, q, 600], [20.0, q, 14]],
        "delta": 1e-5,
        "epsilon_error": 0.01,
    }


@pytest.mark.parametrize("wrong", [0.9, 0.99, 1.06, 2.0, float("inf")])
def test_a_different_price_is_a_contradiction(monkeypatch, wrong):
    answering(monkeypatch, f"json.dumps(float('{wrong}'))")
    with pytest.raises(PrivacyError, match="they disagree"):
        cross_check.cross_check(promise(1.0))


def test_a_near_price_above_is_agreement(monkeypatch):
    answering(monkeypatch, 1.01)
    assert "costs epsilon 1.01" in cross_check.cross_check(promise(1.0))


def test_no_answer_is_said_with_the_reason(monkeypatch):
    answering(monkeypatch, "1/0")
    with pytest.raises(UserError, match=r"failed: ZeroDivisionError.*pip install opacus"):
        cross_check.prv_epsilon(promise(1.0))
    answering(monkeypatch, "sys.exit(1)")
    with pytest.raises(UserError, match="no reason given"):
        cross_check.prv_epsilon(promise(1.0))
    answering(monkeypatch, "__import__('time').sleep(60)")
    monkeypatch.setattr(cross_check, "SECONDS", 0.5)
    with pytest.raises(UserError, match=r"no price in 0\.5 seconds"):
        cross_check.prv_epsilon(promise(1.0))


@pytest.mark.parametrize(
    "changes", [{"neighboring_relation": "replace_one"}, {"max_examples_per_group": 2}, {"truncated_batch_size": 900}]
)
def test_without_an_opinion_a_folder_is_not_refused(tmp_path, changes):
    make_folder(tmp_path / "run", promise=promise(None, **changes))
    report = verify(tmp_path / "run", cross_check=True)
    name, ok, text = report.levels[-1]
    assert report.ok and (name, ok) == ("cross-check", True) and text.startswith("NOT CHECKED: ")
