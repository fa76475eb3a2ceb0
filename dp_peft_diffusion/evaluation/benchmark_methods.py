"""The methods that `dp-peft bench` compares: each turns a problem into a step that can be timed."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dp_peft_diffusion.diffusion.draws import draw_levels, draw_noise
from dp_peft_diffusion.diffusion.noise_levels import level_quantile
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation.benchmark_models import MadeUpBatch, Problem, build
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Clip, Gradients, loop_clipped_sum, trainable, vmap_clipped_sum
from dp_peft_diffusion.gradients.noise import add_noise
from dp_peft_diffusion.gradients.optimizer import apply_update, make_optimizer
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.privacy.randomness import KEY_BYTES
from dp_peft_diffusion.recipe import Train

MAX_GRAD_NORM = 0.15  # near the norms of these made-up gradients, and below most: clipping takes part in the check
CHECKED_EXAMPLES = 3
NUM_EXAMPLES = 50_000  # of the data set that `step` samples from
OPACUS = {  # the clipped sum and nothing else
    "noise_multiplier": 0.0,
    "max_grad_norm": MAX_GRAD_NORM,
    "expected_batch_size": None,
    "loss_reduction": "sum",
}
PUBLIC_KEY = bytes(KEY_BYTES)  # nothing here is private
Step = Callable[[MadeUpBatch], Gradients | None]  # a clipped sum, or nothing for what is not private


def floor(problem: Problem) -> Step:
    """The least that any method pays: forward, and the gradient of the input through the frozen net."""

    def step(batch: MadeUpBatch) -> None:
        clean = batch["clean"].detach().requires_grad_()  # the noisy input is a multiple of it, plus noise
        losses = problem.loss_fn(problem.model, {**batch, "clean": clean})
        torch.autograd.grad(losses.mean(), clean)

    return step


def peft(problem: Problem) -> Step:
    """Ordinary fine-tuning, unmerged as peft trains."""
    parameters = trainable(problem.model)

    def step(batch: MadeUpBatch) -> None:
        for parameter in parameters.values():
            parameter.grad = None
        problem.loss_fn(problem.model, batch).mean().backward()

    return step


def ours(problem: Problem) -> Step:
    """The clipper; with a logical batch, micro-batch by micro-batch into one float64 sum."""
    clipper = PerSampleClipper(problem.model, MAX_GRAD_NORM)
    case = problem.case

    def step(batch: MadeUpBatch) -> Gradients:
        return clipper.clipped_sum_of(problem.loss_fn, batch)

    def logical_step(batch: MadeUpBatch) -> Gradients:
        total = clipper.zeros()
        for chunk in range(-(-(case.logical_batch or 0) // case.batch_size)):
            part = clipper.clipped_sum_of(problem.loss_fn, problem.batch(case.batch_size, seed=chunk))
            total = {name: total[name] + part[name] for name in total}
        return total

    return logical_step if case.logical_batch else step


def vmap(problem: Problem) -> Step:
    """torch.func, without hooks."""
    return lambda batch: vmap_clipped_sum(problem.model, problem.loss_fn, batch, Clip(MAX_GRAD_NORM))


def opacus_hooks(problem: Problem) -> Step:
    """Opacus, per-example gradients from hooks. It knows one row for each example, so K draws are K forwards."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    parameters = trainable(problem.model)
    model = GradSampleModule(problem.model.train(), loss_reduction="sum")  # its hooks sleep in eval mode
    optimizer = DPOptimizer(torch.optim.SGD(parameters.values()), **OPACUS)

    def step(batch: MadeUpBatch) -> Gradients:
        optimizer.zero_grad(set_to_none=True)
        draws = _one_draw_each(batch)
        losses = [problem.loss_fn(model, draw) / len(draws) for draw in draws]
        torch.stack(losses).sum().backward()
        optimizer.clip_and_accumulate()
        return {name: parameter.summed_grad for name, parameter in parameters.items()}  # type: ignore[attr-defined]

    return step


def opacus_ghost(problem: Problem) -> Step:
    """Opacus, norms from a first backward and the clipped sum from a second.

    Raises:
        UserError: K > 1.
    """
    if problem.case.noise_multiplicity > 1:
        raise UserError("ghost clipping refuses a layer that is called K times, and cannot average stacked draws")
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    parameters = trainable(problem.model)
    model = GradSampleModuleFastGradientClipping(
        problem.model.train(), loss_reduction="sum", max_grad_norm=MAX_GRAD_NORM
    )
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(parameters.values()), **OPACUS)

    def step(batch: MadeUpBatch) -> Gradients:
        optimizer.zero_grad(set_to_none=True)
        losses = problem.loss_fn(model, batch)
        DPTensorFastGradientClipping(model, optimizer, losses, loss_reduction="sum").backward()
        return {name: parameter.grad for name, parameter in parameters.items()}  # type: ignore[misc]

    return step


def whole_step(problem: Problem) -> Step:
    """A step as training takes it. The sample is cut or repeated to b ids, so that every step is as long."""
    clipper = PerSampleClipper(problem.model, MAX_GRAD_NORM)
    train = Train(learning_rate=1e-6)
    optimizer = make_optimizer(train, clipper.parameters, 0.0)
    quantile = level_quantile(train, make_objective(problem.scheduler))
    number = 0

    def step(batch: MadeUpBatch) -> None:
        nonlocal number
        number += 1
        b, k = batch["timesteps"].shape
        ids = np.resize(np.append(example_ids(PUBLIC_KEY, number, NUM_EXAMPLES, b / NUM_EXAMPLES), 0), b)
        noise = draw_noise(PUBLIC_KEY, number, ids, k, tuple(batch["clean"].shape[1:]))
        timesteps = draw_levels(PUBLIC_KEY, number, ids, k, 1, quantile)
        drawn = {"noise": noise.to(problem.device), "timesteps": timesteps.to(problem.device)}
        total = clipper.clipped_sum_of(problem.loss_fn, {**batch, **drawn})
        noisy = add_noise(total, MAX_GRAD_NORM, PUBLIC_KEY, number)
        apply_update(optimizer, clipper.parameters, noisy, b)

    return step


STEPS: dict[str, Callable[[Problem], Step]] = {
    "floor": floor,
    "peft": peft,
    "ours": ours,
    "vmap": vmap,
    "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost,
    "step": whole_step,
}


def error_against_loop(problem: Problem, step: Step) -> float | None:
    """||sum - loop|| / ||loop|| over all trainable tensors, on a few examples; None for what returns no sum.

    The loop runs on a model of its own, in the same precision and memory format.
    """
    batch = problem.batch(CHECKED_EXAMPLES)
    found = step(batch)
    if found is None:
        return None
    fresh = build(problem.case, problem.size)
    expected = loop_clipped_sum(fresh.model, fresh.loss_fn, batch, Clip(MAX_GRAD_NORM))
    wanted = _flat(expected)
    return float((_flat({name: found[name] for name in expected}) - wanted).norm() / wanted.norm())


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.detach().double().flatten() for gradient in gradients.values()])


def _one_draw_each(batch: MadeUpBatch) -> list[MadeUpBatch]:
    """K batches of one draw for each example."""
    return [
        {**batch, "noise": batch["noise"][:, j : j + 1], "timesteps": batch["timesteps"][:, j : j + 1]}
        for j in range(batch["timesteps"].shape[1])
    ]
