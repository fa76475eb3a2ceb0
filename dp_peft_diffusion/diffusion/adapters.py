"""The adapter: LoRA matrices and class rows; inject, list what trains, export to peft, load, merge."""

import copy
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors import safe_open
from torch import nn

from dp_peft_diffusion import recipe
from dp_peft_diffusion.diffusion.base_model import BaseModel
from dp_peft_diffusion.errors import UserError

MAX_RANK = 256
CLASS_TABLE = "class_embedding"  # what diffusers calls it
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class ClassRows(nn.Module):
    """The base's class table, in which the rows of private classes may move.

    Row r of private class c is base[r] + codes[c] @ directions; all other rows stay as they are.
    The only parameter is `codes`, an ordinary embedding, so that its gradient rule is the stock one.
    """

    directions: torch.Tensor  # (rank, dim)
    rows: torch.Tensor  # (num_classes,)
    class_of_row: torch.Tensor  # (num_embeddings,), -1 where the row is no private class

    def __init__(self, table: nn.Embedding, rows: tuple[int, ...], directions: torch.Tensor):
        super().__init__()
        self.table = table
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

    def write_rows(self, layer: TrainableTokensLayer) -> None:
        """Give stock peft the whole rows of the private classes, (num_classes, dim)."""
        layer.trainable_tokens_delta["default"].copy_(
            self.table.weight[self.rows] + self.codes.weight @ self.directions
        )

    def write_lora(self, layer: LoraEmbedding) -> None:
        """Give stock peft LoRA on the table: B is the frozen directions, A the codes, zero for all other rows."""
        layer.lora_embedding_A["default"].zero_()
        layer.lora_embedding_A["default"][:, self.rows] = self.codes.weight.T
        layer.lora_embedding_B["default"].copy_(self.directions.T)


@dataclass(frozen=True)
class Adapter:
    """A base with an adapter injected, ready to train. `config` is what stock peft needs to load it."""

    unet: nn.Module
    config: LoraConfig
    class_rows: ClassRows | None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @property
    def adapted_modules(self) -> list[str]:
        """Paths of the modules that train."""
        found = [name.removesuffix(".lora_A") for name, _ in self.unet.named_modules() if name.endswith(".lora_A")]
        return found + ([CLASS_TABLE] if self.class_rows is not None else [])


def inject_adapter(base: BaseModel, spec: recipe.Adapter, num_classes: int = 0, seed: int = 0) -> Adapter:
    """Inject the adapter of `spec` into a copy of the base's UNet; only the adapter trains.

    num_classes: private classes; 0 trains no class rows.

    Raises:
        UserError: a name in target_modules matches nothing, or no rows are free for the classes.
    """
    unet = copy.deepcopy(base.unet)
    rows = choose_class_rows(base, spec.class_rows, num_classes) if num_classes else ()
    config = peft_config(spec, rows)
    for pattern in spec.target_modules or ():
        check_target(unet, pattern)
    if spec.target_modules:
        # Class rows train as codes, in `ClassRows`; `to_peft` writes them the way `config` says.
        lora_only = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(spec.target_modules))
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # public: the random A matrices are no secret
            inject_adapter_in_model(lora_only, unet)
    class_rows = None
    if rows:
        class_rows = ClassRows(unet.class_embedding, rows, code_directions(base, spec.class_code_rank))
        unet.class_embedding = class_rows
    for name, parameter in unet.named_parameters():
        is_lora = ".lora_B." in name or (".lora_A." in name and not spec.freeze_a)
        parameter.requires_grad_(is_lora or name == f"{CLASS_TABLE}.codes.weight")
    return Adapter(unet.eval().to(base.unet.device), config, class_rows)


def peft_config(spec: recipe.Adapter, rows: tuple[int, ...]) -> LoraConfig:
    """How stock peft reads the adapter.

    Class rows that train in few directions are LoRA on the class table; whole rows are token rows.

    Raises:
        UserError: nothing would train.
    """
    in_directions = bool(rows) and spec.class_code_rank is not None
    if not spec.target_modules and not in_directions:
        raise UserError(
            "nothing would train. Name modules with --target_modules to_q,to_out.0, or train class rows with "
            "--class_code_rank 16 on labelled images."
        )
    alpha = float(spec.rank) if spec.lora_alpha is None else spec.lora_alpha
    return LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,  # peft says int and takes floats
        target_modules=list(spec.target_modules or ()) + ([CLASS_TABLE] if in_directions else []),
        rank_pattern={CLASS_TABLE: spec.class_code_rank} if in_directions else {},
        alpha_pattern={CLASS_TABLE: spec.class_code_rank} if in_directions else {},
        trainable_token_indices={CLASS_TABLE: list(rows)} if rows and not in_directions else None,
    )


def check_target(unet: nn.Module, pattern: str) -> None:
    """Every name must match: peft says nothing when only some do.

    Raises:
        UserError: no Linear or Conv2d ends in `pattern`.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not any(name == pattern or name.endswith(f".{pattern}") for name in names):
        parts = [name.split(".") for name in names]
        tails = sorted({".".join(part[-2:]) if part[-1].isdigit() else part[-1] for part in parts})
        close = difflib.get_close_matches(pattern, tails, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"--target_modules {pattern!r} matches no Linear or Conv2d of this base. {hint}There is: {', '.join(tails)}"
        )


def choose_class_rows(base: BaseModel, given: tuple[int, ...] | None, num_classes: int) -> tuple[int, ...]:
    """The rows of the base's class table that the private classes take.

    Raises:
        UserError: too few rows given, rows outside the table, or a table without spare rows.
    """
    size = base.unet.class_embedding.num_embeddings
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


def code_directions(base: BaseModel, rank: int | None) -> torch.Tensor:
    """Directions (rank, dim) in which class rows move, from the base's own public table.

    With a rank: its leading principal directions around the null row (or the mean), each as long as
    the public rows spread along it, so that noise of one size on every number suits the table.
    Without: every coordinate, as long as the table's mean spread.

    Raises:
        UserError: more directions asked for than the public rows span.
    """
    table, layout = base.unet.class_embedding.weight.detach(), base.layout
    public = table[: layout.null_class] if layout.null_class is not None else table
    centre = table[layout.null_class] if layout.null_class is not None else table.mean(dim=0)
    offsets = (public - centre).double()
    if rank is None:
        return (torch.eye(table.shape[1]).double() * offsets.square().mean().sqrt()).float()
    _, spread, principal = torch.linalg.svd(offsets, full_matrices=False)
    if rank > int((spread > 1e-4 * spread[0]).sum()):
        fitting = layout.class_code_rank or 4
        raise UserError(f"--class_code_rank {rank}: the base's class table spans fewer directions. Try {fitting}.")
    return (spread[:rank, None] / len(public) ** 0.5 * principal[:rank]).float()


def to_peft(base: BaseModel, adapter: Adapter) -> PeftModel:
    """The adapter as stock peft holds it, on a fresh copy of the base, with alpha folded into B.

    Folding (alpha = rank in the file) keeps the scale right for every reader, also those that drop alpha.
    """
    config = copy.deepcopy(adapter.config)
    scale = config.lora_alpha / config.r
    config.lora_alpha = config.r
    model = get_peft_model(copy.deepcopy(base.unet), config)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    target, trained = dict(model.base_model.model.named_parameters()), dict(adapter.unet.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            if ".lora_A." in name or ".lora_B." in name:
                target[name].copy_(value * scale if ".lora_B." in name else value)
        if adapter.class_rows is not None and config.trainable_token_indices:
            adapter.class_rows.write_rows(model.base_model.model.class_embedding.token_adapter)
        elif adapter.class_rows is not None:
            adapter.class_rows.write_lora(model.base_model.model.class_embedding)
    return model.eval()


def load_adapter(model: nn.Module, folder: Path | str) -> PeftModel:
    """Load a shareable folder onto a base UNet with stock peft, after checking the files.

    Raises:
        UserError: the files are not a LoRA adapter as this tool writes it, or do not fit the base.
    """
    names = check_adapter_files(Path(folder))
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"adapter {folder} does not fit the base: {error}. Is --base the base it was trained on?"
        ) from error
    held = {n.replace(".default", "") for n, _ in loaded.named_parameters() if ".lora_" in n or "trainable_tokens" in n}
    if held != names:
        raise UserError(f"adapter {folder}: its tensors do not fit the base: {sorted(held ^ names)[:4]}. Wrong --base?")
    return loaded.eval()


def merge_adapter(model: nn.Module, folder: Path | str, weight: float = 1.0) -> nn.Module:
    """The base with the adapter merged in float32: a plain diffusers model.

    weight: how much of the change to merge; 0 is the base, 1 the adapter.
    """
    base_weights = {name: value.clone() for name, value in model.float().state_dict().items()}
    merged = load_adapter(model, folder).merge_and_unload()
    if weight != 1.0:
        with torch.no_grad():
            for name, value in merged.state_dict().items():
                value.copy_(torch.lerp(base_weights[name], value, weight))
    return merged.eval()


def check_adapter_files(folder: Path) -> set[str]:
    """Refuse what a stranger's file could hurt with, before peft sees it; return its tensor names.

    Raises:
        UserError: a file is missing, or says something that this tool never writes.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter {folder}: no {name} there. --adapter wants the folder that `dp-peft train` wrote."
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"adapter {folder} cannot be read: {error}") from error
    targets, rank = config.get("target_modules"), config.get("r")
    plain_names = isinstance(targets, list) and all(re.fullmatch(r"[\w.]{1,200}", str(target)) for target in targets)
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: peft_type {config.get('peft_type')!r}; this version opens LORA.")
    if not plain_names:
        raise UserError(f"adapter {folder}: target_modules must be a list of plain module names.")
    for value in [rank, *(config.get("rank_pattern") or {}).values()]:
        if not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            raise UserError(f"adapter {folder}: rank {value!r} is not between 1 and {MAX_RANK}.")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"adapter {folder}: {name} holds numbers that are not finite.")
        if ".lora_A." in name and tensor.shape[0] != rank or ".lora_B." in name and tensor.shape[1] != rank:
            raise UserError(f"adapter {folder}: {name} of shape {tuple(tensor.shape)} is not of rank {rank}.")
    return set(tensors)
