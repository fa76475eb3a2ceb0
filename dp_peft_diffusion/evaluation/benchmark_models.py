"""A benchmark's model with its adapter, its loss, and made-up batches, all from a public seed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import diffusers
import peft
import torch
from torch import Tensor, nn

from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.evaluation.benchmark_cases import MODELS, TARGET_MODULES, Case, ModelSize
from dp_peft_diffusion.gradients.functional import LossFn

SEED = 0
MadeUpBatch = dict[str, Tensor]
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Problem:
    """What every method of one benchmark is given.

    case: the measurement.
    size: its model size.
    model: frozen but for the adapter, in eval mode, on `device`.
    loss_fn: (model, batch) -> losses (b,).
    scheduler: of the forward process.
    device: where all of it is.
    """

    case: Case
    size: ModelSize
    model: nn.Module
    loss_fn: LossFn
    scheduler: diffusers.DDPMScheduler
    device: torch.device

    def batch(self, b: int, seed: int = SEED) -> MadeUpBatch:
        """Made-up examples: clean (b, c, h, w), noise (b, K, c, h, w), timesteps (b, K), text (b, tokens, width)."""
        stream = torch.Generator().manual_seed(seed)
        k, config = self.case.noise_multiplicity, self.size.config
        image = (config["in_channels"], config["sample_size"], config["sample_size"])
        batch = {
            "clean": torch.randn(b, *image, generator=stream).clamp(-1, 1),
            "noise": torch.randn(b, k, *image, generator=stream),
            "timesteps": torch.randint(0, self.scheduler.config.num_train_timesteps, (b, k), generator=stream),
        }
        if self.size.text_tokens:
            batch["text"] = torch.randn(b, self.size.text_tokens, config["cross_attention_dim"], generator=stream)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def make_model(size: ModelSize, adapter: str | None) -> diffusers.ModelMixin:
    """A frozen model of random weights in eval mode, twice the same; `adapter` is a key of TARGET_MODULES."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(diffusers, size.model_class)(**size.config).requires_grad_(False)
        if adapter:
            rank = size.ranks[adapter]
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=list(TARGET_MODULES[adapter]),
                init_lora_weights=False,  # at B = 0 half of the gradients would be zero
            )
            peft.inject_adapter_in_model(config, model)
    return model.eval()


def build(case: Case, size: ModelSize | None = None) -> Problem:
    """The problem of a case; twice the same. `floor` has no adapter.

    Args:
        case: the measurement.
        size: instead of the one that `case.model` names.
    """
    size = size or MODELS[case.model]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(size, None if case.method == "floor" else case.adapter)
    if case.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model = model.to(device).to(memory_format=_FORMATS[case.memory_format])
    scheduler = diffusers.DDPMScheduler()
    return Problem(case, size, model, _make_loss(case, scheduler, device), scheduler, device)


def _make_loss(case: Case, scheduler: diffusers.DDPMScheduler, device: torch.device) -> LossFn:
    """The product's own loss; the K draws of an example are rows of one forward."""

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16, enabled=case.mixed_precision == "bf16")

    objective = make_objective(scheduler)

    def loss_fn(model: nn.Module, batch: MadeUpBatch) -> Tensor:
        denoise = _denoiser(model, batch, autocast)
        return objective.losses(denoise, batch["clean"].unsqueeze(1), batch["noise"], batch["timesteps"])

    return loss_fn


def _denoiser(
    model: nn.Module, batch: MadeUpBatch, autocast: Callable[[], AbstractContextManager[None]]
) -> Callable[[Tensor, Tensor], Tensor]:
    k = batch["timesteps"].shape[1]
    text = {"encoder_hidden_states": batch["text"].repeat_interleave(k, dim=0)} if "text" in batch else {}

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        with autocast():
            return model(noisy, timesteps, **text).sample

    return denoise
