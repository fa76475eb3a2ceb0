"""Kills, full disks, read-only folders, signals and rivals: nothing is lost, and nothing counts too little."""

import errno
import os
import signal

import numpy as np
import pytest
from tiny_runs import KEY, changed, tiny_recipe
from training.faults import (
    FAILED,
    command_line,
    exit_code,
    start,
    train_until_killed,
    train_with_small_files,
    wait_for_lines,
)

from dp_peft_diffusion.privacy.certificate import verify
from dp_peft_diffusion.privacy.ledger import steps_begun
from dp_peft_diffusion.recipe import to_yaml
from dp_peft_diffusion.runs.folder import RunFolder
from dp_peft_diffusion.training import FinishedRun, train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return changed(tiny_recipe(tmp_path_factory.mktemp("tiny")), "adapter", rank=32)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nothing disturbed."""
    return released(train(recipe, tmp_path_factory.mktemp("whole") / "run", key=KEY).folder)


def released(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(recipe, folder, whole):
    """The same command again: it must end as the undisturbed run did, every step counted once."""
    begun = steps_begun(folder.with_name(folder.name + ".private") / "ledger.jsonl").get(1, 0)
    try:
        result = train(recipe, folder, key=KEY)
    except FinishedRun:
        pass  # it came through, or was killed after it had been published
    assert released(folder) == whole
    private = folder.with_name(folder.name + ".private")
    assert steps_begun(private / "ledger.jsonl") == {1: 6} and begun <= 6
    assert not (private / "key").exists()
    return result if begun < 6 else None


def kill_and_finish(recipe, folder, whole, seeds):
    """Each run is killed some time after a line of its ledger; at least every second of these kills must hit a step."""
    hits = 0
    for seed in seeds:
        rng, run, log = np.random.default_rng(seed), folder / str(seed), folder / f"{seed}.log"
        lines, seconds = int(rng.integers(0, 7)), rng.uniform(0, 0.1)
        ended = exit_code(start(train_until_killed, recipe, run, lines, seconds, log=log))
        assert ended in (-signal.SIGKILL, 0), log.read_text()
        hits += ended == -signal.SIGKILL and lines > 0
        finish(recipe, run, whole)
    assert hits >= len(seeds) / 2


def test_a_run_killed_at_random_points_ends_as_if_it_had_not_been(recipe, whole, tmp_path):
    kill_and_finish(recipe, tmp_path, whole, range(3))


@pytest.mark.slow
def test_fifty_runs_killed_at_random_points_end_as_if_they_had_not_been(recipe, whole, tmp_path):
    kill_and_finish(recipe, tmp_path, whole, range(100, 150))


@pytest.mark.parametrize("limit", [0, 200, 4_000, 10_000])
def test_a_disk_that_fills_up_loses_nothing(recipe, whole, tmp_path, limit):
    process = start(train_with_small_files, recipe, tmp_path / "run", limit, log=tmp_path / "log")
    assert exit_code(process) == FAILED
    said = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert said.startswith("dp_peft_diffusion.errors.RunError") and "File too large" in said, said
    assert not (tmp_path / "run").exists()
    finish(recipe, tmp_path / "run", whole)


def test_a_folder_that_turns_read_only_loses_nothing(recipe, whole, tmp_path, monkeypatch):
    folder, opened, original = tmp_path / "run", [], os.open

    def read_only(path, flags, *arguments, **named):
        if str(tmp_path / "run.private") in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            opened.append(path)
            if len(opened) > 7:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="Read-only"):
        train(recipe, folder, key=KEY)
    monkeypatch.undo()
    assert (tmp_path / "run.private" / "ledger.jsonl").is_file()
    finish(recipe, folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_polite_stop_says_how_to_go_on_and_the_same_command_does(recipe, tmp_path, number):
    (tmp_path / "recipe.yaml").write_text(to_yaml(changed(recipe, "train", max_train_steps=12)))
    words = ("train", "--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"))
    process = start(command_line, *words, log=tmp_path / "log")
    ledger = tmp_path / "run.private" / "ledger.jsonl"
    wait_for_lines(ledger, 3, process)
    os.kill(process.pid, number)
    assert exit_code(process) == 130
    assert "Type the same command to go on" in (tmp_path / "log").read_text()
    begun = steps_begun(ledger)[1]
    assert 3 <= begun < 12 and not (tmp_path / "run").exists()
    assert exit_code(start(command_line, *words, log=tmp_path / "log")) == 0
    assert "Resumes" in (tmp_path / "log").read_text() and steps_begun(ledger) == {1: 12}
    assert verify(tmp_path / "run").ok


def test_a_second_process_is_kept_out_and_told_so(recipe, whole, tmp_path):
    with RunFolder(tmp_path / "run").locked():
        process = start(train_until_killed, recipe, tmp_path / "run", 100, 0, log=tmp_path / "log")
        assert exit_code(process) == FAILED
    assert "another process is training" in (tmp_path / "log").read_text()
    finish(recipe, tmp_path / "run", whole)
