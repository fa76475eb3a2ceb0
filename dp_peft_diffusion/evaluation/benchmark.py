"""Speed and memory on this machine: every method in processes of its own, in an order that alternates.

A first round tries every method in each memory format, checks it against the one-by-one loop and keeps its faster
format. The rounds that count follow. Ratios are taken inside a round, where the machine is as busy for both, and then
their median. This process imports no torch, so that it holds no memory and no threads of its own.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dp_peft_diffusion.evaluation.benchmark_cases import MEMORY_FORMATS, METHODS, Case

WORKER = "dp_peft_diffusion.evaluation.benchmark_worker"
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "dp-peft/bench/1"
FACTS = ("parameters", "trainable", "torch", "threads", "device")
SAME = "model adapter batch_size noise_multiplicity mixed_precision gradient_checkpointing warmups repeats".split()
Result = dict[str, Any]


def bench(
    case: Case,
    methods: tuple[str, ...],
    rounds: int,
    memory_format: str = "auto",
    logical_batches: tuple[int, ...] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure `methods` side by side.

    Args:
        case: what is the same for all; its method and memory format are replaced.
        methods: keys of METHODS, in the order of the first round.
        rounds: measurements of each method after the first try.
        memory_format: "auto", or one of MEMORY_FORMATS for all.
        logical_batches: examples; for each, one step of `ours` of that many, in micro-batches of case.batch_size.
        tell: is called with one line before each measurement.

    Returns:
        {"schema", "machine", "case", "methods", "trials", "rounds", "logical"}, as docs/reference/bench.md has it.

    Raises:
        UserError: a method or memory format that is not known.
    """
    formats = MEMORY_FORMATS if memory_format == "auto" else (memory_format,)
    cases = {name: [replace(case, method=name, memory_format=shape) for shape in formats] for name in methods}
    trials = []
    for name in methods:
        for candidate in cases[name]:
            tell(f"first try: {name}, {candidate.memory_format}")
            trials.append(run_case(replace(candidate, check=True)))
    chosen = {name: best for name in methods if (best := faster_format(cases[name], trials))}
    measured: list[list[Result]] = []
    for number in range(rounds):
        measured.append([])
        for name in order(tuple(chosen), number):
            tell(f"round {number + 1} of {rounds}: {name}, {chosen[name].memory_format}")
            measured[-1].append(run_case(chosen[name]))
    rows = {name: summary(name, chosen.get(name), trials, measured) for name in methods}
    like_ours = chosen.get("ours") or replace(case, method="ours", memory_format=formats[0])
    logicals = []
    for examples in logical_batches:
        tell(f"logical batch {examples}: ours, {like_ours.memory_format}")
        logical = run_case(replace(like_ours, logical_batch=examples, warmups=0, repeats=1))
        logicals.append(logical)
        rows[f"logical_{examples}"] = logical_row(logical)
    return {
        "schema": SCHEMA,
        "machine": {"cpu": cpu_name(), "cpu_count": os.cpu_count(), **facts(trials)},
        "case": {name: asdict(case)[name] for name in SAME} | {"memory_format": memory_format, "rounds": rounds},
        "methods": rows,
        "trials": trials,
        "rounds": measured,
        "logical": logicals,
    }


def order(methods: tuple[str, ...], number: int) -> tuple[str, ...]:
    """The order of round `number` (0, 1, ...): every other round backwards, every other pair of rounds moved by one."""
    shift = number // 2 % len(methods) if len(methods) > 2 else 0  # of two, moving would undo turning
    moved = methods[shift:] + methods[:shift]
    return moved[::-1] if number % 2 else moved


def run_case(case: Case) -> Result:
    """What the worker measured, with "method", "memory_format" and "failure" (None, or why there is nothing)."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if case.threads:
        environment |= {"OMP_NUM_THREADS": str(case.threads), "MKL_NUM_THREADS": str(case.threads)}
    ended = subprocess.run(
        [sys.executable, "-m", WORKER],
        input=json.dumps(asdict(case)),
        capture_output=True,
        text=True,
        env=environment,
    )
    named = {"method": case.method, "memory_format": case.memory_format, "logical_batch": case.logical_batch}
    try:
        return {**named, "failure": None, **json.loads(ended.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        last_line = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        killed = f"killed by signal {-ended.returncode}; is there memory enough?"
        return {**named, "failure": killed if ended.returncode < 0 else last_line}


def faster_format(candidates: list[Case], trials: list[Result]) -> Case | None:
    """The candidate whose trial was the fastest; None if all failed."""
    seconds = {(trial["method"], trial["memory_format"]): trial["seconds"] for trial in trials if not trial["failure"]}
    able = [candidate for candidate in candidates if (candidate.method, candidate.memory_format) in seconds]
    return min(able, key=lambda candidate: seconds[candidate.method, candidate.memory_format], default=None)


def summary(name: str, chosen: Case | None, trials: list[Result], rounds: list[list[Result]]) -> dict[str, Any]:
    """One method's row: medians over the rounds, in seconds and bytes; a "failure" where there is nothing to tell."""
    tried = [trial for trial in trials if trial["method"] == name]
    measured = [result for results in rounds for result in results if result["method"] == name]
    failures = [result["failure"] for result in (measured if chosen else tried) if result["failure"]]
    row = {"description": METHODS[name], "failure": failures[0] if failures else None}
    if failures or chosen is None:
        return row
    seconds = [result["seconds"] for result in measured]
    median = statistics.median(seconds)
    kept = next(trial for trial in tried if trial["memory_format"] == chosen.memory_format)
    return row | {
        "memory_format": chosen.memory_format,
        "trainable": kept["trainable"],
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median if len(seconds) > 1 else None,
        "waited": max((result["waited"] for result in measured if result["waited"] is not None), default=None),
        "seconds_to_peft": ratio(name, "peft", "seconds", rounds),
        "seconds_to_floor": ratio(name, "floor", "seconds", rounds),
        "peak_bytes": statistics.median(result["peak_bytes"] for result in measured),
        "peak_to_peft": ratio(name, "peft", "peak_bytes", rounds),
        "step_bytes": kept["step_bytes"] and statistics.median(result["step_bytes"] for result in measured),
        "step_to_peft": ratio(name, "peft", "step_bytes", rounds),
        "error": kept["error"],
    }


def ratio(name: str, baseline: str, quantity: str, rounds: list[list[Result]]) -> float | None:
    """Median over the rounds of name's quantity / the baseline's in the same round; None where either is missing."""
    found = []
    for results in rounds:
        values = {result["method"]: result.get(quantity) for result in results}
        value, base = values.get(name), values.get(baseline)
        if value and base:
            found.append(value / base)
    return statistics.median(found) if found else None


def logical_row(result: Result) -> dict[str, Any]:
    """The row of one large logical batch: measured once, so it has no spread and no ratios."""
    quantities = ("memory_format", "trainable", "seconds", "peak_bytes", "step_bytes")
    row = {
        "description": f"ours, {result['logical_batch']:,} examples in micro-batches",
        "failure": result["failure"],
    }
    return row if result["failure"] else row | {name: result[name] for name in quantities}


def facts(results: list[Result]) -> dict[str, Any]:
    """What the workers say of themselves; the most that is trainable, as `floor` has no adapter."""
    able = [result for result in results if not result["failure"]]
    return {name: max((result[name] for result in able), default=None) for name in FACTS}


def cpu_name() -> str:
    """The processor's own name for itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
