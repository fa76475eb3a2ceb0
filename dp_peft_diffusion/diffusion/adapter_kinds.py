"""The adapter kinds, as stock peft configs: what each trains, and by which names it finds it in a net."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from diffusers.models.normalization import RMSNorm
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from torch import nn

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion.class_rows import CLASS_TABLE
from dp_peft_diffusion.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
NORM = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)
VERA_KEY = 0  # public: VeRA's two frozen random matrices are drawn from it


@dataclass(frozen=True)
class Kind:
    """One adapter kind.

    what: what trains, for the card.
    config: (spec, ends of module names) -> the peft config; None where nothing is injected.
    targets: the kind's own ends of module names, of which a net may lack some; empty takes every one of `layers`.
    layers: the layer types that the config can adapt.
    frozen: part of the names of parameters that stay as they were drawn, though peft would train them.
    """

    what: str
    config: Callable[[recipe.Adapter, list[str]], PeftConfig] | None
    targets: tuple[str, ...] = ATTENTION
    layers: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    frozen: str | None = None


def _lora(spec: recipe.Adapter, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=spec.rank, lora_alpha=_alpha(spec), target_modules=targets)


def _rslora(spec: recipe.Adapter, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=spec.rank, lora_alpha=_alpha(spec), use_rslora=True, target_modules=targets)


def _dora(spec: recipe.Adapter, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=spec.rank, lora_alpha=_alpha(spec), use_dora=True, target_modules=targets)


def _ia3(spec: recipe.Adapter, targets: list[str]) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=[])


def _lokr(spec: recipe.Adapter, targets: list[str]) -> LoKrConfig:
    return LoKrConfig(r=spec.rank, alpha=_alpha(spec), target_modules=targets)


def _oft(spec: recipe.Adapter, targets: list[str]) -> OFTConfig:
    return OFTConfig(r=0, oft_block_size=spec.rank, target_modules=targets)


def _vera(spec: recipe.Adapter, targets: list[str]) -> VeraConfig:
    return VeraConfig(
        r=spec.rank, projection_prng_key=VERA_KEY, save_projection=True, d_initial=0.1, target_modules=targets
    )


def _biases(spec: recipe.Adapter, targets: list[str]) -> LoraConfig:
    # peft ships biases with a LoRA only: one frozen pair of rank 1, whose B is zero, goes with them.
    return LoraConfig(r=1, lora_alpha=1, bias="all", target_modules=targets[:1])


def _layers(spec: recipe.Adapter, targets: list[str]) -> LNTuningConfig:
    return LNTuningConfig(target_modules=targets)  # a trainable copy of each layer, whatever its type


KINDS: dict[str, Kind] = {
    "lora": Kind("LoRA of rank {rank} on attention", _lora),
    "lora_conv": Kind("LoRA of rank {rank} on attention and convolutions", _lora, ATTENTION + CONVOLUTION),
    "ffa_lora": Kind("B of LoRA of rank {rank} on attention, A random", _lora, frozen=".lora_A."),
    "rslora": Kind("rank-stabilised LoRA of rank {rank} on attention", _rslora),
    "dora": Kind("DoRA of rank {rank} on attention", _dora),
    "ia3": Kind("IA3 scales of attention", _ia3),
    "lokr": Kind("LoKr of rank {rank} on attention", _lokr),
    "oft": Kind("rotations in blocks of {rank} on attention", _oft),
    "vera": Kind("VeRA of rank {rank} on attention", _vera, layers=(nn.Linear,)),
    "bitfit": Kind("every bias", _biases, (), (nn.Linear,), frozen=".lora_"),
    "norm": Kind("weights and biases of normalisation layers", _layers, (), NORM),
    "attention": Kind("the linear layers of attention", _layers, layers=(nn.Linear,)),
    "class_rows": Kind("", None, ()),
    "code_moments": Kind("", None, ()),
    "full": Kind("every weight", None, ()),
}


def peft_config(model: nn.Module, spec: recipe.Adapter) -> PeftConfig | None:
    """The config that injects `spec` into `model`; None for kinds that inject nothing.

    Raises:
        UserError: a name in target_modules matches nothing, or the model has none of the kind's own targets.
    """
    config = KINDS[spec.kind].config
    return None if config is None or rows_alone(spec) else config(spec, find_targets(model, spec))


def rows_alone(spec: recipe.Adapter) -> bool:
    """Whether class rows are all that trains: the kinds of that name, or `lora` on the class table and nothing else."""
    return spec.kind in ("class_rows", "code_moments") or (
        spec.kind == "lora" and spec.target_modules == (CLASS_TABLE,)
    )


def find_targets(model: nn.Module, spec: recipe.Adapter) -> list[str]:
    """Ends of the names of the modules that `spec` adapts, each of which matches in `model`.

    Raises:
        UserError: a name in target_modules matches nothing, or the model has none of the kind's own targets.
    """
    kind = KINDS[spec.kind]
    names = _names(model, kind)
    for pattern in spec.target_modules or ():
        _check_target(names, pattern, kind)
    targets = spec.target_modules or kind.targets or names
    present = [pattern for pattern in targets if any(_matches(name, pattern) for name in names)]
    if not present:
        way_out = f"Name others with --target_modules. There is: {', '.join(_ends(names))}"
        raise UserError(
            f"--adapter {spec.kind} trains {', '.join(kind.targets) or _words(kind)}, and this base has none. "
            f"{way_out if names else 'Choose another --adapter, such as lora.'}"
        )
    return present


def carrier(model: nn.Module) -> str:
    """A layer for the frozen, zero LoRA of rank 1 that peft wants in a file which adapts no layer."""
    return _names(model, KINDS["bitfit"])[0]


def _check_target(names: list[str], pattern: str, kind: Kind) -> None:
    """Every name must match: peft says nothing when only some do."""
    if not any(_matches(name, pattern) for name in names):
        ends = _ends(names)
        close = difflib.get_close_matches(pattern, ends, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"--target_modules {pattern!r} matches no {_words(kind)} of this base. {hint}There is: {', '.join(ends)}"
        )


def _names(model: nn.Module, kind: Kind) -> list[str]:
    """Paths of the layers that a kind can adapt."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kind.layers) and getattr(module, "weight", None) is not None
    ]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _ends(names: list[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[-2:]) if part[-1].isdigit() else part[-1] for part in parts})


def _words(kind: Kind) -> str:
    return " or ".join(dict.fromkeys(layer.__name__ for layer in kind.layers))


def _alpha(spec: recipe.Adapter) -> float:
    return float(spec.rank) if spec.lora_alpha is None else spec.lora_alpha
