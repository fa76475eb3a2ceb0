import json
import os
import stat

import pytest

from dp_peft_diffusion.errors import RunError
from dp_peft_diffusion.privacy.ledger import Ledger


def test_every_step_begun_is_one_line_and_counts_when_read_back(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.steps_begun == 0
    for step in range(5):
        ledger.begin(step)
        assert ledger.steps_begun == Ledger(ledger.path).steps_begun == step + 1
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


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_a_torn_last_line_counts_as_begun_and_does_not_swallow_the_next(tmp_path, kept):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin(0)
    ledger.begin(1)
    first, second = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(first + second[:kept])
    again = Ledger(ledger.path)
    assert again.steps_begun == 2
    again.begin(2)
    assert again.steps_begun == Ledger(ledger.path).steps_begun == 3
    assert json.loads(ledger.path.read_bytes().splitlines()[-1])["step"] == 2


def test_a_full_disk_stops_the_step_and_never_loses_a_count(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin(0)

    def no_space(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(RunError, match="step 1 is not begun.*No space left"):
        ledger.begin(1)
    assert ledger.steps_begun >= Ledger(ledger.path).steps_begun == 1


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


def test_a_closed_ledger_begins_no_step(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    with pytest.raises(RunError):
        ledger.begin(0)
