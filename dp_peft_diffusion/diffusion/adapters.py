"""The adapter: inject one of the kinds, list what trains, give it to stock peft."""

import copy
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion.adapter_kinds import KINDS, carrier, peft_config, rows_alone
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.diffusion.class_rows import (
    CLASS_TABLE,
    ClassRows,
    choose_class_rows,
    code_directions,
    unit_code_directions,
    with_class_rows,
)
from dp_peft_diffusion.diffusion.code_moments import CodeMoments
from dp_peft_diffusion.errors import RunError, UserError


@dataclass(frozen=True)
class Adapter:
    """A base with an adapter injected, ready to train.

    config: what stock peft needs to load it; None where the whole net trains.
    """

    unet: nn.Module
    config: PeftConfig | None
    class_rows: ClassRows | CodeMoments | None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @property
    def adapted_modules(self) -> list[str]:
        """Paths of the base's modules that train."""
        whole = [
            name for name, m in self.unet.named_modules() if isinstance(m, BaseTunerLayer | ClassRows | CodeMoments)
        ]
        owners = [
            next((path for path in whole if name.startswith(f"{path}.")), name.rpartition(".")[0])
            for name in self.trainable
        ]
        return list(dict.fromkeys(owners))


def inject_adapter(
    base: BaseModel,
    spec: recipe.Adapter,
    num_classes: int = 0,
    seed: int = 0,
    max_grad_norm: float = 1.0,
    noise_of_mean: float = 0.0,
) -> Adapter:
    """Inject the adapter of `spec` into a copy of the base's UNet; only the adapter trains.

    num_classes: private classes; 0 trains no class rows. max_grad_norm, noise_of_mean: the clip bound, and the standard
        deviation of the noise in a mean over the batch, which `code_moments` reckons with.

    Raises:
        UserError: a name in target_modules matches nothing, nothing would train, no rows are free for the classes, or
            the whole of a text-conditional base would train.
    """
    if spec.kind == "full" and base.text is not None:
        raise UserError(
            "--adapter full on a text-conditional base is not exported by this version. Choose --adapter lora, or "
            "attention."
        )
    unet = copy.deepcopy(base.unet)
    class_rows: ClassRows | CodeMoments | None = None
    rows = choose_class_rows(base, spec.class_rows, num_classes) if num_classes else ()
    if rows_alone(spec) and not rows:
        raise UserError(
            "nothing would train: class rows alone need labelled images and a base with classes. Give --label_column, "
            "or train other modules: --adapter lora --target_modules none."
        )
    config = inject_into(unet, spec, seed)
    code_rank = len(unit_code_directions(base)) if spec.kind == "code_moments" else spec.class_code_rank
    if rows:
        if rows_alone(spec):
            targets = [] if code_rank else [carrier(unet)]
            config = LoraConfig(r=1, lora_alpha=1, target_modules=targets)
        # Rows train as codes, in `ClassRows`; `to_peft` writes them the way `config` says.
        config = config and with_class_rows(config, rows, code_rank)
        if spec.kind == "code_moments":
            draws, directions = spec.rows_per_class or 1, unit_code_directions(base)
            class_rows = CodeMoments(
                unet.class_embedding, directions, len(rows), rows[0], draws, max_grad_norm, noise_of_mean
            )
        else:
            class_rows = ClassRows(unet.class_embedding, rows, code_directions(base, code_rank))
        unet.class_embedding = class_rows
    return Adapter(unet.eval().to(base.unet.device), config, class_rows)


def inject_into(model: nn.Module, spec: recipe.Adapter, seed: int = 0) -> PeftConfig | None:
    """Inject the adapter of `spec` into any diffusers model, in place and in eval mode; only the adapter trains.

    Returns:
        What stock peft needs to load it; None where nothing is injected: every weight trains, or class rows alone do.

    Raises:
        UserError: a name in target_modules matches nothing, or the model has none of the kind's own targets.
    """
    config = peft_config(model, spec)
    model.requires_grad_(spec.kind == "full")
    if config is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # public: the random matrices are no secret
            # Not inject_adapter_in_model, which refuses kinds whose layers share matrices.
            get_peft_model(model, config)
    frozen = KINDS[spec.kind].frozen
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    model.eval()  # peft's layers come in training mode
    return config


def to_peft(base: BaseModel, adapter: Adapter) -> PeftModel:
    """The adapter as stock peft holds it, on a fresh copy of the base."""
    model = as_peft(copy.deepcopy(base.unet), adapter.unet, adapter.config)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    if adapter.class_rows is not None:
        adapter.class_rows.write_to(model.base_model.model.class_embedding)
    return model


def as_peft(fresh: nn.Module, trained: nn.Module, config: PeftConfig | None) -> PeftModel:
    """A trained model's adapter, as stock peft holds it, on `fresh`: the base as it was; class rows are not copied.

    The LoRA family has alpha folded into B (alpha = rank in the file), which keeps the scale right for every
    reader, also those that drop alpha.

    Raises:
        UserError: there is no adapter, since the whole model trained.
    """
    if config is None:
        raise UserError("this is a whole model, not an adapter. Save it with save_pretrained.")
    config, scale = copy.deepcopy(config), 1.0
    if isinstance(config, LoraConfig):
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        config = replace(config, lora_alpha=config.r, use_rslora=False)
    with torch.random.fork_rng():
        model = get_peft_model(fresh, config)
    held = model.base_model.model.state_dict()  # the tensors themselves
    moving = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, value in trained.state_dict().items():
            if name in held:
                held[name].copy_(value * scale if ".lora_B." in name else value)
            elif name in moving and not name.startswith(f"{CLASS_TABLE}."):  # class rows: `ClassRows.write_to`
                raise RunError(f"stock peft has no place for {name}, which trained. Nothing was written.")
    return model.eval()


def whole_model(base: BaseModel, adapter: Adapter) -> nn.Module:
    """A net of which every weight trained, as a plain diffusers model with the class rows in its table."""
    unet = copy.deepcopy(adapter.unet).to(base.unet.device)
    if adapter.class_rows is not None:
        unet.class_embedding = copy.deepcopy(base.unet.class_embedding)
        adapter.class_rows.write_to(unet.class_embedding)
    return unet.requires_grad_(False).eval()
