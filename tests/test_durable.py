"""Whole or not at all, and on the disk when the call returns."""

import os
import stat

import pytest

from dp_peft_diffusion.durable import fsync_tree, move_durably, partial_of, write_durably


def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    write_durably(tmp_path / "state.json", b"{}", 0o600)
    assert events == ["file", "rename", "folder"]
    assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failure_at_any_point_leaves_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "state.json"
    write_durably(path, b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if call == "write":
        partial_of(path).mkdir()
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_left_over_partial_file_is_overwritten_whatever_its_length_and_mode(tmp_path):
    path = tmp_path / "key"
    partial_of(path).write_bytes(b"x" * 1000)
    write_durably(path, b"short", 0o600)
    assert path.read_bytes() == b"short" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not partial_of(path).exists()


def test_folders_move_whole(tmp_path):
    (tmp_path / "staging" / "samples").mkdir(parents=True)
    (tmp_path / "staging" / "samples" / "a").write_text("1")
    fsync_tree(tmp_path / "staging")
    move_durably(tmp_path / "staging", tmp_path / "final")
    assert (tmp_path / "final" / "samples" / "a").read_text() == "1" and not (tmp_path / "staging").exists()
