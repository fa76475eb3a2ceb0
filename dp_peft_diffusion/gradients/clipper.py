"""Per-example gradients, clipped before they are summed: by hooks where every layer has a rule, else by torch.func."""

from types import TracebackType

import torch
from torch import Tensor, nn

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.functional import (
    Batch,
    Clip,
    Gradients,
    LossFn,
    batch_size,
    flat_norms,
    trainable,
    vmap_gradients,
    zeros,
)
from dp_peft_diffusion.gradients.refusals import check_model, refuse_float16, trainable_layers
from dp_peft_diffusion.gradients.rules import has_rule
from dp_peft_diffusion.gradients.taps import Pass


class PerSampleClipper:
    """Sums per-example gradients, each clipped to `max_grad_norm` over all trainable tensors together.

    What holds of a sum: any one example, whatever its values and however many rows it has, moves it by at most
    max_grad_norm; it is finite, and float64. This needs a model and a loss that keep examples apart. What can be seen
    of that is refused by name; `check_gradients` finds the rest (a table of T rows for a batch of b looks like T / b
    rows of each example, a loss may mix examples): run it once before training.

        clipper = PerSampleClipper(unet, max_grad_norm=1.0)
        total = clipper.clipped_sum_of(loss_fn, batch)      # loss_fn(model, batch) -> losses (b,)

        with clipper:                                       # the same in two steps, where `path` is "hooks"
            losses = loss_fn(unet, batch)
        total = clipper.clipped_sum(losses)

    Every trainable layer must see b * k rows for the b losses, example-major (row i * k + j is row j of example i).

    Args:
        model: in eval mode; the parameters that require a gradient are the ones that are clipped.
        max_grad_norm: C > 0.
        clipping: "flat" (min(1, C / norm)) or "automatic" (C / (norm + gamma)).
        gamma: > 0, for "automatic" only.

    Attributes:
        path: "hooks" if a rule knows every trainable layer; "vmap" if some weights are raw parameters (DoRA, IA3...).

    Raises:
        UserError: a trainable parameter or a layer for which the bound above cannot be kept, by name.
    """

    def __init__(
        self, model: nn.Module, max_grad_norm: float = 1.0, clipping: str = "flat", gamma: float | None = None
    ) -> None:
        self.clip = Clip(max_grad_norm, clipping, gamma)
        self.model = model
        self.parameters = trainable(model)
        check_model(model)
        self._layers = trainable_layers(model)
        self._without_rule = [path for path, layer in self._layers.items() if not has_rule(layer)]
        self.path = "vmap" if self._without_rule else "hooks"
        self._pass: Pass | None = None

    def describe(self) -> str:
        """One line: how many parameters are clipped, out of how many that train now (invariant 10)."""
        clipped = sum(parameter.numel() for parameter in self.parameters.values())
        training = sum(parameter.numel() for parameter in trainable(self.model).values())
        return (
            f"clipping {clipped:,} of {training:,} trainable parameters in {len(self.parameters)} tensors, "
            f"by {self.path}"
        )

    def zeros(self) -> Gradients:
        """The clipped sum of an empty batch (invariant 6), {name: shape float64}."""
        return zeros(self.parameters)

    def clipped_sum_of(self, loss_fn: LossFn, batch: Batch) -> Gradients:
        """`loss_fn(model, batch)` -> losses (b,); returns the clipped sum. An empty batch runs no forward.

        Raises:
            UserError: what `clipped_sum` refuses; or, where `path` is "vmap", what torch.func cannot follow.
        """
        if batch_size(batch) == 0:
            return self.zeros()
        return self.clip.sum(self.gradients_of(loss_fn, batch))

    def norms_of(self, loss_fn: LossFn, batch: Batch) -> Tensor:
        """Per-example gradient norms before clipping, (b,) float64. Not private: for public images only."""
        if batch_size(batch) == 0:
            return torch.zeros(0, dtype=torch.float64)
        return flat_norms(self.gradients_of(loss_fn, batch))

    def gradients_of(self, loss_fn: LossFn, batch: Batch) -> Gradients:
        """Per-example gradients before clipping, {name: (b, *shape) float32}. Not private: for made-up inputs only."""
        if self._without_rule:
            return self._vmap_gradients(loss_fn, batch)
        with self:
            losses = loss_fn(self.model, batch)
            if losses.shape != (batch_size(batch),):
                raise UserError(
                    f"the loss function returned shape {tuple(losses.shape)} for a batch of {batch_size(batch)}. "
                    "Return one loss for each example, shape (b,)."
                )
        return self._gradients(losses)

    def __enter__(self) -> "PerSampleClipper":
        """Put taps on the trainable layers; they stay until `clipped_sum` returns or an exception leaves the block."""
        if self._without_rule:
            raise UserError(
                f"trainable module {self._without_rule[0]} holds raw parameters, which no hook sees. "
                "Use clipper.clipped_sum_of(loss_fn, batch), which goes through torch.func."
            )
        self._close()
        self._check_unchanged()
        self._pass = Pass(self.model, self._layers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._close()

    def clipped_sum(self, losses: Tensor) -> Gradients:
        """Run the backward of `losses` (b,) and return {name: shape float64}: sum_i g_i * factor(||g_i||).

        Raises:
            UserError: no `with clipper:` before it, losses that are not (b,), a layer whose rows are not b * k, or a
                trainable tensor without exactly one gradient for each example.
        """
        if losses.shape == (0,):
            self._close()
            return self.zeros()
        return self.clip.sum(self._gradients(losses))

    def _check_unchanged(self) -> None:
        if any(module.training for module in self.model.modules()):
            check_model(self.model)  # names it
        if {id(p) for p in trainable(self.model).values()} != {id(p) for p in self.parameters.values()}:
            raise UserError(
                "other parameters require a gradient now than when the clipper was made. Make a new PerSampleClipper."
            )

    def _vmap_gradients(self, loss_fn: LossFn, batch: Batch) -> Gradients:
        """The same by torch.func, for adapters that use their weights as raw parameters."""
        self._check_unchanged()
        first = self._without_rule[0]
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise UserError(
                f"module {first} holds raw parameters, whose per-example gradients go through torch.func; that cannot "
                "follow gradient checkpointing. Turn it off (model.disable_gradient_checkpointing()), or take an "
                "adapter made of layers, such as lora."
            )
        check = self.model.register_forward_pre_hook(
            lambda model, inputs, named: refuse_float16(first, *inputs, *named.values(), *self.parameters.values()),
            with_kwargs=True,
        )
        try:
            return vmap_gradients(self.model, loss_fn, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            kind = type(self.model.get_submodule(first))
            raise UserError(
                f"trainable module {first} ({kind.__module__}.{kind.__name__}) has no rule for per-example gradients, "
                f"and torch.func cannot follow the model or the loss: {str(error).splitlines()[0]} "
                "Take another adapter, such as lora or lokr; in bfloat16, float32 may be enough."
            ) from error
        finally:
            check.remove()

    def _gradients(self, losses: Tensor) -> Gradients:
        """{name: (b, *shape) float32} in the order of `parameters`; closes the pass."""
        try:
            if self._pass is None:
                raise UserError("clipped_sum needs losses computed inside `with clipper:`, once for each call.")
            if losses.dim() != 1 or not losses.requires_grad:
                raise UserError(
                    f"clipped_sum needs one loss for each example, shape (b,), that depends on the trainable "
                    f"parameters; it got shape {tuple(losses.shape)}, requires_grad {losses.requires_grad}."
                )
            for parameter in self.parameters.values():
                parameter.grad = None
            try:
                self._pass.backward(losses, list(self.parameters.values()))
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise UserError(
                    "a reentrant checkpoint hides its layers from the clipper. Use use_reentrant=False."
                ) from error
            self._refuse_other_paths()
            return {name: self._gradient_of(name) for name in self.parameters}
        finally:
            self._close()

    def _refuse_other_paths(self) -> None:
        """Weights are detached inside their layers, so a .grad shows a use that no tap has seen."""
        stray = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        for parameter in self.parameters.values():
            parameter.grad = None
        if stray:
            raise UserError(
                f"trainable parameter {stray[0]} reaches the loss by another way than its layer's own call, so its "
                "per-example gradient is not known. Use an adapter whose weights are only called as layers."
            )

    def _gradient_of(self, name: str) -> Tensor:
        gradients = self._pass.gradients if self._pass else {}
        if name not in gradients:
            raise UserError(
                f"trainable parameter {name} got no gradient: its layer was not called in this pass, or its output "
                "does not reach the losses (reentrant checkpointing may cut it off: use_reentrant=False). "
                "Freeze it, or call it, and compute losses inside their own `with clipper:`."
            )
        return gradients[name]

    def _close(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None
