"""What one image of a private update costs, for each recipe: measured here, and as GPU hours at a stated rate.

    python docs/scripts/recipe_costs.py               # all recipes; goes on where it stopped
    python docs/scripts/recipe_costs.py sd15-lora     # this one, again

Each recipe has a process of its own: the true UNet with random weights, the recipe's adapter, and the clipped sum of a
micro-batch with all its draws, in float32. Autoencoders and text encoders are left out, as their outputs are cached.
Results go to docs/reference/recipe-costs.json and, in one line, to the head of the recipe. Leave the machine alone.
"""

import dataclasses
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler

from dp_peft_diffusion.batches import PUBLIC_KEY, Batch, Task, make_loss
from dp_peft_diffusion.cli.recipes import facts_of
from dp_peft_diffusion.diffusion.adapters import inject_into
from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel, load_base
from dp_peft_diffusion.diffusion.conditions import ConditionTable
from dp_peft_diffusion.diffusion.draws import draw_levels
from dp_peft_diffusion.diffusion.noise_levels import level_quantile
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.diffusion.unets import UNETS
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.pretraining.networks import build_scheduler, build_unet
from dp_peft_diffusion.recipe import Recipe, load_pretrain_recipe, load_recipe, recipe_path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/reference/recipe-costs.json"
ARCHITECTURES = ROOT / "tests/recipe/architectures"
HUB = {"dp-lora-celebahq": "cin256", "sd15-lora": "stable-diffusion-v1-5", "sdxl-lora": "stable-diffusion-xl-base-1.0"}
GPU_FLOPS = 1e14  # assumed: 100 TFLOP/s sustained in bfloat16 on one large GPU
MEMORY = 20 * 10**9  # bytes; what needs more is left out
ROWS = 32  # network evaluations in a micro-batch
LARGE, LARGE_ROWS = 200_000_000, 4  # the same for a network of more parameters
ENOUGH = 120  # seconds of measuring after which no further repeat begins
TOKENS = {512: 1, 768: 77, 2048: 77}  # prompt length, by width: one token of a class, or CLIP's 77


def main(names: list[str]) -> None:
    """Measure the recipes that have no result yet, or those that are named."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"machine": machine(), "recipes": {}}
    rows = [facts_of(path) for path in sorted(recipe_path("digits").parent.glob("*.yaml"))]
    private = [row["name"] for row in rows if row["command"] == "train" and row["name"] != "digits"]
    for name in names or [name for name in private if name not in known["recipes"]]:
        known["recipes"][name] = measured(name, known["machine"]["float32_flops"])
        RESULTS.write_text(json.dumps(known, indent=2) + "\n")
        write_cost(name, sentence(known["recipes"][name], known["machine"]["threads"]))
        print(f"{name}: {sentence(known['recipes'][name], known['machine']['threads'])}", flush=True)


def machine() -> dict[str, object]:
    """This machine: threads of torch, and float32 operations per second in products of 2048x2048 matrices."""
    a, b, seconds = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    rate = 2 * 2048**3 / statistics.median(seconds)
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "float32_flops": round(rate)}


def measured(name: str, flops: float) -> dict[str, object]:
    """The result of a process of its own, with GPU hours; or why there is none."""
    command = [sys.executable, __file__, "--one", name]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or [f"ended by signal {-ended.returncode}"]
        reason = f"needs more than {MEMORY // 10**9} GB of memory" if "allocate" in lines[-1] else lines[-1]
        return {"left_out": reason}
    result = json.loads(ended.stdout.splitlines()[-1])
    train = load_recipe(recipe_path(name)).train
    hours = train.max_train_steps * train.train_batch_size / result["images_per_second"] / 3600
    return result | {"hours_here": hours, "gpu_hours": hours * flops / GPU_FLOPS}


def sentence(result: dict[str, object], threads: int) -> str:
    """A result in words, for the head of the recipe."""
    if "left_out" in result:
        return f"not measured: {result['left_out']}."
    return (
        f"{plain(result['images_per_second'])} images per second on {threads} CPU threads; "
        f"about {plain(max(0.1, result['gpu_hours']))} GPU hours at an assumed {GPU_FLOPS / 1e12:.0f} TFLOP/s."
    )


def plain(value: float) -> str:
    """Two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def write_cost(name: str, text: str) -> None:
    """Put the sentence into the line `# Cost:` of a recipe."""
    path = recipe_path(name)
    path.write_text(
        re.sub(r"^# Cost: .*(\n#   .*)*$", f"# Cost: {text}", path.read_text(), count=1, flags=re.MULTILINE)
    )


def measure(name: str) -> dict[str, object]:
    """Images per second of the clipped sum of a recipe, in this process: the best of up to three micro-batches."""
    recipe = load_recipe(recipe_path(name))
    task = task_of(name, recipe)
    inject_into(task.base.unet, recipe.adapter)
    gamma = (recipe.privacy.gamma or 0.01) if recipe.privacy.clipping == "automatic" else None
    clipper = PerSampleClipper(task.base.unet, recipe.privacy.max_grad_norm, recipe.privacy.clipping, gamma)
    rows = recipe.train.noise_multiplicity * recipe.train.augmentation_multiplicity
    most = ROWS if sum(p.numel() for p in task.base.unet.parameters()) < LARGE else LARGE_ROWS
    task, measured_rows = with_fewer_draws(task, most)  # an image of 128 draws costs four times one of 32
    b = min(recipe.train.micro_batch_size, max(1, most // measured_rows))
    batch, loss_fn, seconds = random_batch(task, b), make_loss(task), list[float]()
    while len(seconds) < 4 and sum(seconds) < ENOUGH:  # the first is a warm-up, and counts if it is all there is
        start = time.perf_counter()
        clipper.clipped_sum_of(loss_fn, batch)
        seconds.append(time.perf_counter() - start)
    rate = b * measured_rows / rows / min(seconds)
    return {
        "images_per_second": rate,
        "micro_batch": b,
        "draws": rows,
        "measured_draws": measured_rows,
        "seconds": seconds,
    }


def with_fewer_draws(task: Task, most: int) -> tuple[Task, int]:
    """The task with at most so many rows for each image, and how many they are."""
    views = min(task.recipe.train.augmentation_multiplicity, most)
    draws = min(task.recipe.train.noise_multiplicity, most // views)
    train = dataclasses.replace(task.recipe.train, augmentation_multiplicity=views, noise_multiplicity=draws)
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, train=train)), views * draws


def task_of(name: str, recipe: Recipe) -> Task:
    """The recipe's task on its true network, whose latents stand for pixels: a step sees nothing else."""
    base = base_of(name, recipe)
    objective = make_objective(base.scheduler, recipe.train.snr_gamma)
    return Task(recipe, base, objective, level_quantile(recipe.train, objective), conditions_of(base))


def base_of(name: str, recipe: Recipe) -> BaseModel:
    """The true UNet with random weights (built-in bases with their own) and its schedule."""
    model, made = recipe.model, facts_of(recipe_path(name))["base"]
    if model.pretrained_model_name_or_path.startswith("builtin:"):
        return load_base(model.pretrained_model_name_or_path, None, model.from_scratch, model.prediction_type)
    if name in HUB:
        config = json.loads((ARCHITECTURES / f"{HUB[name]}.json").read_text())
        unet, scheduler = UNETS[config["_class_name"]].from_config(config), DDPMScheduler()
    else:
        public = load_pretrain_recipe(recipe_path(made), {"dataset_name": "x"})
        side, channels = public.resolution, public.image_channels
        if public.kind == "latent":
            vae = load_pretrain_recipe(recipe_path(f"{made}-vae"), {"dataset_name": "x"})
            side, channels = side // 2 ** (len(vae.block_out_channels) - 1), vae.latent_channels
        classes = None if public.label_column is None else 1000
        unet, scheduler = build_unet(public, side, channels, classes), build_scheduler(public)
    unet.requires_grad_(False).eval()
    return BaseModel(unet, scheduler, BaseLayout(), name, None, None, sha256="")


def conditions_of(base: BaseModel) -> ConditionTable:
    """Random conditions of the right shapes, one row."""
    config = base.unet.config
    if "cross_attention_dim" in config:
        width = config.cross_attention_dim
        rows = {"encoder_hidden_states": torch.randn(1, TOKENS[width], width)}
        return ConditionTable(rows | ({"text_embeds": torch.randn(1, 1280)} if config.addition_embed_type else {}))
    return ConditionTable({} if config.num_class_embeds is None else {"class_labels": torch.zeros(1, dtype=torch.long)})


def random_batch(task: Task, b: int) -> Batch:
    """A micro-batch of noise, of the shapes that the recipe's own have."""
    train, shape = task.recipe.train, task.base.input_shape
    views, rows = train.augmentation_multiplicity, train.augmentation_multiplicity * train.noise_multiplicity
    levels = draw_levels(PUBLIC_KEY, 0, np.arange(b), train.noise_multiplicity, views, task.quantile)
    return {
        "clean": torch.randn(b, views, *shape),
        "weights": torch.ones(b),
        "noise": torch.randn(b, rows, *shape),
        "levels": levels,
        "labels": torch.zeros(b, rows, dtype=torch.long),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(sys.argv[1:])
