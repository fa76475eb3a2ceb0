"""Class rows: the rows of a base's class table that stand for private classes, and how stock peft ships them."""

from dataclasses import replace
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from dp_peft_diffusion.diffusion.base_model import BaseLayout, BaseModel
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.privacy.adapter_form import CLASS_TABLE


class ClassRows(nn.Module):
    """The base's class table, in which the rows of private classes may move.

    Row r of private class c is base[r] + codes[c] @ directions; all other rows stay as they are.
    The only parameter that trains is `codes`, an ordinary embedding, so that its gradient rule is the stock one.
    """

    directions: torch.Tensor  # (rank, dim)
    rows: torch.Tensor  # (num_classes,)
    class_of_row: torch.Tensor  # (num_embeddings,), -1 where the row is no private class

    def __init__(self, table: nn.Embedding, rows: tuple[int, ...], directions: torch.Tensor):
        super().__init__()
        self.table = table.requires_grad_(False)
        self.codes = nn.Embedding(len(rows), len(directions), _weight=torch.zeros(len(rows), len(directions)))
        self.register_buffer("directions", directions)  # (rank, dim)
        self.register_buffer("rows", torch.tensor(rows))
        self.register_buffer(
            "class_of_row",
            torch.full((table.num_embeddings,), -1).scatter(0, torch.tensor(rows), torch.arange(len(rows))),
        )

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """(b,) rows of the table -> (b, dim)."""
        private_class = self.class_of_row[row]
        moved = self.codes(private_class.clamp(min=0)) @ self.directions
        return self.table(row) + torch.where(private_class[:, None] >= 0, moved, 0.0)

    @torch.no_grad()
    def write_to(self, layer: Any) -> None:
        """Give the rows to what stands for the class table in a stock model: a peft layer, or a plain table."""
        whole = self.table.weight[self.rows] + self.codes.weight @ self.directions  # (num_classes, dim)
        if isinstance(layer, LoraEmbedding):  # B is the frozen directions, A the codes, zero for all other rows
            layer.lora_embedding_A["default"].zero_()
            layer.lora_embedding_A["default"][:, self.rows] = self.codes.weight.T
            layer.lora_embedding_B["default"].copy_(self.directions.T)
        elif isinstance(layer, TrainableTokensWrapper):
            layer.token_adapter.trainable_tokens_delta["default"].copy_(whole)
        elif isinstance(layer, LNTuningLayer):
            layer.ln_tuning_layers["default"].weight[self.rows] = whole
        elif isinstance(layer, ModulesToSaveWrapper):
            layer.modules_to_save["default"].weight[self.rows] = whole
        else:
            layer.weight[self.rows] = whole


def with_class_rows(config: PeftConfig, rows: tuple[int, ...], code_rank: int | None) -> PeftConfig:
    """`config`, with class rows added the way its peft type can ship them.

    Rows that move in few directions are LoRA on the class table, where the rest is LoRA as well. Otherwise whole
    rows travel: as token rows with the other LoraConfigs, in a copy of the table with all other types.
    """
    if isinstance(config, LNTuningConfig):  # stock peft cannot merge modules_to_save of this type
        return replace(config, target_modules=[*config.target_modules, CLASS_TABLE])
    if not isinstance(config, LoraConfig):
        return replace(config, modules_to_save=[CLASS_TABLE])
    if code_rank is None or config.use_dora or config.bias != "none":
        return replace(config, trainable_token_indices={CLASS_TABLE: list(rows)})
    return replace(
        config,
        target_modules=[*config.target_modules, CLASS_TABLE],
        rank_pattern={CLASS_TABLE: code_rank},
        alpha_pattern={CLASS_TABLE: code_rank},
    )


def choose_class_rows(base: BaseModel, given: tuple[int, ...] | None, num_classes: int) -> tuple[int, ...]:
    """The rows of the base's class table that the private classes take.

    Raises:
        UserError: no table, too few rows given, rows outside the table, or a table without spare rows.
    """
    size = base.num_class_embeds
    if size is None:
        raise UserError(f"base {base.name!r} has no class table. Leave --class_rows out or choose a base with classes.")
    if given is not None:
        if len(set(given)) != num_classes or not all(0 <= row < size for row in given):
            raise UserError(f"--class_rows must name {num_classes} different rows below {size}, one for each class.")
        return given
    first, end = base.layout.spare_classes
    if end - first < num_classes:
        raise UserError(
            f"base {base.name!r} has {end - first} spare class rows, the images have {num_classes} classes. "
            f"Name {num_classes} rows that may be overwritten with --class_rows 0,1,..., or choose a base with spare "
            "rows, such as builtin:handwriting."
        )
    return tuple(range(first, first + num_classes))


def without_spares(layout: BaseLayout, rows: tuple[int, ...]) -> BaseLayout:
    """The layout of a base in which `rows` stand for classes now: spare rows begin after them."""
    first, end = layout.spare_classes
    return replace(layout, spare_classes=(max([first, *(row + 1 for row in rows if first <= row < end)]), end))


def unit_code_directions(base: BaseModel) -> torch.Tensor:
    """(code_size, dim): the row of each unit code along an axis. Rows are linear in codes.

    Raises:
        UserError: the base is told no codes.
    """
    if base.codes is None:
        raise UserError(f"base {base.name!r} is told no codes of images. Choose --adapter lora, or class_rows.")
    size = base.codes.config.code_size
    with torch.no_grad():
        return base.codes.rows(torch.eye(size, device=base.unet.device))


def code_directions(base: BaseModel, rank: int | None) -> torch.Tensor:
    """Directions (rank, dim) in which class rows move, from the base's own public table.

    With a rank: its leading principal directions around the null row (or the mean), each as long as
    the public rows spread along it, so that noise of one size on every number suits the table.
    Without: every coordinate, as long as the table's mean spread.

    Raises:
        UserError: more directions asked for than the public rows span.
    """
    table, layout = base.unet.class_embedding.weight.detach(), base.layout
    public = table[base.public_rows]
    centre = table[layout.null_class] if layout.null_class is not None else public.mean(dim=0)
    if base.codes is not None:  # its public rows are those of codes, and stand in no table
        public = centre + unit_code_directions(base)
    offsets = (public - centre).double()
    if rank is None:
        return (torch.eye(table.shape[1]).double() * offsets.square().mean().sqrt()).float()
    _, spread, principal = torch.linalg.svd(offsets, full_matrices=False)
    if rank > int((spread > 1e-4 * spread[0]).sum()):
        fitting = layout.class_code_rank or 4
        raise UserError(f"--class_code_rank {rank}: the base's class table spans fewer directions. Try {fitting}.")
    return (spread[:rank, None] / len(public) ** 0.5 * principal[:rank]).float()
