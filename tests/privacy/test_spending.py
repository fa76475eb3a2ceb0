"""What a data set has given away is counted before it is spent, and found again wherever the images lie."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.privacy.mechanism import DPMechanism

IMAGES, OTHERS = b"a" * 32, b"b" * 32


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "dp-peft"


def mechanism(steps=100, **changes):
    fields = {"sampling_prob": 0.1, "noise_multiplier": 2.0, "expected_batch_size": 100, "num_examples": 1000}
    return DPMechanism(steps=steps, **{**fields, **changes})


def entries(digest=IMAGES):
    return spending.spendings(spending.data_set_id(digest))


def test_an_attempt_counts_all_planned_steps_from_its_beginning_and_only_once():
    for _ in range(3):
        spending.record_spending(IMAGES, "run", 1, "mnist-eps1", mechanism())
    (entry,) = entries()
    assert (entry.name, entry.attempt, entry.folder, entry.steps) == ("run", 1, "mnist-eps1", 100)
    assert entry.mechanism == mechanism() and entries(OTHERS) == ()


def test_two_runs_cost_what_their_composition_costs():
    spending.record_spending(IMAGES, "one", 1, "one", mechanism(60))
    (alone,) = spending.spent(entries(), 1e-5)
    spending.record_spending(IMAGES, "two", 1, "two", mechanism(40))
    (both,) = spending.spent(entries(), 1e-5)
    assert both.attempts == 2 and both.epsilon == pytest.approx(mechanism(100).epsilon(1e-5), rel=2e-3)
    assert alone.epsilon < both.epsilon and both.epsilon >= mechanism(100).epsilon(1e-5)


def test_relations_are_priced_apart_since_they_have_no_price_together():
    spending.record_spending(IMAGES, "one", 1, "one", mechanism())
    private_n = mechanism(num_examples=None, neighboring_relation="add_or_remove_one")
    spending.record_spending(IMAGES, "two", 1, "two", private_n)
    relations = [price.neighboring_relation for price in spending.spent(entries(), 1e-5)]
    assert relations == ["add_or_remove_one", "zero_out"]


def test_an_attempt_that_was_given_up_counts_the_steps_it_began_and_never_more_than_planned():
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    spending.record_given_up(IMAGES, "run", 7)
    spending.record_spending(IMAGES, "second", 2, "run", mechanism())
    assert [entry.steps for entry in entries()] == [7, 100]
    spending.record_given_up(IMAGES, "second", 1000)
    assert [entry.steps for entry in entries()] == [7, 100]
    spending.record_given_up(IMAGES, "never recorded", 3)
    spending.record_published(IMAGES, "never recorded")
    assert len(entries()) == 2


@pytest.mark.parametrize("published_first", [True, False])
def test_what_was_published_counts_whole_whatever_a_copy_of_its_folder_gives_up(published_first):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    calls = [lambda: spending.record_published(IMAGES, "run"), lambda: spending.record_given_up(IMAGES, "run", 3)]
    for call in calls if published_first else reversed(calls):
        call()
    assert [entry.steps for entry in entries()] == [100]


def test_groups_by_different_columns_are_priced_apart():
    spending.record_spending(IMAGES, "a", 1, "a", mechanism(max_examples_per_group=2), "patient")
    spending.record_spending(IMAGES, "b", 1, "b", mechanism(max_examples_per_group=2), "hospital")
    assert [price.group_column for price in spending.spent(entries(), 1e-5)] == ["hospital", "patient"]


def test_processes_that_begin_at_once_find_one_name_for_the_data_set_and_lose_no_entry(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/privacy'); from test_spending import *; "
        "spending.record_spending(IMAGES, sys.argv[1], 1, 'run', mechanism()); print(spending.data_set_id(IMAGES))"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen([*command, str(i)], cwd=root, stdout=subprocess.PIPE, text=True) for i in range(4)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert sorted(entry.name for entry in entries()) == ["0", "1", "2", "3"]


def test_the_folder_is_closed_to_others_and_tells_nothing_of_the_images(state_home):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    assert stat.S_IMODE(state_home.stat().st_mode) == 0o700
    files = [path for path in state_home.rglob("*") if path.is_file()]
    assert len(files) == 3 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    for path in files:
        assert IMAGES.hex() not in path.name and IMAGES not in path.read_bytes()
        assert IMAGES.hex().encode() not in path.read_bytes()


def test_another_user_gives_the_same_images_another_name(monkeypatch, tmp_path):
    name = spending.data_set_id(IMAGES)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert spending.data_set_id(IMAGES) != name


def test_without_the_variable_the_ledgers_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spending.spending_folder() == tmp_path / ".local" / "state" / "dp-peft"


def test_a_damaged_ledger_is_refused_and_not_counted_as_less(state_home):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    path = state_home / f"{spending.data_set_id(IMAGES)}.jsonl"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole.replace(b'"sampling_prob": 0.1', b'"sampling_prob": 7'), b"[]\n", b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged"):
            entries()
        with pytest.raises(RunError, match="damaged"):
            spending.record_spending(IMAGES, "two", 1, "two", mechanism())
        assert path.read_bytes() == damaged


def test_a_ledger_that_cannot_be_written_says_how_to_go_on(state_home, monkeypatch):
    state_home.parent.mkdir(parents=True)
    state_home.write_text("in the way")
    with pytest.raises(RunError, match="XDG_STATE_HOME.*--no_record_spending"):
        spending.record_spending(IMAGES, "run", 1, "run", mechanism())


def test_a_ledger_that_cannot_be_read_is_not_taken_for_an_empty_one(state_home, monkeypatch):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())

    def unreadable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    name = spending.data_set_id(IMAGES)
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(RunError, match="Input/output error"):
        spending.spendings(name)


def test_a_disk_that_fills_up_leaves_the_entries_before_readable(state_home, monkeypatch):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    path = state_home / f"{spending.data_set_id(IMAGES)}.jsonl"
    whole = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        spending.record_spending(IMAGES, "two", 1, "two", mechanism())
    monkeypatch.undo()
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_half_a_line_is_taken_back(state_home, monkeypatch):
    spending.record_spending(IMAGES, "run", 1, "run", mechanism())
    path = state_home / f"{spending.data_set_id(IMAGES)}.jsonl"
    whole, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
    with pytest.raises(RunError, match="No space left"):
        spending.record_spending(IMAGES, "two", 1, "two", mechanism())
    assert path.read_bytes() == whole


def test_a_key_of_the_ledgers_that_cannot_be_written_is_told(state_home, monkeypatch):
    def full(path, content, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spending, "write_durably", full)
    with pytest.raises(RunError, match="No space left.*--no_record_spending"):
        spending.data_set_id(IMAGES)
