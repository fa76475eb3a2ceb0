"""One measurement in a process of its own: a case as JSON on stdin, the result as JSON on stdout."""

import contextlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.benchmark_cases import Case
from dp_peft_diffusion.evaluation.benchmark_methods import STEPS, error_against_loop
from dp_peft_diffusion.evaluation.benchmark_models import build
from dp_peft_diffusion.gradients.functional import trainable

STATUS, CLEAR_REFS, TASKS = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/task")


def measure(case: Case) -> dict[str, Any]:
    """Run a case here.

    Returns:
        {"seconds": median of the repeats, "repeats": [seconds], "waited": share of them, see `waited`, "peak_bytes": of
        the whole process (of the allocator on CUDA), "step_bytes": peak above what was resident before the first step
        or None, "error": against the loop or None, "parameters", "trainable", "torch", "threads", "device"}.

    Raises:
        UserError: the method cannot do this case.
    """
    if case.threads:
        torch.set_num_threads(case.threads)
    problem = build(case)
    step, batch = STEPS[case.method](problem), problem.batch(case.batch_size)
    memory = PeakMemory(problem.device)
    for _ in range(case.warmups):
        step(batch)
    seconds, waiting = [], seconds_waiting()
    for _ in range(case.repeats):
        _wait(problem.device)
        start = time.perf_counter()
        step(batch)
        _wait(problem.device)
        seconds.append(time.perf_counter() - start)
    share = waited(waiting, seconds_waiting(), sum(seconds) * torch.get_num_threads())
    peak_bytes, step_bytes = memory.read()
    adapter = sum(parameter.numel() for parameter in trainable(problem.model).values())
    return {
        "seconds": statistics.median(seconds),
        "repeats": seconds,
        "waited": share,
        "peak_bytes": peak_bytes,
        "step_bytes": step_bytes,
        "error": error_against_loop(problem, step) if case.check else None,
        "parameters": sum(parameter.numel() for parameter in problem.model.parameters()) - adapter,
        "trainable": adapter,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if problem.device.type == "cuda" else "cpu",
    }


def seconds_waiting() -> float | None:
    """How long the threads of this process were ready to run while others had the processor; None if not told."""
    try:  # nanoseconds on the processor, waiting for it, and slices (Linux, Documentation/scheduler/sched-stats.rst)
        return sum(int((task / "schedstat").read_text().split()[1]) for task in TASKS.iterdir()) / 1e9
    except OSError:
        return None


def waited(before: float | None, after: float | None, thread_seconds: float) -> float | None:
    """The share of `thread_seconds` spent waiting for a processor: near 0 on an idle machine."""
    return None if before is None or after is None else (after - before) / thread_seconds


class PeakMemory:
    """Peak memory since it was made, and of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.at_start = torch.cuda.memory_allocated()
            return
        self.before = _peak_resident()
        self.was_reset = _forget_peak()
        self.at_start = _status("VmRSS") if self.was_reset else 0

    def read(self) -> tuple[int, int | None]:
        """(peak of the process, peak above the start), bytes; the second is None where the kernel keeps one peak."""
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated()
            return peak, peak - self.at_start
        since = _peak_resident()
        return max(self.before, since), since - self.at_start if self.was_reset else None


def _peak_resident() -> int:
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(field: str) -> int:
    """A size in /proc/self/status, bytes (proc(5))."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> bool:
    """Reset VmHWM to VmRSS (proc(5), clear_refs 5); False where that is not possible."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Read a case, print its result; {"failure": reason} for a method that cannot do it."""
    case = Case(**json.load(sys.stdin))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = measure(case)
        except UserError as error:
            result = {"failure": str(error)}
        except Exception as error:  # whatever a foreign library raises is the reason that the table shows
            result = {"failure": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
