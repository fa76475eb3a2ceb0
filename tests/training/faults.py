"""What runs in processes that are killed, starved or stopped; a fork server imports torch once for all of them."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from tiny_runs import KEY

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dp_peft_diffusion.cli", "dp_peft_diffusion.training", "tiny_runs"])
FAILED = 1


def start(function, *arguments, log: Path) -> "multiprocessing.process.BaseProcess":
    """A process that runs `function`, its output and any traceback in `log`."""
    process = PROCESSES.Process(target=_logged, args=(function, arguments, str(log)))
    process.start()
    return process


def exit_code(process) -> int:
    """How a process ended; negative: by that signal."""
    process.join(120)
    return process.exitcode


def _logged(function, arguments, log):
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc(file=file)
            file.flush()
            os._exit(FAILED)


def train_until_killed(recipe, folder, lines, seconds):
    """Train, and be killed by signal 9, `seconds` after the ledger has got so many new lines."""
    from dp_peft_diffusion.training import train

    ledger = folder.with_name(f"{folder.name}.private") / "ledger.jsonl"
    threading.Thread(target=_kill, args=(ledger, _count(ledger) + lines, seconds), daemon=True).start()
    train(recipe, folder, key=KEY)


def _kill(ledger, lines, seconds):
    while _count(ledger) < lines:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _count(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def train_with_small_files(recipe, folder, limit):
    """Train where no file can grow beyond `limit` bytes, which looks like a full disk."""
    from dp_peft_diffusion.training import prepare, run

    prepared = prepare(recipe, folder)
    before, hardest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hardest))
    try:
        run(prepared, key=KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hardest))  # what went wrong must fit into the log


def command_line(*arguments):
    """`dp-peft ARGUMENTS`, with its exit code."""
    from dp_peft_diffusion.cli import main

    try:
        main(arguments, prog_name="dp-peft")
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


def wait_for_lines(path: Path, count: int, process) -> None:
    """Until a file has so many lines, or the process has ended."""
    while process.is_alive() and _count(path) < count:
        time.sleep(0.002)
