"""Sampling: the schedulers of diffusers by name, two presets, and the denoising loop."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import torch
from diffusers import EDMEulerScheduler, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.conditions import null_conditions
from dp_peft_diffusion.errors import UserError

SCHEDULERS = {
    "utility": "DDIMScheduler",
    "fidelity": "DDIMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
EDM_SCHEDULERS = {
    "utility": "EDMEulerScheduler",
    "fidelity": "EDMEulerScheduler",
    "euler": "EDMEulerScheduler",
    "dpmsolver++": "EDMDPMSolverMultistepScheduler",
}
SEEDS_APART = 1_000_003  # image i is seeded with seed * SEEDS_APART + i, so a seed has so many images of its own
EXCHANGEABLE = set(KarrasDiffusionSchedulers.__members__) - {"EDMEulerScheduler"}  # on one schedule of DDPM
# Karras et al. 2022 (2206.00364), algorithm 2, with what the README of DPDM (2210.09929) gives for its best FID.
S_CHURN, S_MIN, S_MAX, MAX_GAMMA = 100.0, 0.05, 50.0, 2**0.5 - 1
MISFITS = (AttributeError, ImportError, IndexError, TypeError, ValueError)  # what schedulers raise when asked too much


@torch.no_grad()
def sample_images(
    base: BaseModel,
    conditions: dict[str, Tensor] | None = None,  # argument of the network -> (n, ...); {} for an unconditional base
    *,
    num_images: int,
    first_image: int = 0,
    seed: int,
    scheduler: str | None = "utility",
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Images first_image, first_image + 1, ... (num_images, c, side, side) uint8.

    All noise of image i comes from one generator, seeded with `seed` and i: the same bits in any batch. What the
    network makes of it differs between batch sizes by the rounding of sums, one level of 255 or so.

    conditions: entry j is for image first_image + j.
    guidance_scale: classifier-free guidance (Ho and Salimans 2207.12598, eq. 6, with 1 + w); 1 is without.
    batch_size: images at once; None: as many as a GPU of 24 GB holds.

    Raises:
        UserError: a scheduler that does not fit, guidance asked of a base that has no null class, or too many at once.
    """
    conditions, scheduler = conditions or {}, scheduler or default_scheduler(base)
    if guidance_scale != 1.0 and base.text is None and (not conditions or base.layout.null_class is None):
        raise UserError("--guidance_scale needs a base with a null class; this one has none. Leave it at 1.")
    size, parts = batch_size or default_batch_size(base), []
    for start in range(0, num_images, size):
        stop = min(num_images, start + size)
        seeds = [seed * SEEDS_APART + first_image + j for j in range(start, stop)]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        noise = torch.stack([torch.randn(base.input_shape, generator=g) for g in generators]).to(device)
        told = {name: value[start:stop].to(device) for name, value in conditions.items()}
        sampler = make_sampler(base, scheduler, num_inference_steps, device)
        try:
            x = denoise(base, sampler, noise, told, guidance_scale, generators, dtype)
            parts.append(_to_bytes(base, x))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(noise)} images at once do not fit the device. Type a smaller --batch_size, or where a run "
                "trains a smaller --micro_batch_size."
            ) from error
        except MISFITS as error:
            raise _misfit(base, scheduler, num_inference_steps, error) from error
    return torch.cat(parts) if parts else torch.zeros(0, base.image_channels, base.resolution, base.resolution).byte()


def default_batch_size(base: BaseModel) -> int:
    """256 inputs of up to 32x32, 16 of 64x64, 1 of 128x128: attention grows with the square of the pixels."""
    _, h, w = base.input_shape
    return max(1, min(256, 2**28 // (h * w) ** 2))


def _to_bytes(base: BaseModel, x: Tensor) -> Tensor:
    """Network inputs (n, c, h, w) -> images (n, c, side, side) uint8, a few at a time: a VAE is large at full size."""
    decoded = [base.decode(part) for part in x.split(max(1, 2**20 // base.resolution**2))]
    return torch.cat([y.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu() for y in decoded])


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler ready to step from noise to images.

    options: what its `step` takes besides prediction, time and sample.
    churn: whether to take EDM's stochastic sampler in place of the scheduler's own steps.
    """

    scheduler: SchedulerMixin
    options: dict[str, Any] = field(default_factory=dict)
    churn: bool = False


def make_sampler(base: BaseModel, name: str, num_inference_steps: int, device: torch.device | str = "cpu") -> Sampler:
    """A sampler on the base's own noise schedule: a preset, a short name, or a class of diffusers.

    `utility` is deterministic: DDIM with eta 0 (Song et al. 2010.02502), or Euler steps on an EDM base. `fidelity` is
    stochastic: DDIM with eta 1, or Heun steps with churn, which ask the network twice.

    Raises:
        UserError: diffusers has no such scheduler, or it is not one for this base or this number of steps.
    """
    edm, names = isinstance(base.scheduler, EDMEulerScheduler), known_schedulers(base)
    kind = names.get(name, name)
    if kind not in (EDM_SCHEDULERS.values() if edm else EXCHANGEABLE):
        noise = "continuous noise levels (EDM)" if edm else "discrete timesteps"
        raise UserError(
            f"--scheduler {name!r}: diffusers has none such for a base with {noise}. Try {', '.join(names)}."
        )
    try:
        scheduler = getattr(diffusers, kind).from_config(base.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=device)
    except MISFITS as error:
        raise _misfit(base, name, num_inference_steps, error) from error
    options = {"eta": 1.0} if name == "fidelity" and not edm else {}
    return Sampler(scheduler, options, churn=name == "fidelity" and edm)


def default_scheduler(base: BaseModel) -> str:
    """`fidelity` (docs/explanation/ablations.md), but `utility` on an EDM base, where churn is rough with few steps."""
    return "utility" if isinstance(base.scheduler, EDMEulerScheduler) else "fidelity"


def known_schedulers(base: BaseModel) -> dict[str, str]:
    """Presets and short names for a base -> classes of diffusers."""
    return EDM_SCHEDULERS if isinstance(base.scheduler, EDMEulerScheduler) else SCHEDULERS


def _misfit(base: BaseModel, name: str, num_inference_steps: int, error: Exception) -> UserError:
    return UserError(
        f"--scheduler {name} with {num_inference_steps} steps does not fit this base: {error}. "
        f"Try {', '.join(known_schedulers(base))}, or another --num_inference_steps."
    )


@torch.no_grad()
def denoise(
    base: BaseModel,
    sampler: Sampler,
    noise: Tensor,  # (n, c, h, w) standard normal
    conditions: dict[str, Tensor],  # argument of the network -> (n, ...)
    guidance_scale: float,
    generators: list[torch.Generator],  # one for each row: all that is random in a row comes from its own
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """From noise to the network's idea of clean inputs (n, c, h, w) float32.

    guidance_scale: classifier-free guidance (Ho and Salimans 2207.12598, eq. 6, with 1 + w); 1 is without.
    dtype: of the network. The steps are taken in float32.

    Raises:
        ValueError: the scheduler draws noise that no seed holds.
    """
    scheduler, options = sampler.scheduler, sampler.options
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {**options, "generator": generators}
    null = null_conditions(base, len(noise)) if guidance_scale != 1.0 else {}
    null = {name: value.to(noise.device) for name, value in null.items()}
    before, x = torch.get_rng_state(), noise * scheduler.init_noise_sigma

    def predict(model_input: Tensor, time: Tensor, told: dict[str, Tensor]) -> Tensor:
        with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
            return base.predict(base.unet, model_input, time, told).float()

    def guided(model_input: Tensor, time: Tensor) -> Tensor:
        prediction = predict(model_input, time, conditions)
        if guidance_scale == 1.0:
            return prediction
        unguided = predict(model_input, time, null)
        return unguided + guidance_scale * (prediction - unguided)

    if sampler.churn:
        return _churn(scheduler, x, guided, generators)
    for t in scheduler.timesteps:
        prediction = guided(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, **options).prev_sample
    if not torch.equal(before, torch.get_rng_state()):
        raise ValueError("it draws noise that --seed does not set")
    return x


def _churn(
    scheduler: EDMEulerScheduler,
    x: Tensor,  # (n, c, h, w) of the first noise level
    guided: Callable[[Tensor, Tensor], Tensor],
    generators: list[torch.Generator],
) -> Tensor:
    """The stochastic sampler of Karras et al. 2022, algorithm 2: raise the noise level, then a Heun step down.

    `EDMEulerScheduler.step` has an s_churn, but adds the noise after the network has seen x, so that nothing takes it
    out again.
    """

    def slope(x: Tensor, sigma: Tensor) -> Tensor:  # dx/dsigma
        output = guided(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).to(x.device))
        return (x - scheduler.precondition_outputs(x, output, sigma)) / sigma

    gamma = min(S_CHURN / len(scheduler.timesteps), MAX_GAMMA)
    for sigma, following in pairwise(scheduler.sigmas):
        raised = sigma
        if S_MIN <= sigma <= S_MAX:
            raised = sigma * (1 + gamma)
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)
            x = x + (raised**2 - sigma**2).sqrt() * fresh
        direction = slope(x, raised)
        if following > 0:
            direction = (direction + slope(x + (following - raised) * direction, following)) / 2
        x = x + (following - raised) * direction
    return x
