"""The noise schedule that a base trains on: discrete (DDPM) or continuous (EDM)."""

from pathlib import Path
from typing import TypeAlias

from diffusers import DDPMScheduler, EDMEulerScheduler

from dp_peft_diffusion.diffusion.base_folder import read_settings
from dp_peft_diffusion.errors import UserError

Schedule: TypeAlias = DDPMScheduler | EDMEulerScheduler
PIXEL_STD, LATENT_STD = 0.5, 1.0  # sigma_data of Karras et al. 2022: of pixels in [-1, 1], and of scaled latents
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# Schedulers of diffusers that hold the alphas of a DDPM: samplers of one and the same training schedule.
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)


def read_schedule(folder: Path, name: str, latent: bool) -> Schedule:
    """The training schedule in a base's folder; alphas and prediction type are what matters of it.

    name: of the base, for messages. latent: latents are not clipped in sampling, unless the config says so.

    Raises:
        UserError: there is none, or it is neither a DDPM's nor EDM's.
    """
    paths = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    config = next((found for found in map(read_settings, paths) if found is not None), None)
    if config is None:
        raise UserError(
            f"base {name!r} has no scheduler/scheduler_config.json. Put the schedule of its training there."
        )
    kind = config.get("_class_name", "DDPMScheduler")
    if kind in EDM:
        return EDMEulerScheduler.from_config(config)
    if kind not in DISCRETE:
        raise UserError(
            f"base {name!r} has a {kind}: this version trains on DDPM's schedules (epsilon, v_prediction) and on "
            "EDM's. Choose another base."
        )
    return DDPMScheduler.from_config({"clip_sample": not latent, **config})


def prediction_type(schedule: Schedule) -> str:
    """What the net predicts: "edm", "epsilon", "v_prediction" or what else a base's config names."""
    return "edm" if isinstance(schedule, EDMEulerScheduler) else schedule.config.prediction_type


def with_prediction_type(schedule: Schedule, wanted: str | None, from_scratch: bool, latent: bool) -> Schedule:
    """The schedule, once its prediction type is known to be `wanted`; a net from scratch may predict anything.

    latent: latents are never clipped, and have unit variance, which is what `scaling_factor` is for (Rombach et al.
        2022, section 3.1 and appendix G).

    Raises:
        UserError: the base was trained to predict something else.
    """
    own = prediction_type(schedule)
    if wanted in (None, own):
        return schedule
    if not from_scratch:
        raise UserError(
            f"--prediction_type {wanted} (model.prediction_type in a recipe): the base predicts {own}. Leave it out, "
            "or train from scratch: --from_scratch --adapter full."
        )
    if wanted == "edm":
        return EDMEulerScheduler(sigma_data=LATENT_STD if latent else PIXEL_STD)  # Karras et al. 2022, table 1
    if own == "edm":
        return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=wanted, clip_sample=not latent)
    return DDPMScheduler.from_config(schedule.config, prediction_type=wanted)
