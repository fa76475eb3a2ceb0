"""`dp-peft bench`."""

import json
from typing import Any

import click

from dp_peft_diffusion.cli.program import hint
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.benchmark_cases import MEMORY_FORMATS, METHODS, MODELS, TARGET_MODULES

GIGA = 1e9
BUSY = 0.05  # share of the time waited for a processor, above which a table says so
COLUMNS = ("method", "s/step", "spread", "x peft", "x floor", "GB", "x peft", "step GB", "x peft", "error", "format")


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="unet2d-4.6m", show_default=True, help="Model size.")
@click.option(
    "--adapter", type=click.Choice(list(TARGET_MODULES)), default="lora", show_default=True, help="What trains."
)
@click.option("--batch_size", type=int, help="Examples in one step.  [the model's own]")
@click.option("--noise_multiplicity", type=int, default=1, show_default=True, help="Draws K of each example.")
@click.option(
    "--mixed_precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True, help="Of the forward."
)
@click.option("--methods", default=",".join(METHODS), show_default=True, metavar="A,B,...", help="What to compare.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Processes of each method.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Timed steps in each process.")
@click.option("--gradient_checkpointing", is_flag=True, help="Recompute activations in the backward, in all methods.")
@click.option(
    "--memory_format",
    type=click.Choice(["auto", *MEMORY_FORMATS]),
    default="auto",
    show_default=True,
    help="Of the weights; auto keeps the faster one of each method.",
)
@click.option("--threads", type=int, help="Threads of torch.  [torch's own choice]")
@click.option(
    "--logical_batch", metavar="N,...", help="Take also one step of N examples in micro-batches, for its peak memory."
)
@click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", help="For people, or for programs."
)
def bench(
    model: str,
    batch_size: int | None,
    methods: str,
    rounds: int,
    memory_format: str,
    logical_batch: str | None,
    style: str,
    **options: Any,
) -> None:
    """Measure speed and memory on this machine.

    Private training side by side with stock peft without privacy, with torch.func and with Opacus, on made-up images.
    Every measurement has a process of its own. Leave the machine alone meanwhile.
    """
    from dp_peft_diffusion.evaluation import benchmark

    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    b = MODELS[model].batch_size if batch_size is None else batch_size
    case = benchmark.Case(model, names[0], batch_size=b, **options)
    report = benchmark.bench(case, names, rounds, memory_format, _whole_numbers(logical_batch), hint)
    click.echo(json.dumps(report, indent=2) if style == "json" else "\n".join(table(report)))


def table(report: dict[str, Any]) -> list[str]:
    """The lines of a report: machine and case, one row for each method, and why a method has no numbers."""
    machine, case, methods = report["machine"], report["case"], report["methods"]
    on_gpu = [] if machine["device"] in (None, "cpu") else [machine["device"]]
    lines = [
        ", ".join([*on_gpu, machine["cpu"], f"{machine['threads']} threads", f"torch {machine['torch']}"]),
        f"{case['model']}: {_count(machine['parameters'])} parameters, {case['adapter']} trains "
        f"{_count(machine['trainable'])}, batch {case['batch_size']}, K = {case['noise_multiplicity']}, "
        f"{'bfloat16 autocast' if case['mixed_precision'] == 'bf16' else 'float32'}"
        f"{', gradient checkpointing' if case['gradient_checkpointing'] else ''}, "
        f"median of {case['rounds']} rounds of {case['repeats']} steps",
        "",
        _line(COLUMNS),
        *[_line(_cells(name, row)) for name, row in methods.items() if not row["failure"]],
        "",
        *[f"{name}: {row['failure']}" for name, row in methods.items() if row["failure"]],
        "GB = 10^9 bytes: peak of the process, and `step` above what was resident before the first step. "
        "Error: of the clipped sum, relative to one example at a time.",
    ]
    most = max((row.get("waited") or 0.0 for row in methods.values()), default=0.0)
    if most > BUSY:
        lines.append(
            f"DO NOT USE THESE TIMES: the machine was busy. A method waited up to {most:.0%} of its time for a "
            "processor. Stop other programs, give --threads no more than the cores that are free, and measure again."
        )
    return lines


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{row['seconds']:.3f}",
        _number(row.get("spread"), "{:.0%}"),
        _number(row.get("seconds_to_peft"), "{:.2f}"),
        _number(row.get("seconds_to_floor"), "{:.2f}"),
        f"{row['peak_bytes'] / GIGA:.2f}",
        _number(row.get("peak_to_peft"), "{:.2f}"),
        _number(row["step_bytes"] and row["step_bytes"] / GIGA, "{:.2f}"),
        _number(row.get("step_to_peft"), "{:.2f}"),
        _number(row.get("error"), "{:.0e}"),
        row["memory_format"],
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *middle, last = cells
    return f"{first:<14}" + "".join(f"{cell:>9}" for cell in middle) + f"  {last}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _whole_numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--logical_batch {text!r} must be whole numbers. Try 64,4096.") from error
