"""Families of models x kinds of adapters x the ways a step is run, each against the one-by-one loop.

A bfloat16 forward is compared with the loop under the same autocast, to leave out what bfloat16 itself costs.

Which combinations: every family with every kind it has something for, once. Each such row takes those settings of the
other factors that bring the most pairs of values which did not stand together in a row before; at a tie, those whose
pairs stood together least often. A test shows that in the end every pair that makes sense has stood together.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dp_peft_diffusion.gradients.functional import Clip, Gradients, loop_clipped_sum, trainable
from tests.gradients.cases import Layers, clipper_for, relative_error, repeated_loss
from tests.tiny_families import FAMILIES, HOOKED, KINDS, DenoisingLoss, has_kind, made_up_batch, tiny_model

B = 4
CLIPS = {"flat": Clip(0.5), "automatic": Clip(0.5, "automatic", gamma=0.05)}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Row(NamedTuple):
    """One combination."""

    family: str
    kind: str
    draws: str  # how many noise draws an example has, and whether they share one forward
    micro_batch_size: int  # of B = 4 examples: whole, uneven (3 and 1), single
    precision: str
    memory_format: str
    checkpointing: bool
    text: str
    clipping: str


SETTINGS: dict[str, tuple[Any, ...]] = {
    "draws": ("4 stacked", "1", "4 forwards"),
    "micro_batch_size": (B, 3, 1),
    "precision": ("float32", "bfloat16"),
    "memory_format": ("contiguous", "channels_last"),
    "checkpointing": (False, True),
    "text": ("each its own", "one row for all"),
    "clipping": ("flat", "automatic"),
}


def goes_by_vmap(family: str, kind: str) -> bool:
    """Some trainable parameter is raw; PixArt's scale_shift_table is."""
    return kind not in HOOKED or (family, kind) == ("PixArt", "full")


def makes_sense(row: Row) -> bool:
    by_vmap = goes_by_vmap(row.family, row.kind)
    if by_vmap and (row.checkpointing or (row.precision == "bfloat16" and row.family == "UNet2DConditionModel")):
        return False  # refused: test_refusals.py
    if row.memory_format == "channels_last" and row.family == "Flux":
        return False  # has no images inside, only tokens
    return row.text == "each its own" or row.family not in ("UNet2DModel", "DiT")  # these see no text


def rows_of(family: str, kind: str) -> list[Row]:
    settings = itertools.product(*SETTINGS.values())
    return [row for values in settings if makes_sense(row := Row(family, kind, *values))]


def pairs(row: Row) -> set[tuple]:
    return set(itertools.combinations(zip(Row._fields, row, strict=True), 2))


def candidates() -> list[dict[Row, set[tuple]]]:
    """For every family and kind: its rows, with the pairs of each."""
    models = {family: FAMILIES[family].make() for family in FAMILIES}
    both = [(family, kind) for family in FAMILIES for kind in KINDS if has_kind(models[family], kind)]
    return [{row: pairs(row) for row in rows_of(*names)} for names in both]


def matrix(candidates: list[dict[Row, set[tuple]]]) -> Iterator[Row]:
    seen: Counter[tuple] = Counter()
    for rows in candidates:
        best = min(rows, key=lambda row: (len(rows[row] & seen.keys()), sum(seen[pair] for pair in rows[row])))
        seen.update(rows[best])
        yield best


CANDIDATES = candidates()
ROWS = list(matrix(CANDIDATES))


def clipped_sum_in_micro_batches(model: nn.Module, loss_fn: DenoisingLoss, batch: dict, row: Row) -> Gradients:
    clipper = clipper_for(model, CLIPS[row.clipping])
    assert clipper.path == ("vmap" if goes_by_vmap(row.family, row.kind) else "hooks")
    total = clipper.zeros()
    for start in range(0, B, row.micro_batch_size):
        chunk = {name: tensor[start : start + row.micro_batch_size] for name, tensor in batch.items()}
        part = clipper.clipped_sum_of(loss_fn, chunk)
        total = {name: total[name] + part[name] for name in total}
    return total


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value).replace(" ", "_") for value in row))
def test_the_clipped_sum_equals_the_one_by_one_loop(row):
    model = tiny_model(row.family, row.kind)
    memory_format = torch.channels_last if row.memory_format == "channels_last" else torch.contiguous_format
    model.to(memory_format=memory_format)
    by_vmap = goes_by_vmap(row.family, row.kind)
    loss_fn = DenoisingLoss(
        row.family,
        stacked="stacked" in row.draws,
        one_text=row.text == "one row for all",
        memory_format=torch.contiguous_format if by_vmap else memory_format,  # vmap knows it on weights only
        autocast=torch.bfloat16 if row.precision == "bfloat16" else None,
    )
    batch = made_up_batch(B, int(row.draws[0]))
    batch["images"] *= torch.tensor([0.1, 1.0, 3.0, 1.0]).view(B, 1, 1, 1)  # some are clipped and some are not
    # torch.func applies autocast to some operations only, so it is nearer to the float32 loop than to the bfloat16 one.
    truth = loss_fn._replace(autocast=None) if by_vmap else loss_fn
    expected = loop_clipped_sum(model, truth, batch, CLIPS[row.clipping])
    if row.checkpointing:
        model.enable_gradient_checkpointing()
    found = clipped_sum_in_micro_batches(model, loss_fn, batch, row)
    assert found.keys() == trainable(model).keys()
    assert relative_error(found, expected) < TOLERANCE[row.precision]


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on sequences (b, t, d), read as (t, b, d)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.inner(x, x, x)[0].transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(4, 4)

    def forward(self, x):
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("layer", [SelfAttention, Recurrent])
def test_layers_without_a_rule_equal_the_loop_whatever_order_they_read_rows_in(layer, clip):
    torch.manual_seed(0)
    model, batch = Layers(nn.Linear(4, 4), layer()), (torch.randn(3, 6, 4),)
    clipper = clipper_for(model, clip)
    assert clipper.path == "vmap"
    found = clipper.clipped_sum_of(repeated_loss(2), batch)
    assert relative_error(found, loop_clipped_sum(model, repeated_loss(2), batch, clip)) < 1e-5


def lora_linear(width: int = 256) -> nn.Module:
    """A Linear whose weight is exact in bfloat16, and a LoRA of a thousandth of its norm."""
    torch.manual_seed(0)
    model = Layers(nn.Linear(width, width, bias=False)).requires_grad_(False)
    model.layers[0].weight.data = model.layers[0].weight.bfloat16().float()
    config = LoraConfig(r=4, target_modules=["layers.0"], init_lora_weights=False)
    layer = inject_adapter_in_model(config, model).layers[0]
    layer.lora_B["default"].weight.data *= 1e-3 * layer.weight.norm() / layer.get_delta_weight("default").norm()
    return model.eval()


def test_a_small_lora_is_felt_in_bfloat16_where_a_merged_one_would_be_lost():
    """Changes of the output, relative to the exact change: with no adapter at all the error is 1."""
    model, x = lora_linear(), torch.randn(512, 256)
    layer = model.layers[0]
    weight, delta = layer.weight.detach(), layer.get_delta_weight("default").detach()
    clipper = clipper_for(model, CLIPS["flat"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        without, merged = F.linear(x, weight), F.linear(x, (weight + delta).bfloat16())
    with torch.autocast("cpu", torch.bfloat16), clipper:
        found = model(x)
    clipper.clipped_sum(found.float().square().sum(dim=1))  # closes the pass

    def error(output):
        exact = x.double() @ delta.double().T
        return ((output.double() - without.double() - exact).norm() / exact.norm()).item()

    assert delta.norm() / weight.norm() == pytest.approx(1e-3, rel=1e-3)
    assert error(found.detach()) < 0.8 < 1.5 < error(merged)  # merged, it is farther off than no adapter
    assert ((weight + delta).bfloat16() == weight).float().mean() > 0.75


def test_the_matrix_has_more_than_sixty_rows_and_every_family_with_every_kind():
    assert len(ROWS) == len(set(ROWS)) > 60
    # DiT and PixArt have no norm with a weight; Flux has no convolution
    absent = {("DiT", "norm"), ("PixArt", "norm"), ("Flux", "lora_conv")}
    assert {(row.family, row.kind) for row in ROWS} == set(itertools.product(FAMILIES, KINDS)) - absent


def test_every_pair_of_values_that_makes_sense_stands_in_some_row():
    possible = set().union(*(found for rows in CANDIDATES for found in rows.values()))
    assert possible == set().union(*(pairs(row) for row in ROWS))
