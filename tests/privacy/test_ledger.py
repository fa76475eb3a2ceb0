import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy.ledger import Ledger, steps_begun


def begun(*steps, attempts=None, path):
    """A ledger of these steps, each of its attempt."""
    for step, attempt in zip(steps, attempts or [1] * len(steps), strict=True):
        Ledger(path, attempt).begin(step)
    return path


def test_every_step_begun_is_one_line_and_counts_when_read_back(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.steps_begun == steps_begun(ledger.path) == {}
    for step in range(5):
        ledger.begin(step)
        assert ledger.steps_begun == Ledger(ledger.path).steps_begun == steps_begun(ledger.path) == {1: step + 1}
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_the_file_is_private_even_when_it_was_not(tmp_path):
    (tmp_path / "open").touch(mode=0o644)
    for path in (tmp_path / "new", tmp_path / "open"):
        Ledger(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_is_synced_to_disk_before_begin_returns(tmp_path, monkeypatch):
    events = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: events.append("write") or write(fd, data))
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: events.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync") or fsync(fd),
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert events == ["fsync folder"]
    events.clear()
    ledger.begin(0)
    assert events == ["write", "fsync"]


def test_a_step_that_is_replayed_counts_once_and_one_of_another_attempt_again(tmp_path):
    path = begun(0, 1, 2, 1, 2, 3, 0, 1, attempts=[1, 1, 1, 1, 1, 1, 2, 2], path=tmp_path / "ledger.jsonl")
    assert steps_begun(path) == {1: 4, 2: 2}
    assert len(path.read_text().splitlines()) == 8


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), max_size=20), st.integers(0, 3000))
def test_a_ledger_cut_anywhere_never_counts_less_than_its_whole_lines_show(entries, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.touch()
        entries = sorted(entries, key=lambda entry: entry[0])  # attempts follow one another
        for attempt, step in entries:
            Ledger(path, attempt).begin(step)
        content = path.read_bytes()[:cut]
        path.write_bytes(content)
        whole = [json.loads(line) for line in content.split(b"\n")[:-1] if line]
        counted = steps_begun(path)
        for line in whole:
            assert counted[line["attempt"]] > line["step"]
        if content and not content.endswith(b"\n"):
            assert sum(counted.values()) >= 1


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_a_torn_last_line_counts_as_begun_and_does_not_swallow_the_next(tmp_path, kept):
    path = begun(0, 1, path=tmp_path / "ledger.jsonl")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    again = Ledger(path)
    assert again.steps_begun == {1: 2}
    again.begin(1)  # the replay of the step whose line was torn
    again.begin(2)
    assert again.steps_begun == steps_begun(path) == {1: 3}
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 2


def test_a_ledger_with_a_changed_or_missing_line_is_refused(tmp_path):
    path = begun(0, 1, 2, path=tmp_path / "ledger.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    changed = lines[1].replace(b'"step": 1', b'"step": 0')
    assert changed != lines[1]
    for content in (lines[:1] + lines[2:], lines[1:], [lines[0], changed, lines[2]]):
        path.write_bytes(b"".join(content))
        for read in (Ledger, steps_begun):
            with pytest.raises(RunError, match="was changed"):
                read(path)


def test_a_full_disk_stops_the_step_and_never_loses_a_count(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin(0)

    def no_space(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(RunError, match="step 1 is not begun.*No space left"):
        ledger.begin(1)
    assert steps_begun(ledger.path) == {1: 1}


def test_short_writes_are_completed(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    ledger.begin(0)
    assert json.loads(ledger.path.read_text())["step"] == 0


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(RunError, match="cannot be opened"):
        Ledger(tmp_path / "missing" / "ledger.jsonl")
    with pytest.raises(RunError, match="cannot be opened"):
        Ledger(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        steps_begun(tmp_path)


def test_a_closed_ledger_begins_no_step(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    with pytest.raises(RunError):
        ledger.begin(0)
