"""A stranger's adapter on a network: its files are checked, then stock peft loads it, or it is merged in float32."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel, fingerprint, load_parts
from dp_peft_diffusion.diffusion.text_encoding import TextEncoders
from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.adapter_files import AdapterFiles, certified_base, holds_whole_model, read_adapter
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE
from dp_peft_diffusion.privacy.adapter_layers import check_fit
from dp_peft_diffusion.privacy.certificate_form import FILE_NAME
from dp_peft_diffusion.privacy.model_files import check_model

# peft says so of LNTuningConfig on any layer but LayerNorm; the tests show that it works.
warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning, "peft")

NETWORKS = ("unet", "transformer")  # what diffusers calls the part of a pipeline that an adapter is for
TOLERATED_LOSS = 0.01  # share of a change that rounding may take without a word


def load_adapter(model: Any, folder: Path | str) -> Any:
    """Load a shareable folder onto a base with stock peft, after checking the files and that they fit.

    model: a network of diffusers, or a pipeline, whose UNet or transformer is meant.

    Returns:
        The network as a PeftModel; or the pipeline, with that in the network's place.

    Raises:
        PrivacyError: the files say what our adapter kinds never write.
        UserError: there is no adapter, it does not fit the base, or the base has an adapter on it.
    """
    if holds_whole_model(folder):
        raise UserError(f"{folder} holds a whole model, not an adapter. Use merge_adapter, or load it as a base.")

    def load(net: nn.Module, pipe: DiffusionPipeline | None) -> nn.Module:
        _warn_of_another_base(net, pipe, Path(folder))
        with _whole_or_as_it_was(net):
            return attach_adapters(net, [folder], [1.0])

    return _on_network(model, load)


def merge_adapter(model: Any, folder: Path | str, weight: float = 1.0) -> Any:
    """The base with the adapter merged in float32: a plain diffusers model. A whole model takes the base's place.

    The weights keep their type. In half precision a small change is mostly lost, and a warning says how much of it.

    model: a network of diffusers, or a pipeline, whose UNet or transformer is meant; changed in place.
    weight: how much of the change to merge; 0 is the base, 1 the adapter.

    Returns:
        The network or the pipeline.

    Raises:
        PrivacyError: the files say what our adapter kinds never write.
        UserError: there is no adapter, it does not fit the base, the base has an adapter on it, or the weight is such
            that no finite numbers come out. The base is then left as it was.
    """

    def merge(net: nn.Module, pipe: DiffusionPipeline | None) -> nn.Module:
        if not holds_whole_model(folder):
            _warn_of_another_base(net, pipe, Path(folder))
        return merge_adapters(net, [folder], [weight])

    return _on_network(model, merge)


def _on_network(model: Any, change: Callable[[nn.Module, DiffusionPipeline | None], nn.Module]) -> Any:
    """What `change` makes of a network; or a pipeline, with that in the place of its network.

    Raises:
        UserError: it is neither, or has an adapter on it.
    """
    if isinstance(model, nn.Module):
        _check_bare(model)
        return change(model, None)
    found = [name for name in NETWORKS if isinstance(model, DiffusionPipeline) and name in model.components]
    if not found:
        raise UserError(f"{type(model).__name__} is no network, and no pipeline with a {' or a '.join(NETWORKS)}.")
    net = getattr(model, found[0])
    _check_bare(net)
    setattr(model, found[0], change(net, model))
    return model


def _check_bare(net: nn.Module) -> None:
    if any(isinstance(module, PeftModel | BaseTunerLayer) for module in net.modules()):
        raise UserError(
            "an adapter is already on this model. Give a fresh one, or take the adapter off first: "
            "model = model.unload(), and of a pipeline pipe.unet = pipe.unet.unload()."
        )


def check_weighing(folders: Sequence[Path | str], weights: Sequence[float]) -> None:
    """There are adapters, and a weight for each, which is a number.

    Raises:
        UserError: not so.
    """
    if not folders:
        raise UserError("there is no adapter. Give the folder of at least one.")
    if not isinstance(weights, Sequence) or len(weights) != len(folders):
        raise UserError(
            f"weights {weights}: give a list with one number for each adapter, of which there are {len(folders)}."
        )
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights {', '.join(map(str, weights))}: give finite numbers, such as 0.7.")


def attach_adapters(net: nn.Module, folders: Sequence[Path | str], weights: Sequence[float]) -> PeftModel:
    """`net` with adapters on it as layers of stock peft: what `merge_adapters` gives, up to rounding.

    Raises:
        PrivacyError: the files say what our adapter kinds never write.
        UserError: there is no adapter, it does not fit the base, or layers of its kind cannot be weighed or added.
    """
    check_weighing(folders, weights)
    opened = [open_adapter(net, folder) for folder in folders]
    if len(opened) > 1 or weights[0] != 1.0:
        for folder, files in zip(folders, opened, strict=True):
            _check_weighable(folder, files)
    names = [f"adapter_{i}" for i in range(1, len(opened))]
    try:
        loaded = PeftModel.from_pretrained(net, str(folders[0]), use_safetensors=True)
        for name, folder in zip(names, folders[1:], strict=True):
            loaded.load_adapter(str(folder), adapter_name=name)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{' and '.join(map(str, folders))} could not be loaded: {error}. Is it the base of the training?"
        ) from error
    for name, folder, files in zip(["default", *names], folders, opened, strict=True):
        held = set(get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False))
        if held != files.tensors:  # peft would leave the missing ones at random
            raise UserError(
                f"adapter {folder}: peft wants other tensors: {sorted(held ^ files.tensors)[:4]}. Wrong base?"
            )
    if len(opened) > 1:
        loaded.base_model.set_adapter(["default", *names], inference_mode=True)
    for layer in loaded.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in zip(["default", *names], weights, strict=True):
                layer.set_scale(name, weight)
    return loaded.eval()


def open_adapter(net: nn.Module, folder: Path | str) -> AdapterFiles:
    """An adapter's files, checked, also against the network that it goes on.

    Raises:
        PrivacyError: the files say what our adapter kinds never write.
        UserError: there is no adapter, or it does not fit the network.
    """
    files = read_adapter(Path(folder))
    check_fit(files.config, files.layers, shapes(net), "this model")
    return files


def _check_weighable(folder: Path | str, files: AdapterFiles) -> None:
    config = files.config
    plain = config["peft_type"] == "LORA" and not config.get("use_dora") and config.get("bias") != "all"
    if not plain or config.get("trainable_token_indices"):
        raise UserError(
            f"{folder}: only layers of plain LoRA can be weighed and added unmerged, and this adapter has others. "
            "Leave out --unmerged: merged, it gives the same images."
        )


def merge_adapters(
    net: nn.Module, folders: Sequence[Path | str], weights: Sequence[float], dtype: torch.dtype | None = None
) -> nn.Module:
    """`net` + the sum of weight * change, in place; merged in float32, added in float64, so that no order matters.

    dtype: what the changed weights are kept as; None: what they are.

    Raises:
        PrivacyError: the files say what we never write.
        UserError: there is no adapter, it does not fit the base, or numbers come out that are not finite. `net` is then
            left as it was.
    """
    check_weighing(folders, weights)
    totals: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, change in change_of(net, folder).items():
            totals[name] = totals.get(name, 0.0) + weight * change
    lost = moved = 0.0
    merged: list[tuple[Tensor, Tensor]] = []
    for name, change in totals.items():
        module, _, kind = name.rpartition(".")
        weight = getattr(net.get_submodule(module), kind)
        before, after = weight.data, (weight.data.double() + change).to(dtype or weight.dtype)
        if not after.isfinite().all():
            raise UserError(f"the merged {name} is beyond {_short(after.dtype)}. Give smaller weights, or use float32.")
        lost += (after.double() - before.to(after.dtype).double() - change).square().sum().item()
        moved += change.square().sum().item()
        merged.append((weight, after))
    for parameter, after in merged:
        parameter.data = after
    if lost > TOLERATED_LOSS**2 * moved:
        warnings.warn(
            f"rounding to {_short(after.dtype)} takes away {(lost / moved) ** 0.5:.0%} of the "
            "adapter's change. Merge into float32, or leave the adapter unmerged.",
            stacklevel=5,  # the caller of `merge_adapter`
        )
    return net.requires_grad_(False).eval()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def change_of(net: nn.Module, folder: Path | str) -> dict[str, Tensor]:
    """Weight of `net` -> what merging a folder adds to it (float64), for all weights it may change. `net` stays as is.

    Raises:
        PrivacyError: the files say what we never write.
        UserError: there is no adapter, or it does not fit the base.
    """
    if holds_whole_model(folder):
        whole = load_whole_model(folder).unet.to(next(net.parameters()).device)
        if shapes(whole) != shapes(net):
            raise UserError(f"the model in {folder} is not of the shape of the base. Give the base it was trained on.")
        return _difference(whole.state_dict(), net.state_dict())
    layers = open_adapter(net, folder).layers
    owners = {*layers.layers, *(path.rpartition(".")[0] for path in layers.whole), CLASS_TABLE}
    before = {name: value.clone() for name, value in net.state_dict().items() if name.rpartition(".")[0] in owners}
    try:
        for name in before:
            net.get_submodule(name.rpartition(".")[0]).float()
        with _whole_or_as_it_was(net):
            merged = attach_adapters(net, [folder], [1.0]).merge_and_unload()
        return _difference({name: merged.state_dict()[name] for name in before}, before)
    finally:
        for name, value in before.items():
            net.get_submodule(name.rpartition(".")[0]).to(value.dtype)
            net.state_dict()[name].copy_(value)


@contextlib.contextmanager
def _whole_or_as_it_was(net: nn.Module) -> Iterator[None]:
    """After an error the layers of `net` are those of before: peft puts its own in their places one by one."""
    layers = [(module, dict(module.named_children())) for module in net.modules()]
    try:
        yield
    except BaseException:
        for module, children in layers:
            for name, child in children.items():
                module.add_module(name, child)
        raise


def _difference(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name].double() - value.double() for name, value in before.items()}


def load_whole_model(folder: Path | str) -> BaseModel:
    """The net in a shareable folder that trained as a whole, after checking the files; never an autoencoder.

    Raises:
        PrivacyError: the files say what we never write, or are not all of a net.
    """
    promised = check_model(Path(folder))
    loaded = load_parts(str(folder))
    if shapes(loaded.unet) != promised:
        raise PrivacyError(f"the model in {folder} has not exactly the weights that its config.json promises.")
    return loaded


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _warn_of_another_base(net: nn.Module, pipe: DiffusionPipeline | None, folder: Path) -> None:
    doubt = _doubt(net, pipe, folder)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=5)  # the caller of `load_adapter` or `merge_adapter`


def _doubt(net: nn.Module, pipe: DiffusionPipeline | None, folder: Path) -> str | None:
    """Why a network, or its pipeline, may not be what a folder was trained on; None of one that is."""
    said = certified_base(folder)
    if said is None:
        return (
            f"NOT CHECKED whether this is the base that {folder} was trained on: it has no {FILE_NAME}, which says so."
        )
    parts = None if pipe is None else _beside(net, pipe)
    beside = [] if parts is None else [parts.vae, *(parts.text.encoders if parts.text else ())]
    weights = (value for part in (net, *beside) if part is not None for value in part.state_dict().values())
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in weights):
        return (
            f"NOT CHECKED whether this is the base that {folder} was trained on, {said['name']}: in half precision "
            "its bits are others. Load it in float32 to see."
        )
    own, outcome = fingerprint(net), "Its promise holds, but nobody has seen what it does here."
    if own != said["sha256"]:
        return (
            f"{folder} was trained on {said['name']} with weights {str(said['sha256'])[:12]}, and these are "
            f"{own[:12]}. {outcome}"
        )
    if parts is not None and said.get("parts_sha256", parts.parts_digest) != parts.parts_digest:
        return (
            f"{folder} was trained on {said['name']} with another autoencoder or other text encoders than this "
            f"pipeline has. {outcome}"
        )
    return None


def _beside(net: Any, pipe: DiffusionPipeline) -> BaseModel:
    """A pipeline's network with its autoencoder and text encoders, as a base that knows their digest."""
    parts = pipe.components
    encoders = tuple(parts[name] for name in ("text_encoder", "text_encoder_2") if parts.get(name) is not None)
    zeros = len(encoders) == 2 and bool(pipe.config.get("force_zeros_for_empty_prompt", True))
    vae, text = parts.get("vae") or parts.get("vqvae"), TextEncoders((), encoders, zeros) if encoders else None
    return BaseModel(net, pipe.scheduler, BaseLayout(), "", None, None, "", vae, text)
