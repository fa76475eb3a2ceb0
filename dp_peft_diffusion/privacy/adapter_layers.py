"""Which layers of a base an adapter's tensors belong to, and of what shapes: read from names and shapes alone.

Each peft type leaves a group of tensors for every layer that it adapts. A group must be whole, of the rank that the
config names, and on a layer that target_modules names; with the base at hand, on exactly those layers, at their shapes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE, matches, rank_of

Shape = tuple[int, ...]
Group = Mapping[str, Shape]  # end of a tensor's name -> shape
PREFIX = "base_model.model."
PROJECTIONS = {"base_model.vera_A", "base_model.vera_B"}  # VeRA's random matrices, which all layers share
TOKEN_ROWS = f"{CLASS_TABLE}.token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class AdapterLayers:
    """What an adapter changes of its base.

    Attributes:
        layers: module -> shape of its weight as the adapter implies it, None where it does not say. Of IA3, LoKr, OFT
            and VeRA: (outputs, inputs), a convolution's kernel counted among the inputs.
        whole: parameter of the base -> shape, where a whole parameter travels.
        biased: layers whose bias travels in the layer's own group.
        projections: VeRA's matrices.
    """

    layers: dict[str, tuple[int | None, ...]]
    whole: dict[str, Shape]
    biased: frozenset[str]
    projections: dict[str, Shape]


def _lora(group: Group, rank: int) -> tuple[int | None, ...] | None:
    if "lora_embedding_A" in group:  # A (rank, rows), B (dim, rank)
        a, b = group["lora_embedding_A"], group["lora_embedding_B"]
        return (a[1], b[0]) if len(a) == len(b) == 2 and a[0] == b[1] == rank else None
    a, b = group["lora_A.weight"], group["lora_B.weight"]  # A (rank, in, *kernel), B (out, rank, *ones)
    if not (len(a) == len(b) in (2, 4) and a[0] == b[1] == rank and set(b[2:]) <= {1}):
        return None
    length = group.get("lora_magnitude_vector")
    if length not in (None, (b[0],) if len(b) == 2 else (1, b[0], 1, 1)):
        return None
    return (b[0], *a[1:])


def _ia3(group: Group, rank: int) -> tuple[int | None, ...] | None:
    factors = group["ia3_l"]
    outputs = math.prod(factors)
    return (outputs, None) if factors in ((outputs, 1), (1, outputs, 1, 1)) else None  # the latter of a convolution


def _lokr(group: Group, rank: int) -> tuple[int | None, ...] | None:
    """Shape of the Kronecker product; either factor may be a product of rank `rank` itself."""
    outputs = inputs = 1
    for factor in ("lokr_w1", "lokr_w2"):
        shape = group.get(factor)
        if shape is None:
            a, b = group[f"{factor}_a"], group[f"{factor}_b"]
            if not (len(a) == len(b) == 2 and a[1] == b[0] == rank):
                return None
            shape = (a[0], b[1])
        if len(shape) not in (2, 4):
            return None
        outputs, inputs = outputs * shape[0], inputs * math.prod(shape[1:])
    return (outputs, inputs)


def _oft(group: Group, rank: int) -> tuple[int | None, ...] | None:
    shape = group["oft_R.weight"]  # (blocks, numbers of a skew-symmetric matrix)
    if len(shape) != 2:
        return None
    side = (1 + math.isqrt(1 + 8 * shape[1])) // 2
    return (None, shape[0] * side) if side * (side - 1) // 2 == shape[1] else None


def _vera(group: Group, rank: int) -> tuple[int | None, ...] | None:
    outputs = group["vera_lambda_b"]
    return (outputs[0], None) if len(outputs) == 1 and group["vera_lambda_d"] == (rank,) else None


def _copy(group: Group, rank: int) -> tuple[int | None, ...] | None:
    weight, bias = group["ln_tuning_layers.weight"], group.get("ln_tuning_layers.bias")
    return weight if weight and bias in (None, weight[:1]) else None


_LORA = ("lora_A.weight", "lora_B.weight")
_LOKR = [("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")], [("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")]
_COPY = "ln_tuning_layers.weight"
_GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {  # the whole groups of each peft type
    "LORA": (_LORA, ("lora_embedding_A", "lora_embedding_B")),
    "DORA": ((*_LORA, "lora_magnitude_vector"),),
    "IA3": (("ia3_l",),),
    "LOKR": tuple((*first, *second) for first in _LOKR[0] for second in _LOKR[1]),
    "OFT": (("oft_R.weight",),),
    "VERA": (("vera_lambda_b", "vera_lambda_d"),),
    "LN_TUNING": ((_COPY,), (_COPY, "ln_tuning_layers.bias")),
}
_SHAPES: dict[str, Callable[[Group, int], tuple[int | None, ...] | None]] = {
    "LORA": _lora,
    "DORA": _lora,
    "IA3": _ia3,
    "LOKR": _lokr,
    "OFT": _oft,
    "VERA": _vera,
    "LN_TUNING": _copy,
}
_FLAT = {"IA3", "LOKR", "OFT", "VERA"}  # these shapes are (outputs, inputs)


def adapter_layers(config: dict[str, Any], tensors: Mapping[str, Shape]) -> AdapterLayers:
    """What the tensors adapt, by a config in the form of `check_config`.

    Raises:
        PrivacyError: a tensor too many or too few, of another rank, or on a layer that is no target.
    """
    kind = _kind(config)
    groups, whole = _grouped(kind, config, tensors)
    layers = {module: _layer(kind, config, module, group) for module, group in sorted(groups.items())}
    for target in config["target_modules"]:
        if not any(matches(module, target) for module in layers):
            raise PrivacyError(f"target_modules names {target}, for which there are no tensors.")
    projections = {name: shape for name, shape in tensors.items() if name in PROJECTIONS}
    if kind == "VERA":
        _check_projections(projections, layers, config["r"])
    _check_whole(config, whole)
    biased = frozenset(module for module, group in groups.items() if "ln_tuning_layers.bias" in group)
    return AdapterLayers(layers, whole, biased, projections)


def _kind(config: dict[str, Any]) -> str:
    return "DORA" if config.get("use_dora") else config["peft_type"]


def _grouped(
    kind: str, config: dict[str, Any], tensors: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, Shape]], dict[str, Shape]]:
    """(module -> its group, parameter of the base -> shape)."""
    ends = {end for group in _GROUPS[kind] for end in group}
    groups: dict[str, dict[str, Shape]] = {}
    whole: dict[str, Shape] = {}
    for name, shape in tensors.items():
        path = name.removeprefix(PREFIX)
        if kind == "VERA" and name in PROJECTIONS:
            continue
        end = next((end for end in ends if path.endswith(f".{end}")), None)
        if path == name:
            raise PrivacyError(f"the tensor {name[:100]} belongs to no layer of a base.")
        if end is not None:
            groups.setdefault(path.removesuffix(f".{end}"), {})[end] = shape
        elif _may_travel_whole(config, path):
            whole[path.replace(".base_layer.", ".")] = shape
        else:
            raise PrivacyError(f"the tensor {name[:100]} is none of an adapter of this type and config.")
    return groups, whole


def _may_travel_whole(config: dict[str, Any], path: str) -> bool:
    return (
        (path == TOKEN_ROWS and config.get("trainable_token_indices") is not None)
        or (path == f"{CLASS_TABLE}.weight" and config.get("modules_to_save") is not None)
        or (path.endswith(".bias") and config.get("bias") == "all")
    )


def _layer(kind: str, config: dict[str, Any], module: str, group: Group) -> tuple[int | None, ...]:
    if not any(matches(module, target) for target in config["target_modules"]):
        raise PrivacyError(f"there are tensors for {module[:100]}, which target_modules does not name.")
    if set(group) not in map(set, _GROUPS[kind]):
        raise PrivacyError(f"{module[:100]} has {', '.join(sorted(group))} and not the whole group of its type.")
    rank = rank_of(config, module) if "r" in config else 0
    shape = _SHAPES[kind](group, rank)
    if shape is None or 0 in shape:
        shapes = ", ".join(f"{end} {list(shape)}" for end, shape in sorted(group.items()))
        raise PrivacyError(f"{module[:100]}: {shapes} are not of rank {rank}, or do not fit together.")
    return shape


def _check_projections(found: Mapping[str, Shape], layers: Mapping[str, tuple[int | None, ...]], rank: int) -> None:
    a, b = (found.get(name, ()) for name in sorted(PROJECTIONS))
    outputs = max(shape[0] or 0 for shape in layers.values())
    if not (len(a) == 2 and a[0] == rank and a[1] > 0 and b == (outputs, rank)):
        raise PrivacyError(f"VeRA's matrices of shapes {list(a)} and {list(b)} are not of rank {rank}, or are missing.")


def _check_whole(config: dict[str, Any], whole: Mapping[str, Shape]) -> None:
    rows = (config.get("trainable_token_indices") or {}).get(CLASS_TABLE)
    if rows is not None:
        shape = whole.get(TOKEN_ROWS, ())
        if len(set(rows)) != len(rows) or len(shape) != 2 or shape[0] != len(rows):
            raise PrivacyError(f"{len(rows)} class rows are named, and their tensor is of shape {list(shape)}.")
    if config.get("modules_to_save") is not None and f"{CLASS_TABLE}.weight" not in whole:
        raise PrivacyError(f"the table {CLASS_TABLE} that modules_to_save names is missing.")


def check_fit(config: dict[str, Any], adapter: AdapterLayers, base: Mapping[str, Shape], name: str) -> None:
    """The adapter changes exactly the layers of the base that its config names, at their shapes.

    Args:
        config: in the form of `check_config`.
        adapter: of `adapter_layers`.
        base: parameter -> shape, of the base without an adapter.
        name: of the base, for messages.

    Raises:
        UserError: it does not fit; the message names the first difference.
    """
    wrong = f"Is {name} the base it was trained on?"
    for module, shape in adapter.layers.items():
        weight = base.get(f"{module}.weight")
        if weight is None:
            raise UserError(f"the adapter changes {module}, which {name} does not have. {wrong}")
        if not _same(shape, (*weight[:1], math.prod(weight[1:])) if _kind(config) in _FLAT else weight):
            raise UserError(f"the adapter does not fit {module} of {name}, of shape {list(weight)}. {wrong}")
        if config["peft_type"] == "LN_TUNING" and (module in adapter.biased) != (f"{module}.bias" in base):
            raise UserError(f"the adapter and {name} differ in whether {module} has a bias. {wrong}")
    modules = [path.removesuffix(".weight") for path in base if path.endswith(".weight")]
    for module in modules:
        if module not in adapter.layers and any(matches(module, target) for target in config["target_modules"]):
            raise UserError(f"target_modules names {module} of {name}, for which there are no tensors. {wrong}")
    _check_whole_fit(config, adapter, base, name)


def _same(shape: tuple[int | None, ...], weight: Shape) -> bool:
    return len(shape) == len(weight) and all(n in (None, size) for n, size in zip(shape, weight, strict=True))


def _check_whole_fit(config: dict[str, Any], adapter: AdapterLayers, base: Mapping[str, Shape], name: str) -> None:
    table = base.get(f"{CLASS_TABLE}.weight", ())
    rows = (config.get("trainable_token_indices") or {}).get(CLASS_TABLE, [])
    for path, shape in adapter.whole.items():
        if path == TOKEN_ROWS:
            fits = len(table) == 2 and shape[1] == table[1] and max(rows, default=0) < table[0]
        else:
            fits = base.get(path) == shape
        if not fits:
            raise UserError(f"{path} does not fit {name}. Is it the base that the adapter was trained on?")
    if config.get("bias") == "all" and (missing := {p for p in base if p.endswith(".bias")} - set(adapter.whole)):
        raise UserError(f"the adapter lacks {min(missing)} of {name}. Is it the base that it was trained on?")
    if adapter.projections:
        widest = max(math.prod(base[f"{module}.weight"][1:]) for module in adapter.layers)
        if adapter.projections["base_model.vera_A"][1] != widest:
            raise UserError(f"VeRA's matrices do not fit {name}. Is it the base that the adapter was trained on?")
