"""What of a model cannot be proved to keep the bound of one example; refused by name."""

from typing import Any

import torch
from peft.tuners.oft.layer import MultiplicativeDropoutLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.functional import trainable
from dp_peft_diffusion.gradients.rules import layer_problem


def trainable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of those that hold a trainable parameter themselves."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }


def refuse_float16(layer: str, *tensors: Any) -> None:
    """Refuse a forward in float16, by the tensors that a layer sees or by autocast.

    Raises:
        UserError: naming the layer and the reason.
    """
    seen = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    devices = {tensor.device.type for tensor in seen}
    autocast = {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    if torch.float16 in autocast | {tensor.dtype for tensor in seen}:
        raise UserError(
            f"layer {layer} was run in float16, where small gradients become zero, and a gradient scaler's scale "
            "would depend on private gradients. Use bfloat16 or float32."
        )


def check_model(model: nn.Module) -> None:
    """Refuse by name what cannot be proved to keep the bound (invariants 9 and 10).

    Raises:
        UserError: the first thing refused.
    """
    if not trainable(model):
        raise UserError("no parameter of the model requires a gradient. Inject an adapter, or set requires_grad.")
    for path, module in model.named_modules():
        problem = _module_problem(module)
        if problem:
            raise UserError(f"module {path or '(the model)'} ({type(module).__name__}) {problem}")
    check_layers(trainable_layers(model))
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if parameter.requires_grad and first != name:
            raise UserError(f"trainable parameter {name} is tied to {first}. Untie them, or freeze both.")


def check_layers(layers: dict[str, nn.Module]) -> None:
    """Refuse layers with trainable parameters that cannot be clipped; path -> layer.

    Raises:
        UserError: the first one.
    """
    for path, layer in layers.items():
        problem = layer_problem(layer)
        if problem:
            raise UserError(f"trainable module {path or '(the model)'} ({type(layer).__name__}) {problem}")


def _module_problem(module: nn.Module) -> str | None:
    if module.training:
        return "is in training mode. Call model.eval() after the adapter is injected."
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "mixes the examples of a batch. Use a model with GroupNorm."
    if isinstance(module, BaseTunerLayer):
        rate = _adapter_dropout(module)
        if rate > 0:
            return f"has an adapter dropout of {rate}. Make the adapter with dropout 0: noise regularises already."
    return None


def _adapter_dropout(layer: BaseTunerLayer) -> float:
    """The largest dropout rate of a peft layer, whatever the adapter calls it; what its base layer has is no matter."""
    adapter_only = {id(part) for part in layer.modules()} - {id(part) for part in layer.get_base_layer().modules()}
    dropouts = (nn.modules.dropout._DropoutNd, MultiplicativeDropoutLayer)
    rates = [part.p for part in layer.modules() if id(part) in adapter_only and isinstance(part, dropouts)]
    for name in ("rank_dropout", "module_dropout"):  # plain numbers, in LoKr and LoHa
        rates += vars(layer).get(name, {}).values()
    return max((float(rate) for rate in rates), default=0.0)
