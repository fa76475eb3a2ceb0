"""The ablations of docs/explanation/ablations.md: small private runs on MNIST, one choice changed at a time.

    python docs/scripts/ablations.py run --mnist FOLDER --work FOLDER     # resumable; one result at a time
    python docs/scripts/ablations.py report                               # the table and the plot of the page

FOLDER of --mnist holds train.parquet and validation.parquet with columns image and label. Every run is one line of
docs/explanation/ablations.jsonl, written when the run is done; the same command goes on where it stopped. Two sweeps
side by side take --part 0/2 and --part 1/2.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dp_peft_diffusion.diffusion.datasets import open_examples
from dp_peft_diffusion.diffusion.encoder import PixelEncoder
from dp_peft_diffusion.diffusion.generation import generate
from dp_peft_diffusion.evaluation.utility import evaluate
from dp_peft_diffusion.privacy import certificate
from dp_peft_diffusion.recipe import Data, load_recipe
from dp_peft_diffusion.training import train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "explanation" / "ablations.jsonl"
SEEDS = (0, 1)
NUM_IMAGES, NUM_SAMPLES = 2000, 1000

REFERENCE: dict[str, object] = {
    "data.declared_public": True,
    "privacy.epsilon": 10.0,
    "privacy.record_spending": False,
    "train.train_batch_size": 250,
    "train.max_train_steps": 60,
    "train.noise_multiplicity": 4,
    "train.learning_rate": 0.05,
    "train.label_dropout": 0.0,
    "train.ema_decay": 0.9,
    "train.checkpointing_steps": 1000,
    "adapter.class_code_rank": 16,
    "sample.num_images": 20,
    "sample.num_inference_steps": 10,
    "sample.guidance_scale": 2.0,
}
# Axis -> setting -> what it changes. "reference" stands in every axis, but for K, whose settings stand by themselves.
AXES: dict[str, dict[str, dict[str, object]]] = {
    "K, 24 steps each": {
        f"K={k}, 24 steps": {"train.noise_multiplicity": k, "train.max_train_steps": 24} for k in (1, 4, 16)
    },
    "K, 384 draws of an image each": {
        f"K={k}, {384 // k} steps": {"train.noise_multiplicity": k, "train.max_train_steps": 384 // k}
        for k in (1, 4, 16)
    },
    "expected batch, equal draws": {
        "batch 60, 250 steps": {"train.train_batch_size": 60, "train.max_train_steps": 250},
        "batch 1000, 15 steps": {"train.train_batch_size": 1000, "train.max_train_steps": 15},
    },
    "rank": {"rank 1": {"adapter.rank": 1}, "rank 16": {"adapter.rank": 16}},
    "modules": {
        "class rows only": {"adapter.kind": "class_rows"},
        "LoRA on convolutions too": {"adapter.kind": "lora_conv"},
        "biases": {"adapter.kind": "bitfit"},
        "attention whole": {"adapter.kind": "attention"},
    },
    "LoRA's A": {"A frozen": {"adapter.kind": "ffa_lora"}},
    "timesteps": {
        "log-normal": {"train.timestep_distribution": "log_normal"},
        "mixture": {"train.timestep_distribution": "mixture"},
        "range 0-600": {"train.timestep_range": (0, 600)},
        "range 200-1000": {"train.timestep_range": (200, 1000)},
    },
    "optimizer": {
        "Adam, bias-corrected": {"train.optimizer": "adam_bc"},
        "SGD": {"train.optimizer": "sgd", "train.learning_rate": 10.0},
    },
    "clipping": {"flat, C = 1": {"privacy.clipping": "flat"}},
    "sampling": {"fidelity (stochastic)": {}},
}
STOCHASTIC = "fidelity (stochastic)"


def settings() -> dict[str, dict[str, object]]:
    """Name -> recipe overrides, of every run that a seed makes."""
    changes = {name: change for axis in AXES.values() for name, change in axis.items()}
    return {name: REFERENCE | change for name, change in {"reference": {}, **changes}.items()}


def make_images(mnist: Path, work: Path) -> tuple[Path, Path]:
    """2,000 training rows picked by position from a public seed, and the validation rows, as parquet files."""
    chosen, held_out = work / "mnist-2000.parquet", mnist / "validation.parquet"
    if not chosen.is_file():
        rows = pq.read_table(mnist / "train.parquet")
        picked = np.random.RandomState(0).permutation(len(rows))[:NUM_IMAGES]
        pq.write_table(rows.take(pa.array(np.sort(picked))), chosen)
    return chosen, held_out


def one_run(name: str, seed: int, mnist: Path, work: Path) -> dict[str, object]:
    """Train, sample and evaluate one setting; the line of the results."""
    chosen, held_out = make_images(mnist, work)
    overrides = settings()[name] | {"data.dataset_name": str(chosen), "train.seed": seed}
    stochastic = name == STOCHASTIC
    folder = work / f"{'reference' if stochastic else re.sub(r'[^a-z0-9A-Z=]+', '-', name)}-{seed}"
    started = time.process_time()  # other work may go on beside a sweep
    if not (folder / "privacy.json").is_file():
        train(load_recipe(None, overrides), folder)
    document = certificate.read(folder)
    line: dict[str, object] = {
        "setting": name,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - started),
        "noise_multiplier": document["mechanism"]["noise_multiplier"],
        "epsilon": document["guarantee"]["epsilon"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return line | accuracies(folder, held_out, "fidelity" if stochastic else "utility", seed)


def accuracies(folder: Path, held_out: Path, scheduler: str, seed: int) -> dict[str, object]:
    """Of classifiers that train on images of a run's adapter, on the held-out images."""
    images, labels = generate(
        folder, num_images=NUM_SAMPLES, scheduler=scheduler, num_inference_steps=20, guidance_scale=2.0, seed=seed
    )
    names = load_recipe(folder / "recipe.yaml").data.class_names or ()
    synthetic = np.stack([np.asarray(image)[None] for image in images])  # (n, 1, 32, 32)
    real = open_examples(Data(dataset_name=str(held_out)), PixelEncoder(32, 1), None)
    positions = np.array([names.index(label) for label in labels or ()])
    found = evaluate(synthetic, positions, *real.valid_arrays(), seed=seed, declared_public=True)
    return {kind: found[kind]["accuracy"] for kind in ("logistic_regression", "cnn")}


def results() -> dict[tuple[str, int], dict[str, float]]:
    """(setting, seed) -> its line."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {(line["setting"], line["seed"]): line for line in map(json.loads, lines)}


def run_all(mnist: Path, work: Path, part: int, parts: int) -> None:
    """Every run of this part whose line is not there yet, the reference first."""
    work.mkdir(parents=True, exist_ok=True)
    planned = [(name, seed) for seed in SEEDS for name in settings()]
    for index, (name, seed) in enumerate(planned):
        if index % parts != part or (name, seed) in results():
            continue
        line = one_run(name, seed, mnist, work)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def report() -> None:
    """The table of the page, to standard output, and its plot."""
    done = {setting for setting, _ in results()}
    print("| axis | setting | CNN | logistic regression | noise multiplier |\n|---|---|---|---|---|")
    for axis, changes in AXES.items():
        for name in changes if axis.startswith("K") else ("reference", *changes):
            if name in done:
                lines = [line for (setting, _), line in results().items() if setting in (name, f"{name}, first time")]
                cells = [_cell([line[kind] for line in lines]) for kind in ("cnn", "logistic_regression")]
                sigma = f"{lines[0]['noise_multiplier']:.3g}"
                print(f"| {axis} | {name} | {' | '.join(cells)} | {sigma} |")
    draw(done)


def _cell(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def draw(done: set[str]) -> None:
    """Every setting's accuracy beside the reference's, both seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(axis, name) for axis, changes in AXES.items() for name in changes if name in done]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2))
    reference = [100 * line["cnn"] for (setting, _), line in results().items() if setting.startswith("reference")]
    axes.axvspan(min(reference), max(reference), color="0.85", label="reference, twice with both seeds")
    for height, (_, name) in enumerate(rows):
        values = [100 * line["cnn"] for (setting, _), line in results().items() if setting == name]
        axes.plot(values, [height] * len(values), "o-", color="C0", markersize=4)
    axes.set_yticks(range(len(rows)), [f"{axis}: {name}" for axis, name in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("CNN trained on synthetic digits: accuracy on 5,000 real ones (%)")
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--part", default="0/1", help="which share of the runs, as 0/2")
    options = parser.parse_args()
    if options.what == "report":
        report()
    else:
        run_all(options.mnist, options.work, *map(int, options.part.split("/")))
