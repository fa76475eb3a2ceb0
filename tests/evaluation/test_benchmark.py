"""`dp-peft bench`: what is measured is right. How fast it is, no test says."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dp_peft_diffusion.cli import main
from dp_peft_diffusion.cli.benchmark import table
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import benchmark, benchmark_worker
from dp_peft_diffusion.evaluation.benchmark_cases import METHODS, MODELS, TARGET_MODULES, Case, ModelSize
from dp_peft_diffusion.evaluation.benchmark_methods import MAX_GRAD_NORM, STEPS, error_against_loop
from dp_peft_diffusion.evaluation.benchmark_models import build, make_model
from dp_peft_diffusion.evaluation.benchmark_worker import PeakMemory, measure
from dp_peft_diffusion.gradients.functional import Clip, loop_clipped_sum, trainable

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus, on a layer fed by the input

ROOT = Path(__file__).resolve().parents[2]
NOT_PRIVATE, PRIVATE = ("floor", "peft"), ("ours", "vmap", "opacus_hooks", "opacus_ghost")
TINY_TEXT = ModelSize(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    },
    batch_size=2,
    ranks={"lora": 2, "lora_conv": 2},
    text_tokens=5,
)


def quick(method, **options):
    return Case("tiny", method, **{"batch_size": 2, "warmups": 0, "repeats": 1, "check": True} | options)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", ["ours", "vmap", "opacus_hooks"])
def test_every_private_method_gives_the_clipped_sum_of_the_loop(method, k):
    assert measure(quick(method, noise_multiplicity=k))["error"] < 1e-4


def test_ghost_clipping_gives_the_clipped_sum_of_the_loop_and_refuses_several_draws():
    assert measure(quick("opacus_ghost"))["error"] < 1e-4
    with pytest.raises(UserError, match="K times"):
        measure(quick("opacus_ghost", noise_multiplicity=2))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("method", PRIVATE)
def test_on_convolutions_opacus_is_seen_to_be_wrong_and_the_others_right(method, memory_format):
    error = measure(quick(method, adapter="lora_conv", memory_format=memory_format))["error"]
    assert error > 1e-2 if method.startswith("opacus") else error < 1e-5


@pytest.mark.parametrize("method", [*NOT_PRIVATE, "step"])
def test_what_returns_no_clipped_sum_is_measured_all_the_same(method):
    result = measure(quick(method))
    assert result["error"] is None and result["seconds"] > 0 and result["peak_bytes"] > 0
    assert (result["trainable"] == 0) == (method == "floor")


@pytest.mark.parametrize("method", ["ours", "peft"])
def test_bfloat16_and_checkpointing_reach_the_method(method):
    result = measure(quick(method, mixed_precision="bf16", gradient_checkpointing=True))
    assert result["error"] is None or result["error"] < 2e-2


def test_bfloat16_changes_the_losses_and_checkpointing_does_not():
    def losses(**options):
        problem = build(quick("ours", **options))
        return problem.loss_fn(problem.model, problem.batch(2))

    assert torch.equal(losses(), losses(gradient_checkpointing=True))
    assert not torch.equal(losses(), losses(mixed_precision="bf16"))


def test_a_model_with_text_is_measured_right():
    problem = build(quick("ours", adapter="lora_conv", noise_multiplicity=2), TINY_TEXT)
    assert problem.batch(3)["text"].shape == (3, 5, 8)
    assert error_against_loop(problem, STEPS["ours"](problem)) < 1e-5


def test_a_method_that_does_not_clip_is_seen_to_be_wrong():
    problem = build(quick("ours"))
    parameters = trainable(problem.model)

    def unclipped(batch):
        losses = problem.loss_fn(problem.model, batch)
        return dict(zip(parameters, torch.autograd.grad(losses.sum(), [*parameters.values()]), strict=True))

    assert error_against_loop(problem, unclipped) > 1e-2


def test_a_logical_batch_is_the_sum_over_full_micro_batches():
    problem = build(quick("ours", logical_batch=5))  # 2 + 2 + 2
    total = STEPS["ours"](problem)(problem.batch(2))
    parts = [
        loop_clipped_sum(problem.model, problem.loss_fn, problem.batch(2, seed), Clip(MAX_GRAD_NORM))
        for seed in range(3)
    ]
    for name, tensor in total.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts), rtol=1e-4, atol=1e-7)


def test_the_whole_step_moves_every_trainable_tensor_by_fresh_draws():
    problem = build(quick("step"))
    step, batch = STEPS["step"](problem), problem.batch(2)
    before = {name: parameter.detach().clone() for name, parameter in trainable(problem.model).items()}
    step(batch)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainable(problem.model).items())


@pytest.mark.parametrize(
    ("model", "parameters", "adapters"),
    [
        ("unet2d-4.6m", 4_634_305, {"lora": 57_344, "lora_conv": 342_528}),
        ("unet2dcond-60m", 62_171_652, {"lora": 429_056, "lora_conv": 389_248}),
    ],
)
def test_named_sizes_are_what_they_say(model, parameters, adapters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make_model(MODELS[model], None).parameters()) == parameters
        for adapter, trained in adapters.items():
            adapted = make_model(MODELS[model], adapter)
            assert sum(p.numel() for p in trainable(adapted).values()) == trained
            hit = {name.split(".lora_")[0] for name in trainable(adapted)}
            assert all(any(path.endswith(f".{end}") for path in hit) for end in TARGET_MODULES[adapter])


def test_two_builds_of_a_case_are_the_same_and_leave_the_global_random_stream_alone():
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first, second = build(quick("ours")), build(quick("vmap"))
    assert torch.equal(torch.rand(2), expected)
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(tensor, second.batch(2)[name]) for name, tensor in first.batch(2).items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_the_peak_counts_what_was_freed_before_it_is_read_and_not_what_was_there_before():
    size, held = 64 << 20, bytearray(96 << 20)
    held[:: 1 << 12] = b"x" * len(range(0, len(held), 1 << 12))
    memory = PeakMemory(torch.device("cpu"))
    block = bytearray(size)
    block[:: 1 << 12] = b"x" * len(range(0, size, 1 << 12))
    del block
    peak, above = memory.read()
    assert peak > size + len(held)
    assert above is None or 0.9 * size < above < 1.2 * size


def test_every_named_method_has_a_step():
    assert list(STEPS) == list(METHODS)


@pytest.mark.parametrize(
    "options", [{"model": "huge"}, {"method": "dp"}, {"adapter": "loha"}, {"batch_size": 0}, {"repeats": 0}]
)
def test_a_case_that_cannot_be_is_refused_by_the_name_of_its_option(options):
    with pytest.raises(UserError, match="methods" if "method" in options else next(iter(options))):
        dataclasses.replace(Case("tiny", "ours"), **options)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_order_alternates_and_gives_every_method_every_place_equally_often(n):
    methods = tuple(METHODS)[:n]
    rounds = [benchmark.order(methods, number) for number in range(2 * n)]
    assert rounds[0] == methods
    assert all(sorted(names) == sorted(methods) for names in rounds)
    assert all(n == 1 or one != other for one, other in zip(rounds, rounds[1:], strict=False))
    for place in range(n):
        assert all(sum(names[place] == method for names in rounds) == 2 for method in methods)


class FakeMachine:
    """Workers of known speed on a machine that is as busy as `load` says in each round; `broken` methods fail."""

    def __init__(self, seconds, broken=(), load=(1, 1, 1), waited=0.0):
        self.seconds, self.broken, self.load, self.waited, self.cases = seconds, broken, load, waited, []

    def __call__(self, case):
        self.cases.append(case)
        named = {"method": case.method, "memory_format": case.memory_format, "logical_batch": case.logical_batch}
        if case.method in self.broken or (case.method, case.memory_format) in self.broken:
            return {**named, "failure": "it cannot"}
        done = sum(earlier.method == case.method and not earlier.check for earlier in self.cases) - 1
        slow = 1 if case.check or case.logical_batch else self.load[done]
        seconds = self.seconds[case.method] * slow * (2 if case.memory_format == "contiguous" else 1)
        facts = {"parameters": 100, "trainable": 7, "torch": "2", "threads": 1, "device": "cpu"}
        memory = {"peak_bytes": int(1e9 * self.seconds[case.method]), "step_bytes": int(5e8)}
        error = 1e-7 if case.check and case.method not in NOT_PRIVATE else None
        measured = {"repeats": [seconds], "error": error, "waited": self.waited}
        return {**named, "failure": None, "seconds": seconds, **measured, **memory, **facts}


def bench(monkeypatch, machine, methods, memory_format="auto", logical_batches=()):
    monkeypatch.setattr(benchmark, "run_case", machine)
    return benchmark.bench(Case("tiny", "peft"), methods, 3, memory_format, logical_batches)


def test_ratios_are_those_inside_a_round_however_busy_the_machine_is_in_others(monkeypatch):
    machine = FakeMachine({"floor": 1.0, "peft": 2.0, "ours": 1.5}, load=(1, 40, 3))
    rows = bench(monkeypatch, machine, ("floor", "peft", "ours"))["methods"]
    assert rows["ours"]["seconds_to_peft"] == pytest.approx(0.75)
    assert rows["ours"]["seconds_to_floor"] == pytest.approx(1.5)
    assert rows["ours"]["seconds"] == pytest.approx(4.5) and rows["ours"]["spread"] == pytest.approx(13)
    assert rows["ours"]["peak_to_peft"] == pytest.approx(0.75) and rows["ours"]["step_to_peft"] == 1


def test_every_method_keeps_its_faster_format_and_is_checked_in_both(monkeypatch):
    machine = FakeMachine({"peft": 1.0, "ours": 1.0}, broken=[("ours", "channels_last")])
    report = bench(monkeypatch, machine, ("peft", "ours"))
    assert report["methods"]["peft"]["memory_format"] == "channels_last"
    assert report["methods"]["ours"]["memory_format"] == "contiguous"  # the slower one, as the other fails
    assert {(case.method, case.memory_format) for case in machine.cases if case.check} == {
        (method, shape) for method in ("peft", "ours") for shape in ("contiguous", "channels_last")
    }
    assert [[result["method"] for result in results] for results in report["rounds"]] == [
        ["peft", "ours"],
        ["ours", "peft"],
        ["peft", "ours"],
    ]


def test_a_method_that_fails_is_listed_with_its_reason(monkeypatch):
    machine = FakeMachine({"floor": 1.0, "ours": 1.0}, broken=["vmap"])
    report = bench(monkeypatch, machine, ("floor", "vmap", "ours"), "contiguous")
    assert report["methods"]["vmap"]["failure"] == "it cannot"
    assert report["methods"]["ours"]["seconds_to_peft"] is None  # peft was not asked for
    lines = table(report)
    assert "vmap: it cannot" in lines and not any("None" in line for line in lines)


@pytest.mark.parametrize(("share", "told"), [(None, False), (0.01, False), (0.5, True)])
def test_a_table_from_a_busy_machine_says_that_its_times_are_of_no_use(monkeypatch, share, told):
    report = bench(monkeypatch, FakeMachine({"peft": 1.0, "ours": 1.0}, waited=share), ("peft", "ours"))
    assert any("DO NOT USE" in line and "50%" in line for line in table(report)) == told


def test_one_round_has_no_spread(monkeypatch):
    monkeypatch.setattr(benchmark, "run_case", FakeMachine({"peft": 1.0}))
    report = benchmark.bench(Case("tiny", "peft"), ("peft",), 1, "contiguous")
    assert report["methods"]["peft"]["spread"] is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux")
def test_waiting_for_a_processor_is_seen_when_two_processes_share_one():
    cores = os.sched_getaffinity(0)
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    os.sched_setaffinity(0, {min(cores)})
    rival = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.5)
        before, start = benchmark_worker.seconds_waiting(), time.perf_counter()
        while (elapsed := time.perf_counter() - start) < 1:
            pass
        assert benchmark_worker.waited(before, benchmark_worker.seconds_waiting(), elapsed) > 0.2
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)


def test_logical_batches_are_run_by_ours_once_in_one_row_each(monkeypatch):
    machine = FakeMachine({"ours": 1.0})
    report = bench(monkeypatch, machine, ("ours",), logical_batches=(64, 4096))
    assert list(report["methods"]) == ["ours", "logical_64", "logical_4096"]
    assert [case.logical_batch for case in machine.cases if case.logical_batch] == [64, 4096]
    assert [line.split()[0] for line in table(report) if line.startswith("logical")] == ["logical_64", "logical_4096"]


def test_a_worker_that_dies_is_a_failure_with_its_last_words(monkeypatch):
    monkeypatch.setattr(benchmark, "WORKER", "no_such_module")
    assert "No module named no_such_module" in benchmark.run_case(quick("ours"))["failure"]
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), -9, "", ""))
    assert "signal 9" in benchmark.run_case(quick("ours"))["failure"]


def test_a_worker_prints_one_line_of_json_whatever_happens(monkeypatch, capsys):
    def printed(case):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(dataclasses.asdict(case))))
        benchmark_worker.main()
        return json.loads(capsys.readouterr().out)

    assert "K times" in printed(quick("opacus_ghost", noise_multiplicity=2))["failure"]
    monkeypatch.setattr(benchmark_worker, "measure", lambda case: print("chatter") or 1 / 0)
    assert printed(quick("ours")) == {"failure": "ZeroDivisionError: division by zero"}
    monkeypatch.setattr(benchmark_worker, "measure", lambda case: {"seconds": case.repeats})
    assert printed(quick("ours", repeats=3)) == {"seconds": 3}


def test_the_measuring_parent_imports_no_torch():
    code = (
        "import sys, dp_peft_diffusion.cli.benchmark, dp_peft_diffusion.evaluation.benchmark; "
        "sys.exit(bool({'torch', 'numpy', 'peft', 'diffusers', 'opacus'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


KEYS = {"schema", "machine", "case", "methods", "trials", "rounds", "logical"}
ROW = {
    "description", "failure", "memory_format", "trainable", "seconds", "spread", "waited", "seconds_to_peft",
    "seconds_to_floor", "peak_bytes", "peak_to_peft", "step_bytes", "step_to_peft", "error",
}  # fmt: skip


@pytest.mark.slow  # a process for each method
def test_the_command_measures_in_processes_and_prints_the_documented_json():
    words = "bench --model tiny --batch-size 2 --methods ours --noise_multiplicity 2 --rounds 1"
    options = "--repeats 1 --threads 1 --memory_format contiguous --format json"
    result = CliRunner().invoke(main, f"{words} {options}".split())
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == KEYS and report["schema"] == "dp-peft/bench/1"
    assert report["methods"]["ours"].keys() == ROW and report["methods"]["ours"]["error"] < 1e-4
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"] == torch.__version__
    assert report["case"]["noise_multiplicity"] == 2 and len(report["rounds"]) == 1
    documented = (ROOT / "docs/reference/bench.md").read_text()
    assert [key for key in KEYS | ROW if f"`{key}`" not in documented] == []
    assert "first try: ours" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [("--methods ours,theirs", "theirs"), ("--batch_size 0", "batch_size"), ("--logical_batch many", "64,4096")],
)
def test_a_mistake_is_told_before_anything_is_measured(monkeypatch, words, said):
    monkeypatch.setattr(benchmark, "run_case", None)
    result = CliRunner().invoke(main, ["bench", *words.split()])
    assert result.exit_code == 2 and said in result.output
