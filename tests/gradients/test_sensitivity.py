"""What one record can do to the clipped sum, whatever its values.

First hypothesis looks for counterexamples in small batches that it can shrink. Then, in each of `CASES`, it makes
`CHAINS` batches and takes their `RECORDS` records out one after the other, which gives RECORDS + 1 batches each, every
one a neighbour of the one before: more than 10,000 batches together.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dp_peft_diffusion.gradients.functional import Clip
from tests.gradients.cases import Layers, clipper_for, distance
from tests.gradients.test_clipper import denoising_loss, images, tiny_unet

C = 0.5
BOUND = C * (1 + 1e-5)
SIDE = 4
CLIPS = [Clip(C), Clip(C, "automatic", gamma=0.01), Clip(C, "automatic", gamma=1e-30)]

numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-38, 1e-20, 1e19, 3e38, -3e38, np.inf, -np.inf, np.nan]),
)
# Constant records (all zero, all 3e38, ...) and records of unlike numbers.
records = st.one_of(
    numbers.map(lambda value: np.full((SIDE, SIDE), value, np.float32)),
    hnp.arrays(np.float32, (SIDE, SIDE), elements=st.floats(-3, 3, width=32)),
    hnp.arrays(np.float32, (SIDE, SIDE), elements=numbers),
)
batches = st.lists(records, max_size=5)
HUGE_AMONG_TINY = [np.full((SIDE, SIDE), value, np.float32) for value in (1e-30, 3e38, 1e-30)]
EQUAL = [np.ones((SIDE, SIDE), np.float32)] * 5
BROKEN = [np.full((SIDE, SIDE), value, np.float32) for value in (np.nan, 1.0, np.inf)]


def small_net(seed=0):
    torch.manual_seed(seed)
    return Layers(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 2))


def no_activation_net():
    """Gradients grow with the input, up to overflow."""
    torch.manual_seed(0)
    return Layers(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))


def squared_loss(k):
    def loss_fn(model, batch):
        x, weights = batch
        outputs = model(x.repeat_interleave(k, dim=0))
        return weights * outputs.square().sum(dim=1).view(-1, k).mean(dim=1)

    return loss_fn


def tensors(records, weights=None):
    x = torch.from_numpy(np.array(records, np.float32).reshape(-1, 1, SIDE, SIDE))
    return x, torch.ones(len(x)) if weights is None else weights


def nulled(batch, i):
    """Record i replaced by nothing: a blank image of weight 0."""
    x, weights = batch[0].clone(), batch[1].clone()
    x[i], weights[i] = 0.0, 0.0
    return x, weights


def is_finite(total):
    return all(tensor.isfinite().all() for tensor in total.values())


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("make", [small_net, no_activation_net])
@settings(max_examples=30)
@given(records=batches, k=st.sampled_from([1, 3]))
@example(records=HUGE_AMONG_TINY, k=3)
@example(records=EQUAL, k=3)
@example(records=BROKEN, k=1)
@example(records=[], k=1)
@example(records=EQUAL[:1], k=1)
def test_replacing_one_record_by_nothing_moves_the_sum_by_at_most_c(make, clip, records, k):
    clipper, loss_fn, batch = clipper_for(make(), clip), squared_loss(k), tensors(records)
    total = clipper.clipped_sum_of(loss_fn, batch)
    assert is_finite(total)
    for i in range(len(records)):
        assert distance(total, clipper.clipped_sum_of(loss_fn, nulled(batch, i))) <= BOUND


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@settings(max_examples=30)
@given(records=batches, k=st.sampled_from([1, 3]))
@example(records=HUGE_AMONG_TINY, k=3)
@example(records=EQUAL, k=3)
@example(records=BROKEN, k=1)
@example(records=EQUAL[:1], k=1)
def test_removing_one_record_moves_the_sum_by_at_most_c(clip, records, k):
    """On losses linear in the output: an example's own gradient then has the same bits in a batch of any size."""
    torch.manual_seed(0)
    clipper = clipper_for(Layers(nn.Flatten(), nn.Linear(SIDE * SIDE, 2)), clip)

    def loss_fn(model, batch):
        return model(batch[0].repeat_interleave(k, dim=0)).sum(dim=1).view(-1, k).mean(dim=1)

    total = clipper.clipped_sum_of(loss_fn, tensors(records))
    assert is_finite(total)
    for i in range(len(records)):
        without = clipper.clipped_sum_of(loss_fn, tensors(records[:i] + records[i + 1 :]))
        assert distance(total, without) <= BOUND


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_an_example_without_finite_gradient_contributes_exactly_zero(clip, value):
    clipper, loss_fn = clipper_for(no_activation_net(), clip), squared_loss(1)
    batch = tensors(np.random.default_rng(0).normal(size=(3, SIDE, SIDE)))
    batch[0][1] = value
    norms = clipper.norms_of(loss_fn, batch)
    assert norms.isfinite().tolist() == [True, False, True]
    total, without = clipper.clipped_sum_of(loss_fn, batch), clipper.clipped_sum_of(loss_fn, nulled(batch, 1))
    assert all(torch.equal(total[name], without[name]) and total[name].any() for name in total)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_broken_image_leaves_the_others_on_a_unet_untouched(value, memory_format):
    unet, loss_fn, clip = tiny_unet().to(memory_format=memory_format), denoising_loss(2, memory_format), Clip(C)
    clipper, batch = clipper_for(unet, clip), images(4, 2)

    def weighted_loss(model, batch):
        return loss_fn(model, batch[:3]) * batch[3]

    batch = (*batch, torch.ones(4))
    batch[0][2] = value
    total = clipper.clipped_sum_of(weighted_loss, batch)
    batch[0][2], batch[3][2] = 0.0, 0.0
    without = clipper.clipped_sum_of(weighted_loss, batch)
    assert is_finite(total)
    assert all(torch.equal(total[name], without[name]) for name in total)


gradient_rows = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=numbers)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@settings(max_examples=200)
@given(rows=gradient_rows)
@example(rows=np.full((2, 6), 3.4e38, np.float32))
@example(rows=np.full((2, 6), 1e-45, np.float32))
@example(rows=np.zeros((2, 6), np.float32))
def test_the_clip_function_is_its_closed_form_on_any_float32(clip, rows):
    """Against numpy in long double, with the rows split over two tensors."""
    middle = rows.shape[1] // 2
    split = {"a": torch.from_numpy(rows[:, :middle]), "b": torch.from_numpy(rows[:, middle:])}
    found = torch.cat([tensor.flatten() for tensor in clip.sum(split).values()]).numpy()
    expected = np.zeros(rows.shape[1], np.longdouble)
    for row in rows.astype(np.longdouble):
        if np.isfinite(row).all():
            norm = np.sqrt((row**2).sum())
            shrink = C * (1 - 1e-6) / (norm + clip.gamma) if clip.gamma else min(1.0, C * (1 - 1e-6) / max(norm, 1e-99))
            assert shrink * norm <= C
            expected += row * shrink
    assert np.abs(found - expected).max() <= 1e-12


CHAINS, RECORDS = 56, 6
SPECIAL = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e19, 1e-20, 1e-45, 0.0, 1.0], np.float32)
EXPONENTS = np.array([0, 0, 0, -30, -5, 5, 19, 37])


def lora_net():
    """Runs merged in float32 and as three branches in bfloat16."""
    config = LoraConfig(r=1, lora_alpha=2, target_modules=["layers.0", "layers.3"], init_lora_weights=False)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)
    return inject_adapter_in_model(config, Layers(*layers)).eval()


def norm_net():
    torch.manual_seed(0)
    return Layers(nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.Flatten(), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 2))


class RawNet(nn.Module):
    """Goes by torch.func."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, SIDE * SIDE))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


NETS = {"tanh": small_net, "linear": no_activation_net, "lora": lora_net, "norms": norm_net, "raw": RawNet}
PRECISIONS = ("float32", "bfloat16")
NULLED = list(itertools.product(NETS, PRECISIONS, CLIPS[:2]))
REMOVED = list(itertools.product(PRECISIONS, CLIPS))
CASES = [*NULLED, *REMOVED]


def autocast_loss(loss_fn, precision):
    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return loss_fn(model, batch).float()

    return loss_of


def linear_loss(k):
    """An example's own gradient has the same bits wherever it stands in a batch."""

    def loss_fn(model, batch):
        x, weights = batch
        return weights * model(x.repeat_interleave(k, dim=0)).sum(dim=1).view(-1, k).mean(dim=1)

    return loss_fn


def made_up_records(seed):
    """(RECORDS, 1, s, s): normal numbers of all sizes, some constant or with one special number, or all equal."""
    draw = np.random.default_rng(seed)
    records = draw.normal(size=(RECORDS, SIDE * SIDE)) * 10.0 ** draw.choice(EXPONENTS, (RECORDS, 1))
    records = np.clip(records, -3.4e38, 3.4e38).astype(np.float32)
    for record in records:
        special, how = draw.choice(SPECIAL), draw.integers(4)
        if how == 0:
            record[:] = special
        elif how == 1:
            record[draw.integers(record.size)] = special
    if draw.random() < 0.15:
        records[:] = records[0]
    return records.reshape(RECORDS, 1, SIDE, SIDE)


def chunked_sum(clipper, loss_fn, records, size):
    """The sum over micro-batches of one size, the last padded with null records, as training does it."""
    total = clipper.zeros()
    for start in range(0, len(records), size):
        chunk = records[start : start + size]
        padding = size - len(chunk)
        weights = torch.cat([torch.ones(len(chunk)), torch.zeros(padding)])
        x = np.concatenate([chunk, np.zeros((padding, 1, SIDE, SIDE), np.float32)])
        part = clipper.clipped_sum_of(loss_fn, tensors(x, weights))
        total = {name: total[name] + part[name] for name in total}
    return total


def examine(sums_of):
    """`sums_of(records, k, size)` yields the clipped sums of a chain of neighbours; check and count CHAINS chains."""
    examined = 0

    @settings(max_examples=CHAINS)
    @given(st.integers(0, 2**64), st.integers(1, 8), st.integers(1, 4))
    def run(seed, k, size):
        nonlocal examined
        sums = list(sums_of(made_up_records(seed), k, size))
        assert all(is_finite(total) for total in sums)
        assert all(distance(total, without) <= BOUND for total, without in itertools.pairwise(sums))
        examined += len(sums)

    run()
    assert examined >= CHAINS * (RECORDS + 1)


@pytest.mark.parametrize("net, precision, clip", NULLED, ids=str)
def test_replacing_records_by_nothing_one_by_one_moves_the_sum_by_at_most_c_each(net, precision, clip):
    clipper = clipper_for(NETS[net](), clip)

    def sums_of(records, k, size):
        loss_fn, batch = autocast_loss(squared_loss(k), precision), tensors(records)
        yield clipper.clipped_sum_of(loss_fn, batch)
        for i in range(RECORDS):
            batch = nulled(batch, i)
            yield clipper.clipped_sum_of(loss_fn, batch)

    examine(sums_of)


@pytest.mark.parametrize("precision, clip", REMOVED, ids=str)
def test_a_removal_that_shifts_all_later_micro_batches_moves_the_sum_by_at_most_c(precision, clip):
    torch.manual_seed(0)
    clipper = clipper_for(Layers(nn.Flatten(), nn.Linear(SIDE * SIDE, 2)), clip)

    def sums_of(records, k, size):
        loss_fn = autocast_loss(linear_loss(k), precision)
        for first in range(RECORDS + 1):  # down to an empty batch
            yield chunked_sum(clipper, loss_fn, records[first:], size)

    examine(sums_of)


def test_more_than_ten_thousand_batches_are_examined():
    assert len(CASES) * CHAINS * (RECORDS + 1) > 10_000


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_among_4096_aligned_gradients_one_record_moves_the_sum_by_at_most_c(precision, clip):
    torch.manual_seed(0)
    clipper = clipper_for(Layers(nn.Flatten(), nn.Linear(SIDE * SIDE, 2)), clip)
    records, loss_fn = np.ones((4096, 1, SIDE, SIDE), np.float32), autocast_loss(linear_loss(2), precision)
    total = chunked_sum(clipper, loss_fn, records, 500)
    without = chunked_sum(clipper, loss_fn, records[1:], 500)
    norm = distance(total, clipper.zeros())
    assert norm == pytest.approx(4096 * C, rel=5e-3)  # all in one direction
    assert 0.99 * C < distance(total, without) <= BOUND
