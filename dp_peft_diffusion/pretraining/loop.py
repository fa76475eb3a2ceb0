"""The loop of every kind of pretraining: Adam, a moving average, checkpoints. Not private."""

import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.pretraining.autoencoder import Reconstruction
from dp_peft_diffusion.pretraining.captions import Captions
from dp_peft_diffusion.pretraining.checkpoints import resume, write_checkpoint
from dp_peft_diffusion.pretraining.denoising import Denoising
from dp_peft_diffusion.pretraining.features import Recognition
from dp_peft_diffusion.pretraining.handwriting import Handwriting
from dp_peft_diffusion.pretraining.image_codes import Codes
from dp_peft_diffusion.recipe import PretrainRecipe, to_yaml

# What trains, its loss, and what it leaves behind.
Task = Handwriting | Denoising | Reconstruction | Captions | Recognition | Codes


def pretrain(recipe: PretrainRecipe, output_dir: Path) -> Path:
    """Train what the recipe says, resuming from `output_dir` when it holds a checkpoint.

    On a CPU a resumed run ends in the same bits as an uninterrupted one.

    Returns:
        The folder of the base, the autoencoder or the feature net, with the averaged weights, as `from_pretrained`
        reads it.

    Raises:
        UserError: the images do not suit the recipe, or the folder holds a pretraining by another recipe.
    """
    claim_folder(output_dir, recipe)
    torch.manual_seed(recipe.seed)
    task = make_task(recipe, Accelerator(cpu=torch.backends.mps.is_available()).device)
    optimizer = torch.optim.Adam(task.trained.parameters(), lr=recipe.learning_rate)
    ema = {name: value.detach().clone() for name, value in task.trained.state_dict().items()}
    first = resume(output_dir, task.trained, optimizer, ema)
    started = time.monotonic()
    last = recipe.max_train_steps
    for step in tqdm(range(first, last), initial=first, total=last, desc="pretrain"):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step, last, recipe.lr_warmup_steps)
        loss = update(recipe, task, optimizer, step)
        average(ema, task.trained, min(recipe.ema_decay, (1 + step) / (10 + step)))
        done = step + 1
        if done % 50 == 0:
            line = {"step": done, "loss": round(loss.item(), 5), "seconds": round(time.monotonic() - started, 1)}
            with open(output_dir / "pretraining.jsonl", "a") as log:
                print(json.dumps(line), file=log)
        if done % recipe.checkpointing_steps == 0 or done == last:
            task.export(ema, output_dir)
            write_checkpoint(output_dir, done, task.trained, optimizer, ema)  # last: what it stands for is there
    return output_dir / task.folder


def make_task(recipe: PretrainRecipe, device: torch.device) -> Task:
    """The recipe's kind of pretraining, on `device`."""
    kinds: dict[str, type[Task]] = {
        "handwriting": Handwriting,
        "autoencoder": Reconstruction,
        "captions": Captions,
        "features": Recognition,
        "codes": Codes,
    }
    return kinds.get(recipe.kind, Denoising)(recipe, device)


def update(recipe: PretrainRecipe, task: Task, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    """One update, with draws that belong to its step alone. Returns its loss."""
    seed = recipe.seed * 1_000_003 + step
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    with torch.autocast(task.device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
        loss = task.loss(generator)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(task.trained.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def average(ema: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Move the average: ema <- decay * ema + (1 - decay) * model, in place."""
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def claim_folder(output_dir: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe into the folder, which resumes this recipe only.

    Raises:
        UserError: the folder holds a pretraining by another recipe.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "recipe.yaml"
    if path.is_file() and path.read_text() != to_yaml(recipe):
        raise UserError(f"--output_dir {output_dir} holds a pretraining with other options. Choose another folder.")
    path.write_text(to_yaml(recipe))
