"""What looks at the real training step from outside. Each takes a seed and raises AssertionError with a sentence.

Statistical ones fail by chance less than once in a million (`RARE`, two-sided), the others never.
"""

import itertools
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import torch
from gradients.cases import Layers, Twice, relative_error, repeated_loss
from mutants.tiny_run import (
    LEARNING_RATE,
    C,
    TinyRun,
    Trace,
    key_of,
    nulled,
    private_images,
    tiny_net,
    trace_of,
    vector,
)
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_peft_diffusion import training
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import Clip, loop_clipped_sum, trainable
from dp_peft_diffusion.gradients.optimizer import Ema
from dp_peft_diffusion.privacy.poisson import example_ids
from dp_peft_diffusion.recipe import Train

RARE = 1e-6
FAR = 6.0  # standard deviations: once in half a billion
N, SIDE = 5, 4


def p_value(statistic: float, distribution) -> float:
    """Two-sided."""
    return 2 * min(distribution.cdf(statistic), distribution.sf(statistic))


def normal_records(seed: int, n: int = N, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, side, side)).astype(np.float32)


def families(seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Named sets of records (n, s, s); record 1 is the odd one out (record 0 where there is one only)."""
    normal, row, column = normal_records(seed), *np.random.default_rng(seed).integers(SIDE, size=2)

    def with_odd(value: object, among: np.ndarray = normal) -> np.ndarray:
        records = among.copy()
        records[1] = value
        return records

    def with_one_pixel(value: float) -> np.ndarray:
        records = normal.copy()
        records[1, row, column] = value
        return records

    yield "normal", normal
    yield "one NaN", with_one_pixel(np.nan)
    yield "tiny", normal * np.float32(1e-30)
    yield "huge", normal * np.float32(1e15)
    yield "one infinity", with_one_pixel(np.inf)
    yield "one minus infinity", with_one_pixel(-np.inf)
    yield "one 3e38", with_odd(3e38)
    yield "one outlier", with_odd(1e7 * normal[1])
    yield "all identical", np.repeat(normal[:1], N, axis=0)
    yield "all zero", np.zeros_like(normal)
    yield "one opposed", with_odd(-1e4 * normal[0], among=np.repeat(1e2 * normal[:1], N, axis=0))
    yield "one record", normal[:1]


def replay(seed: int) -> None:
    """Two steps on neighbours with the same key: every sum moves by C at most, and nothing else that shows.

    One neighbour has the odd record replaced by nothing, the other lacks the last record (with one record: all).
    The weights are kept, so that the second step can be compared; the noise is the same, so it cancels.
    """
    net, key = tiny_net(), key_of(seed)
    for (family, records), draws in itertools.product(families(seed), (1, 4)):
        options = dict(steps=2, noise_multiplicity=draws, micro_batch_size=3, expected_batch_size=float(N))
        odd = min(1, len(records) - 1)
        whole = trace_of(TinyRun(private_images(records), **options), key, net)
        for how, images in (("nulled", nulled(records, odd)), ("removed", private_images(records[:-1]))):
            without = trace_of(TinyRun(images, **options), key, net)
            _check_neighbours(whole, without, f"{family}, K = {draws}, one {how}")


def _check_neighbours(whole: Trace, without: Trace, where: str) -> None:
    assert whole.events() == without.events(), f"{where}: one record changes what can be seen"
    for before, after in ((whole.sums, without.sums), (whole.updates, without.updates)):
        for step, (sums, others) in enumerate(zip(before, after, strict=True)):
            moved = (vector(sums) - vector(others)).norm().item()
            assert vector(sums).isfinite().all(), f"{where}: step {step} is not finite"
            assert moved <= C * (1 + 1e-5), f"{where}: one record moves step {step} by {moved / C:.6g} C"
    for sums in whole.sums:
        assert all(tensor.dtype == torch.float64 for tensor in sums.values()), f"{where}: sums are not float64"


def noise(seed: int) -> None:
    """The noise of a run so wide that every tensor gets a million numbers: its size, its shape, where it is."""
    net, sigma = tiny_net(side=8, width=1000, num_classes=400, directions=160, lora=False), 1.3
    images = private_images(normal_records(seed, 2, 8), num_classes=400)
    trace = trace_of(TinyRun(images, steps=16, sampling_prob=0.5, noise_multiplier=sigma), key_of(seed), net)
    assert len(trace.sums) == len(trace.updates) == 16, "noise is not added once in each step"
    assert all(set(update) == set(trainable(net)) for update in trace.updates), "noise is not on what trains"
    found = {}
    for name in trace.updates[0]:
        pairs = zip(trace.updates, trace.sums, strict=True)
        drawn = torch.stack([update[name].double().flatten() - sums[name].double().flatten() for update, sums in pairs])
        found[name] = drawn.numpy() / (sigma * C)
        assert found[name].size >= 1e6
    _check_normal(found)


def _check_normal(found: dict[str, np.ndarray]) -> None:
    """(steps, numbers) of every tensor, standard normal and independent."""
    for name, values in found.items():
        p = p_value((values**2).sum(), stats.chi2(values.size))
        assert p > RARE, f"the noise of {name} has {np.mean(values**2):.4g} of its variance (p {p:.2g})"
        assert stats.kstest(values[0][:20_000], "norm").pvalue > RARE, f"the noise of {name} is not normal"
        along = (values[:, 1:] * values[:, :-1]).sum() / values[:, 1:].size ** 0.5
        assert abs(along) < FAR, f"the numbers of {name} are correlated with their neighbours"
        between = values @ values.T / values.shape[1] ** 0.5
        assert np.abs(np.triu(between, 1)).max() < FAR, f"the steps of {name} are correlated"
    shortest = min(values.shape[1] for values in found.values())
    rows = np.stack([values[:, :shortest].ravel() for values in found.values()])
    between = rows @ rows.T / rows.shape[1] ** 0.5
    assert np.abs(np.triu(between, 1)).max() < FAR, "tensors are correlated"


def sampler(seed: int) -> None:
    """Poisson samples: every record by itself, with probability q, in every step anew."""
    n, q, steps, key = 200, 0.2, 2000, key_of(seed)
    masks = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        masks[step, example_ids(key, step, n, q)] = True
    for what, counts, trials in (("sizes", masks.sum(axis=1), n), ("counts", masks.sum(axis=0), steps)):
        p = p_value(((counts - trials * q) ** 2).sum() / (trials * q * (1 - q)), stats.chi2(len(counts)))
        assert p > RARE, f"batch {what} are not binomial (p {p:.2g})"
    mean = masks.sum() / (steps * n)
    assert abs(mean - q) < FAR * (q * (1 - q) / masks.size) ** 0.5, f"records take part with {mean:.4g}, not {q}"
    overlap, expected = (masks[1:] & masks[:-1]).sum(), (steps - 1) * n * q**2
    assert abs(overlap - expected) < 7 * expected**0.5, "consecutive batches overlap too much or too little"
    pairs = np.corrcoef(masks.T.astype(float))[np.triu_indices(n, 1)]
    assert np.abs(pairs).max() < stats.norm.isf(RARE / len(pairs) / 2) / steps**0.5, "two records go together"
    _check_cap(key, masks[:1000], 36)


def _check_cap(key: bytes, masks: np.ndarray, cap: int) -> None:
    """A capped batch is a part of the uncapped, of the right size, and nobody is preferred."""
    steps, n = masks.shape
    counts, variance = np.zeros(n), 0.0
    for step in range(steps):
        drawn = np.flatnonzero(masks[step])
        kept = example_ids(key, step, n, 0.2, cap)
        assert len(kept) == min(len(drawn), cap) and np.isin(kept, drawn).all(), "a capped batch is not what it was cut"
        counts[kept] += 1
        variance += len(kept) / n * (1 - len(kept) / n)
    statistic = ((counts - counts.mean()) ** 2).sum() / (variance * n / (n - 1))
    assert p_value(statistic, stats.chi2(n - 1)) > RARE, "the cap prefers some records"


def delivery(seed: int) -> None:
    """Every sampled record reaches its batch once, under its own id, in micro-batches of one size."""
    images, size, key = private_images(normal_records(seed, 11)), 4, key_of(seed)
    run = TinyRun(images, steps=5, sampling_prob=5 / 11, micro_batch_size=size, noise_multiplicity=2)
    trace = trace_of(run, key)
    assert all(len(chunk) == size for chunk in trace.read), "micro-batches have several sizes"
    assert all(np.array_equal(ids, chunk.clip(0)) for ids, chunk in zip(trace.made, trace.read, strict=True)), (
        "examples draw under other ids than their positions"
    )
    for step in range(run.steps):
        expected = example_ids(key, step, len(images), 5 / 11)
        read = [chunk for chunk, at in zip(trace.read, trace.steps, strict=True) if at == step]
        ids = np.concatenate(read) if read else np.zeros(0, np.int64)
        assert sorted(ids[ids >= 0]) == expected.tolist(), f"step {step}: other records than those sampled"


def invariance(seed: int) -> None:
    """The sum is the same whatever the order of the ids and the size of the micro-batches."""
    n, key, net = 7, key_of(seed), tiny_net()
    images = private_images(normal_records(seed, n))
    orders = [np.arange(n), np.random.default_rng(seed).permutation(n), np.arange(n)[::-1]]
    sums = []
    for order, size in itertools.product(orders, (n, 1, 3)):
        run = TinyRun(images, noise_multiplicity=2, micro_batch_size=size)
        with patch.object(training, "example_ids", lambda *arguments, order=order: order):
            sums.append(vector(trace_of(run, key, net).sums[0]))
        error = ((sums[-1] - sums[0]).norm() / sums[0].norm()).item()
        assert error < 1e-6, f"ids {order.tolist()} in micro-batches of {size}: the sum differs by {error:.2g}"


def empty_batches(seed: int) -> None:
    """A step that drew nobody is a step: noise, update, ledger line and metrics."""
    images, steps = private_images(normal_records(seed, 3)), 4
    trace = trace_of(TinyRun(images, steps=steps, sampling_prob=1e-9, expected_batch_size=2.0), key_of(seed))
    counts = len(trace.updates), trace.ledger, len(trace.metrics)
    assert counts == (steps, steps, steps), f"{steps} empty steps made {counts} updates, ledger lines and metrics"
    assert trace.ledger_at_noise == [1, 2, 3, 4], "the ledger line of a step is not on disk before its noise is drawn"
    assert not trace.read, "an empty step read images"
    assert all(vector(update).ne(0).all() for update in trace.updates), "an empty step has no noise"


def update(seed: int) -> None:
    """The trained weights are what SGD or Adam, and an average, make of the noisy sums and nothing else."""
    for optimizer in ("sgd", "adam"):
        decay, batch, net = 0.3, 4.5, tiny_net()
        options = dict(optimizer=optimizer, ema_decay=decay, micro_batch_size=3, expected_batch_size=batch)
        run = TinyRun(private_images(normal_records(seed)), steps=4, **options)
        weights = {name: parameter.detach().double() for name, parameter in trainable(net).items()}
        average, first, second = dict(weights), dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
        trace = trace_of(run, key_of(seed), net, learn=True)
        for step, noisy in enumerate(trace.noisy, start=1):
            kept = min(decay, (1 + step) / (10 + step))
            for name, total in noisy.items():
                direction = mean = total.double() / batch
                if optimizer == "adam":
                    first[name] = 0.9 * first[name] + 0.1 * mean
                    second[name] = 0.999 * second[name] + 0.001 * mean**2
                    scale = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                    direction = first[name] / (1 - 0.9**step) / scale
                weights[name] = weights[name] - LEARNING_RATE * direction
                average[name] = kept * average[name] + (1 - kept) * weights[name]
        for noisy, line in zip(trace.noisy, trace.metrics, strict=True):
            assert abs(line["update_norm"] - vector(noisy).norm() / batch) < 1e-6, "the metrics are not of noisy sums"
        for name, expected in average.items():
            error = (trace.weights[name] - expected).abs().max().item()
            assert error < 1e-5, f"{optimizer}: {name} is {error:.2g} off what the noisy sums make of it"


def stray_gradients(seed: int) -> None:
    """A gradient that lies on a parameter, of whoever's backward, reaches no update and does not survive a pass."""
    torch.manual_seed(seed)
    parameters, clean = ({"a": nn.Parameter(torch.ones(3))} for _ in range(2))
    parameters["a"].grad = torch.full((3,), 100.0)
    for one in (parameters, clean):
        optimizer = training.make_optimizer(Train(optimizer="sgd", learning_rate=0.5), one, 0.0)
        training.apply_update(optimizer, one, {"a": torch.ones(3)}, 8)
    assert torch.equal(parameters["a"], clean["a"]), "an update holds a gradient that nobody clipped"
    net = Layers(nn.Linear(4, 4), nn.Linear(4, 2))
    PerSampleClipper(net, C).clipped_sum_of(repeated_loss(1), (torch.randn(3, 4),))
    assert all(p.grad is None for p in net.parameters()), "autograd's own gradient is left on a parameter"
    ema = Ema(parameters, 0.0)
    ema.update()
    assert torch.equal(ema.average["a"], parameters["a"]), "the average is not of the weights"


class Checkpointed(nn.Module):
    """Its inside is computed a second time in the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def gradients(seed: int) -> None:
    """Sums equal those of plain autograd, one example at a time: clipped, and under a bound that nothing reaches."""
    torch.manual_seed(seed)
    x, rows = torch.randn(5, 4), torch.randint(0, 7, (5,))
    inner = Layers(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))
    grown = Layers(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))
    cases = {
        "a module called twice": (Twice(), x),
        "a checkpoint": (Checkpointed(inner), x),
        "convolution and norm": (grown, x),
        "a table of rows": (Layers(nn.Embedding(7, 3)), rows),
    }
    for (name, (model, batch)), draws, bound in itertools.product(cases.items(), (1, 3), (C, 1e6)):
        loss_fn = repeated_loss(draws)
        found = PerSampleClipper(model, bound).clipped_sum_of(loss_fn, (batch,))
        error = relative_error(found, loop_clipped_sum(model, loss_fn, (batch,), Clip(bound)))
        assert error < 1e-5, f"{name}, K = {draws}: the sum is {error:.2g} off the loop's"


def refusals(seed: int) -> None:
    """What mixes examples, or what no rule can follow, is refused before it trains."""
    torch.manual_seed(seed)
    tied = Layers(nn.Linear(4, 4), nn.Linear(4, 4))
    tied.layers[1].weight = tied.layers[0].weight
    training_mode = Layers(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    mixing = Layers(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 4))
    half = Layers(nn.Linear(4, 4).bfloat16())
    for name, model in {"tied": tied, "training": training_mode, "batch norm": mixing, "half": half}.items():
        try:
            PerSampleClipper(model, C)
        except UserError:
            continue
        raise AssertionError(f"a model is accepted that cannot keep the bound: {name}")
    half_forward = torch.autocast("cpu", torch.float16)
    try:
        with half_forward:
            PerSampleClipper(Layers(nn.Linear(4, 4)), C).clipped_sum_of(repeated_loss(1), (torch.randn(2, 4),))
    except UserError:
        return
    raise AssertionError("a forward in float16 is accepted, which a gradient scaler would have to skip steps for")


CANARIES, TRIALS, CONFIDENCE = 1024, 51_200, 1e-4


def audit(seed: int) -> None:
    """A Dirac audit of one step at sigma 1, where C is sure and mu is 1, through the real step.

    Canary i is a loss of its own, ahead of the clipper: 1000 times entry i of a table, so its gradient is one clipped
    spike. As many entries have no canary. Whoever accuses an entry above C / 2 has true and false positives, whose
    normal quantiles are mu apart (Nasr et al. 2023, arXiv 2302.07956; Clopper and Pearson's bounds). By chance the
    lower bound leaves [0.915, 1.0] mu, or the estimate [0.959, 1.041] mu, once in a million; noise that is 5 % low
    moves the estimate to 1.053.
    """
    steps = TRIALS // CANARIES
    net = tiny_net()
    net.requires_grad_(False)
    net.canaries = nn.Embedding(2 * CANARIES, 1).eval()
    run = TinyRun(private_images(np.zeros((CANARIES, SIDE, SIDE))), steps=steps, micro_batch_size=256)

    def batch_of(task, examples, ids, key, step):
        return {"entry": torch.from_numpy(ids), "weights": examples.weights}

    def loss_of(model, batch):
        return 1e3 * model.canaries(batch["entry"]).squeeze(1) * batch["weights"]

    with patch.object(training, "make_batch", batch_of), patch.object(training, "make_loss", lambda *a: loss_of):
        trace = trace_of(run, key_of(seed), net)
    found = torch.stack([update["canaries.weight"].squeeze(1) for update in trace.updates]).double() / C
    hits = [int((found[:, half] > 0.5).sum()) for half in (slice(0, CANARIES), slice(CANARIES, None))]
    estimate = stats.norm.ppf(hits[0] / TRIALS) - stats.norm.ppf(hits[1] / TRIALS)
    least = stats.beta.ppf(CONFIDENCE, hits[0], TRIALS - hits[0] + 1)
    most = stats.beta.isf(CONFIDENCE, hits[1] + 1, TRIALS - hits[1])
    bound = stats.norm.ppf(least) - stats.norm.ppf(most)
    assert 0.915 <= bound <= 1.0, f"the audit bounds mu by {bound:.4f} from below, where it is 1"
    assert 0.959 <= estimate <= 1.041, f"the audit finds mu {estimate:.4f}, where it is 1"
