"""The checks pass on the code as it is, and each planted bug is caught by the check that must see it.

pytest tests/mutants                                  every bug against its own check
pytest -m slow tests/mutants -k every_check -s        every bug against every check, and the table of who sees what
pytest -m slow tests/mutants -k false_alarm           every check on the code as it is, under 200 seeds
"""

import re
from pathlib import Path

import pytest
from mutants.catalogue import CHECKS, MUTANTS
from mutants.planted import Check, Mutant, PatchError, function_of, mutant, planted

from dp_peft_diffusion import training
from dp_peft_diffusion.errors import PrivacyError, RunError, UserError
from dp_peft_diffusion.privacy import poisson
from dp_peft_diffusion.privacy.mechanism import DPMechanism

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "trust.md"
CLEAN_SEEDS = 200
KEY = bytes(16)


def name_of(check: Check) -> str:
    return check.__name__


def alarm(check: Check, seed: int = 0) -> str | None:
    """What the check says, or a refusal of the product itself; None when nobody noticed anything."""
    try:
        check(seed)
    except (AssertionError, UserError, RunError, PrivacyError) as error:
        return str(error) or type(error).__name__
    return None


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_a_check_passes_on_the_code_as_it_is(check):
    assert alarm(check) is None


@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught_by_its_check(bug):
    with planted(bug):
        assert alarm(bug.check) is not None, "the bug survives"


def test_there_are_more_than_40_bugs_of_different_names_and_every_check_has_its_own():
    assert len({bug.name for bug in MUTANTS}) == len(MUTANTS) > 40
    assert {name_of(bug.check) for bug in MUTANTS} == {name_of(check) for check in CHECKS}
    assert all(1 <= bug.row <= 28 for bug in MUTANTS)


def test_the_page_on_trust_lists_every_bug_at_its_failure_and_check():
    rows = dict(re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE))
    assert list(map(int, rows)) == list(range(1, 29))
    listed = [
        (int(row), check, name)
        for row, cell in rows.items()
        for check, names in re.findall(r"`(\w+)`: ([^<]*)", cell)
        for name in names.strip().split("; ")
    ]
    assert sorted(listed) == sorted((bug.row, name_of(bug.check), bug.name) for bug in MUTANTS)
    assert f"{len(MUTANTS)} of {len(MUTANTS)} bugs" in PAGE.read_text()


def everybody(name: str, row: int = 1) -> Mutant:
    return mutant(name, row, CHECKS[0], "privacy.poisson:example_ids", "uniform < sampling_prob", "uniform < 2")


def test_a_bug_is_everywhere_while_it_is_planted_and_nowhere_afterwards():
    calls = (poisson.example_ids, training.example_ids)
    before = [call(KEY, 0, 50, 0.5).tolist() for call in calls]
    with pytest.raises(ZeroDivisionError), planted(everybody("everybody takes part")):
        assert all(len(call(KEY, 0, 50, 0.5)) == 50 for call in calls)
        _ = 1 / 0
    assert [call(KEY, 0, 50, 0.5).tolist() for call in calls] == before


def test_a_bug_in_a_property_is_planted_too():
    mechanism = DPMechanism(
        sampling_prob=0.5, steps=1, noise_multiplier=2.0, max_grad_norm=3.0, expected_batch_size=5, num_examples=10
    )
    target = "privacy.mechanism:DPMechanism.noise_stddev"
    with planted(mutant("no bound", 10, CHECKS[0], target, "* self.max_grad_norm", "")):
        assert mechanism.noise_stddev == 2.0
    assert mechanism.noise_stddev == 6.0


@pytest.mark.parametrize("old", ["uniform < probability", "num_examples"])
def test_a_patch_that_fits_nowhere_or_twice_is_a_failure(old):
    bug = mutant("stale", 1, CHECKS[0], "privacy.poisson:example_ids", old, "0")
    code = function_of("privacy.poisson:example_ids").__code__
    with pytest.raises(PatchError, match="not once"), planted(bug):
        pass
    assert function_of("privacy.poisson:example_ids").__code__ is code


@pytest.mark.slow
def test_every_check_against_every_bug():
    seen = {}
    for bug in MUTANTS:
        with planted(bug):
            seen[bug.name] = {name_of(check) for check in CHECKS if alarm_or_crash(check)}
    for check in CHECKS:
        alone = sum(checks == {name_of(check)} for checks in seen.values())
        total = sum(name_of(check) in checks for checks in seen.values())
        print(f"{name_of(check)} sees {total} of {len(MUTANTS)}, {alone} of which nobody else sees")
    for bug in MUTANTS:
        print(f"{bug.name}: {', '.join(sorted(seen[bug.name]))}")
        assert name_of(bug.check) in seen[bug.name]


def alarm_or_crash(check: Check) -> bool:
    """Beside its own check, a bug may also crash another."""
    try:
        return alarm(check) is not None
    except Exception:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_no_false_alarm_under_200_seeds(check):
    alarms = {seed: said for seed in range(1, CLEAN_SEEDS + 1) if (said := alarm(check, seed)) is not None}
    assert alarms == {}
