"""`code_moments`: what one example adds to the sum, what noisy sums say of the codes, and the rows that are drawn."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PeftModel
from scipy import stats
from tiny_adapters import NAMES, ONE_SUM
from tiny_bases import pixel_codes, public_images
from torch import nn

from dp_peft_diffusion.batches import PUBLIC_KEY, make_batch, make_loss, make_task
from dp_peft_diffusion.diffusion.adapters import inject_adapter
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.code_moments import (
    ACCEPTED,
    BELOW_BOUND,
    SMALLEST_CLASS,
    WEIGHTS,
    CodeMoments,
    draw,
    gaussians_of,
    log_densities,
    statistics,
)
from dp_peft_diffusion.diffusion.datasets import Examples
from dp_peft_diffusion.diffusion.merging import merge_adapter
from dp_peft_diffusion.gradients.clipper import PerSampleClipper
from dp_peft_diffusion.gradients.functional import flat_norms, loop_gradients
from dp_peft_diffusion.privacy.adapter_files import check_adapter
from dp_peft_diffusion.recipe import Adapter, Data, Recipe
from dp_peft_diffusion.sharing.export import write_adapter

D, C, R, FIRST, BOUND = 4, 3, 5, 2, 0.7  # numbers of a code, classes, rows of each, the first of them, clip bound
RARE = 1e-6


@st.composite
def unit_codes(draw):
    """(b, d) unit vectors, float32, of any direction: axes, negatives and crowds as well."""
    b, d = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    raw = draw(arrays(np.float64, (b, d), elements=st.floats(-1, 1).map(lambda x: round(x, 6))))
    raw[np.linalg.norm(raw, axis=1) == 0, 0] = 1.0
    return torch.from_numpy(raw / np.linalg.norm(raw, axis=1, keepdims=True)).float()


def random_codes(n, d=D, seed=0):
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def moments(noise_of_mean=0.0, rows_per_class=R, dim=6):
    torch.manual_seed(0)
    table = nn.Embedding(FIRST + C * rows_per_class + 2, dim)
    return CodeMoments(table, torch.randn(D, dim), C, FIRST, rows_per_class, BOUND, noise_of_mean)


class Net(nn.Module):
    """Nothing but a class table, as the network of a base names it."""

    def __init__(self, table):
        super().__init__()
        self.class_embedding = table
        self.eval()


def batch_of(codes, labels, weights=None):
    """As `make_batch` gives it: codes (b, views, d)."""
    weights = torch.ones(len(codes)) if weights is None else torch.as_tensor(weights)
    return {"codes": codes, "labels": torch.as_tensor(labels), "weights": weights}


LOSS = make_loss(SimpleNamespace(conditions=SimpleNamespace(rows={})))


def mean_of(codes, labels, weights, num_classes=C):
    """What `sums` holds after a step without noise: the mean of statistics over the batch, by class, float64."""
    one = nn.functional.one_hot(torch.as_tensor(labels), num_classes).double()
    return one.T @ statistics(codes.double(), weights) / len(codes)


# ---- what one example adds


@given(unit_codes())
def test_the_norm_of_statistics_is_that_of_their_weights_for_every_code(codes):
    found = statistics(codes, WEIGHTS).double().norm(dim=1)
    assert (found - math.hypot(*WEIGHTS)).abs().max() < 1e-6


@given(unit_codes())
def test_statistics_are_one_the_code_and_its_products_with_itself(codes):
    d, found = codes.shape[1], statistics(codes, (1.0, 1.0, 1.0)).double()
    assert found.shape[1] == 1 + d + d * (d + 1) // 2
    for row, u in zip(found.numpy(), codes.double().numpy(), strict=True):
        products = [u[i] * u[j] * (1 if i == j else 2**0.5) for i in range(d) for j in range(i, d)]
        assert np.allclose(row, [1, *u, *products], atol=1e-6)


@given(unit_codes(), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_gradients_are_minus_the_statistics_of_the_example_in_the_row_of_its_class(codes, bound, seed):
    d, labels = codes.shape[1], torch.from_numpy(np.random.default_rng(seed).integers(0, C, len(codes)))
    table = CodeMoments(nn.Embedding(9, 2), torch.zeros(d, 2), C, 0, 3, bound, 0.0)
    table.sums.weight.data.normal_(generator=torch.Generator().manual_seed(seed))  # linear: wherever it stands
    (name, found), *others = loop_gradients(Net(table), LOSS, batch_of(codes[:, None], labels)).items()
    assert name == "class_embedding.sums.weight" and not others
    wanted = torch.zeros(len(codes), C, found.shape[2])
    wanted[torch.arange(len(codes)), labels] = -statistics(codes, table.weights)
    assert torch.allclose(found, wanted, atol=1e-6 * bound)
    norms = flat_norms({name: found})
    assert (norms <= bound * (1 - 1e-6)).all(), "flat clipping would bite"
    assert (norms >= bound * (BELOW_BOUND - 1e-6)).all(), "the bound is not made use of"


def test_the_clipped_sum_is_the_exact_sum_and_clipping_bites_nobody():
    table, codes = moments(), random_codes(40)
    labels = torch.arange(40) % C
    found = PerSampleClipper(Net(table), BOUND).clipped_sum_of(LOSS, batch_of(codes[:, None], labels))
    wanted = -40 * mean_of(codes, labels, table.weights)
    assert torch.allclose(found["class_embedding.sums.weight"], wanted, atol=1e-5)
    tighter = PerSampleClipper(Net(table), BOUND / 2).clipped_sum_of(LOSS, batch_of(codes[:, None], labels))
    assert torch.allclose(tighter["class_embedding.sums.weight"], wanted / 2, atol=1e-4), "a clip that bites is seen"


def test_a_null_record_adds_nothing_whatever_its_code():
    net, codes = Net(moments()), random_codes(4)
    clipper = PerSampleClipper(net, BOUND)
    whole = clipper.clipped_sum_of(LOSS, batch_of(codes[:, None], [0, 1, 2, 0], [1.0, 1.0, 1.0, 0.0]))
    without = clipper.clipped_sum_of(LOSS, batch_of(codes[:3, None], [0, 1, 2]))
    assert all(torch.equal(whole[name], without[name]) for name in whole)
    alone = clipper.clipped_sum_of(LOSS, batch_of(codes[3:, None], [0], [0.0]))
    assert not any(total.any() for total in alone.values())


def test_views_are_averaged_inside_their_example_which_counts_once():
    net, codes = Net(moments()), random_codes(6).view(2, 3, D)
    (found,) = PerSampleClipper(net, BOUND).clipped_sum_of(LOSS, batch_of(codes, [0, 1])).values()
    for label, views in enumerate(codes):
        assert torch.allclose(
            found[label], -statistics(views, net.class_embedding.weights).mean(dim=0).double(), atol=1e-6
        )
    assert found[0].norm() <= BOUND * BELOW_BOUND and not found[2].any()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return pixel_codes(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder))


SPEC = Adapter(kind="code_moments", class_rows=(1, 2), rows_per_class=4)


def test_a_batch_holds_the_codes_of_the_images_themselves_one_for_each_view(base):
    images = public_images(5, seed=7)
    train = dataclasses.replace(ONE_SUM["train"], augmentation_multiplicity=3)
    data = Data(class_names=NAMES, augmentations=("flip", "shift"))
    recipe = Recipe(data=data, adapter=SPEC, privacy=ONE_SUM["privacy"], train=train)
    task = make_task(recipe, base)
    examples = Examples(images[:, None], torch.tensor([0, 1, 1, 0, 0]), torch.tensor([1.0, 1, 1, 1, 0]), {})
    batch = make_batch(task, examples, np.arange(5), PUBLIC_KEY, 0)
    assert batch.keys() == {"codes", "labels", "weights"} and batch["codes"].shape == (5, 3, 4)
    assert (batch["codes"].norm(dim=2) - 1).abs().max() < 1e-6
    assert (batch["codes"].std(dim=1) > 0).any(), "views are changed by themselves"
    adapter = inject_adapter(base, SPEC, 2)
    (found,) = PerSampleClipper(adapter.unet).clipped_sum_of(make_loss(task), batch).values()
    (loop,) = loop_gradients(adapter.unet, make_loss(task), batch).values()
    assert torch.allclose(found, loop.double().sum(dim=0), atol=1e-5) and found.any() and not loop[4].any()
    plain = dataclasses.replace(recipe, data=Data(class_names=NAMES), train=ONE_SUM["train"])
    with torch.no_grad():
        wanted = base.codes(images)
    bare = make_batch(make_task(plain, base), examples, np.arange(5), PUBLIC_KEY, 0)
    assert torch.allclose(bare["codes"][:, 0], wanted, atol=1e-6)


# ---- what sums say


def test_without_noise_the_gaussians_are_those_of_numpy():
    codes, labels = random_codes(300, seed=1) + torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.arange(300) % C
    codes = nn.functional.normalize(codes * (1 + labels[:, None]) + labels[:, None] * torch.eye(4)[1], dim=1).double()
    mean, covariance = gaussians_of(mean_of(codes, labels, WEIGHTS), WEIGHTS, 0.0)
    for c in range(C):
        own = codes[labels == c].numpy()
        assert np.allclose(mean[c], own.mean(axis=0), atol=1e-9)
        assert np.allclose(covariance[c], np.cov(own.T, bias=True), atol=1e-9)


@given(
    arrays(np.float64, (C, 1 + D + D * (D + 1) // 2), elements=st.floats(-100, 100)),  # of 0.7 at most without noise
    st.sampled_from([0.0, 1e-6, 0.01, 1.0, 100.0]),
)
def test_covariances_are_positive_definite_whatever_the_noisy_sums(sums, noise):
    mean, covariance = gaussians_of(torch.from_numpy(sums), WEIGHTS, noise)
    assert mean.isfinite().all() and covariance.isfinite().all()
    assert torch.allclose(covariance, covariance.mT, rtol=1e-9)
    assert (torch.linalg.eigvalsh(covariance) > 0).all()
    drawn = draw(mean, covariance, 3)
    assert drawn.isfinite().all() and (drawn.norm(dim=2) - 1).abs().max() < 1e-6


def test_a_count_that_noise_made_negative_counts_as_a_small_class():
    sums = mean_of(random_codes(60), torch.arange(60) % C, WEIGHTS)
    sums[1, 0] = -5.0
    mean, _ = gaussians_of(sums, WEIGHTS, 0.0)
    assert torch.allclose(mean[1], sums[1, 1 : 1 + D] / WEIGHTS[1] / (SMALLEST_CLASS / C))


def truth(seed, d=D):
    """Means and covariances (C, d, d) of classes that differ, and their moments as noiseless sums of even classes."""
    rng = np.random.default_rng(seed)
    mean = 0.3 * rng.normal(size=(C, d))
    root = 0.25 * (np.eye(d) + 0.15 * rng.normal(size=(C, d, d)))
    covariance = root @ root.transpose(0, 2, 1)
    second = covariance + mean[:, :, None] * mean[:, None, :]
    i, j = np.triu_indices(d)
    upper = second[:, i, j] * np.where(i == j, 1, 2**0.5)
    sums = np.concatenate([np.full((C, 1), WEIGHTS[0]), WEIGHTS[1] * mean, WEIGHTS[2] * upper], axis=1) / C
    return mean, covariance, sums


def test_shrunk_covariances_are_nearer_to_the_truth_than_raw_ones():
    nearer, rng, trials, noise = 0, np.random.default_rng(0), 60, 0.02
    for trial in range(trials):
        _, covariance, sums = truth(trial)
        noisy = torch.from_numpy(sums + noise * rng.normal(size=sums.shape))
        shrunk, raw = (gaussians_of(noisy, WEIGHTS, known)[1].numpy() for known in (noise, 0.0))
        nearer += np.square(shrunk - covariance).sum() < np.square(raw - covariance).sum()
    assert stats.binomtest(nearer, trials, 0.5, alternative="greater").pvalue < RARE, f"{nearer} of {trials}"


def test_classes_that_differ_by_less_than_the_noise_share_one_covariance():
    _, _, sums = truth(3)
    apart = gaussians_of(torch.from_numpy(sums), WEIGHTS, 0.0)[1]
    together = gaussians_of(torch.from_numpy(sums), WEIGHTS, 0.2)[1]
    assert (apart[0] - apart[1]).abs().max() > 0.01
    assert torch.allclose(together, together[:1].expand_as(together), atol=1e-12)
    clear = gaussians_of(torch.from_numpy(sums), WEIGHTS, 1e-9)[1]
    assert torch.allclose(clear, apart, atol=1e-6), "what noise cannot explain is kept"


def test_what_is_kept_of_a_class_is_james_and_steins_share_of_what_noise_does_not_explain():
    _, _, sums = truth(3)
    known = 0.002
    raw = gaussians_of(torch.from_numpy(sums), WEIGHTS, 0.0)[1].numpy()
    found = gaussians_of(torch.from_numpy(sums), WEIGHTS, known)[1].numpy()
    pooled, noise = raw.mean(axis=0), known * C / WEIGHTS[2]  # of a number on the diagonal; off it, over sqrt(2)
    for c in range(C):
        energy = noise**2 * (D + D * (D - 1) / 2)  # expected square of the whole matrix of noise
        kept = 1 - energy / np.square(raw[c] - pooled).sum()
        assert 0.1 < kept < 0.99
        assert np.allclose(found[c], pooled + kept * (raw[c] - pooled), atol=1e-9)


def test_no_eigenvalue_below_its_noise_is_believed():
    _, _, sums = truth(3)
    known = 0.02
    noise = known * C / WEIGHTS[2] / C**0.5  # of the pooled covariance, which is the least that is left
    values = torch.linalg.eigvalsh(gaussians_of(torch.from_numpy(sums), WEIGHTS, known)[1])
    assert (values >= noise * D**0.5 / 2).all()
    assert torch.linalg.eigvalsh(gaussians_of(torch.from_numpy(sums), WEIGHTS, 0.0)[1]).min() < noise * D**0.5 / 2


# ---- what is drawn


def far_apart(d=D):
    """Classes around different axes, (C, d) and (C, d, d); stretched in directions of their own."""
    generator = torch.Generator().manual_seed(5)
    root = 0.05 * torch.randn(C, d, d, generator=generator, dtype=torch.float64)
    return torch.eye(d, dtype=torch.float64)[:C], root @ root.mT + 1e-4 * torch.eye(d)


def test_draws_are_unit_vectors_and_those_of_classes_far_apart_are_claimed_by_their_own():
    mean, covariance = far_apart()
    drawn = draw(mean, covariance, 200)
    assert drawn.shape == (C, 200, D) and (drawn.norm(dim=2) - 1).abs().max() < 1e-9
    claimed = log_densities(drawn.flatten(0, 1), mean, covariance).argmax(dim=1).view(C, 200)
    assert (claimed == torch.arange(C)[:, None]).double().mean() > 0.99


def test_draws_that_another_class_may_claim_come_last():
    mean, covariance = torch.zeros(2, D, dtype=torch.float64), 0.1 * torch.eye(D, dtype=torch.float64).repeat(2, 1, 1)
    mean[:, 0] = torch.tensor([0.15, -0.15])  # near each other
    few, pool = draw(mean, covariance, 50), draw(mean, covariance, 100)
    own = [log_densities(drawn[0], mean, covariance).softmax(dim=1)[:, 0] for drawn in (few, pool)]
    accepted = int((own[0] > ACCEPTED).sum())
    assert 0 < accepted < 50 and (own[0][:accepted] > ACCEPTED).all()
    assert (own[0][accepted:].diff() <= 0).all(), "the best of those that are left are taken first"


def test_means_and_spreads_of_unit_vectors_are_those_of_unit_vectors_whatever_the_noise():
    noise = torch.randn(C, sums_of(3).shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, covariance = gaussians_of(sums_of(3) + 10 * noise, WEIGHTS, 10.0)
    assert mean.norm(dim=1).max() <= 1 + 1e-12 and torch.linalg.eigvalsh(covariance).max() <= 1 + 1e-12


def sums_of(seed):
    return torch.from_numpy(truth(seed)[2])


def test_draws_have_the_mean_and_covariance_of_their_gaussian():
    """Of codes near the sphere, which are scaled to length 1: compared with as many of numpy's, scaled the same way."""
    mean, covariance = far_apart()
    n, rng = 4000, np.random.default_rng(1)
    drawn = draw(mean, covariance, n).numpy()
    for c in range(C):
        wanted = rng.multivariate_normal(mean[c], covariance[c], n)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        for axes in ([(i,) for i in range(D)], [(i, j) for i in range(D) for j in range(i, D)]):
            for axis in axes:
                middle = mean[c].numpy()
                values = [np.prod((sample - middle)[:, axis], axis=1) for sample in (drawn[c], wanted)]
                assert stats.ttest_ind(*values, equal_var=False).pvalue > RARE, (c, axis)


def test_draws_of_classes_are_independent_of_each_other():
    mean, n = torch.eye(D, dtype=torch.float64)[:C], 4000
    drawn = draw(mean, 1e-4 * torch.eye(D, dtype=torch.float64).expand(C, D, D), n) - mean[:, None, :]
    for c in range(C):
        r = stats.pearsonr(drawn[c, :, 3], drawn[(c + 1) % C, :, 3])  # across all of the classes' axes
        assert r.pvalue > RARE, (c, r.statistic)


def test_of_classes_that_overlap_draws_are_taken_where_no_other_claims_them():
    mean = torch.tensor([[1.0, 0.2], [1.0, -0.2]], dtype=torch.float64)
    covariance = 0.04 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    drawn = draw(mean, covariance, 300)
    own = log_densities(drawn.flatten(0, 1), mean, covariance).softmax(dim=1).view(2, 300, 2)
    taken = torch.stack([own[c, :, c] for c in range(2)])
    chance = stats.norm.sf(-0.2 / 0.2)  # of a plain draw to lie on its own side
    assert (taken > 0.5).double().mean() > chance + 0.08


def test_log_densities_are_those_of_scipy_up_to_one_constant():
    mean, covariance = far_apart()
    codes = random_codes(10, seed=2).double()
    found = log_densities(codes, mean, covariance).numpy()
    wanted = [stats.multivariate_normal.logpdf(codes, m, v) for m, v in zip(mean, covariance, strict=True)]
    difference = found - np.stack(wanted, axis=1)
    assert np.allclose(difference, difference[0, 0], atol=1e-6)


# ---- rows


def filled(table, seed=0):
    """The table, with sums of codes around a different axis for each class."""
    codes, labels = random_codes(300, seed=seed), torch.arange(300) % C
    codes = nn.functional.normalize(0.2 * codes + torch.eye(D)[labels], dim=1)
    with torch.no_grad():
        table.sums.weight.copy_(mean_of(codes, labels, table.weights))
    return table


@torch.no_grad()
def rows_of(table, rows=None):
    return table(torch.arange(table.table.num_embeddings) if rows is None else rows)


def test_row_j_of_class_c_is_a_draw_of_class_c_and_all_other_rows_are_the_tables():
    table = filled(moments())
    found, codes = rows_of(table), table.codes()
    moved = (found != table.table.weight).any(dim=1).nonzero().flatten().tolist()
    assert moved == list(range(FIRST, FIRST + C * R)) == table.rows.tolist()
    gaussians = gaussians_of(table.sums.weight.detach().double(), table.weights, 0.0)
    drawn = draw(*gaussians, R)
    for j in range(R):
        for c in range(C):
            entry = j * C + c
            assert torch.allclose(codes[entry], drawn[c, j].float(), atol=1e-6)
            assert codes[entry].argmax() == c, "a draw of another class"
            wanted = table.table.weight[FIRST + entry] + codes[entry] @ table.directions
            assert torch.allclose(found[FIRST + entry], wanted, atol=1e-5)
    assert (found[FIRST + C] - found[FIRST]).abs().max() > 1e-3, "rows of a class differ"


def test_the_noise_that_sums_have_is_reckoned_with():
    clear, noisy = filled(moments()), filled(moments(noise_of_mean=0.1))
    assert not torch.equal(clear.codes(), noisy.codes())


def test_codes_are_drawn_anew_when_the_sums_change_and_not_before():
    table = filled(moments())
    before = table.codes()
    assert table.codes() is before
    with torch.no_grad():
        table.sums.weight[0, 1] += 1e-3
    assert not torch.equal(table.codes(), before)
    fresh = moments()
    fresh.load_state_dict(table.state_dict())
    assert torch.equal(fresh.codes(), table.codes())


def test_a_copy_draws_from_its_own_sums():
    table = filled(moments())
    before, copied = table.codes().clone(), copy.deepcopy(table)
    with torch.no_grad():
        copied.sums.weight.copy_(filled(moments(), seed=9).sums.weight)
    assert torch.equal(table.codes(), before)
    assert torch.equal(copied.codes(), filled(moments(), seed=9).codes()) and not torch.equal(copied.codes(), before)


def test_what_is_drawn_does_not_hang_on_the_state_of_the_global_generator():
    torch.manual_seed(1)
    before, state = filled(moments()).codes(), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(filled(moments()).codes(), before)
    torch.random.set_rng_state(state)


def test_stock_peft_and_a_merge_give_the_rows_that_were_drawn(base, base_folder, tmp_path):
    adapter = inject_adapter(base, SPEC, 2, max_grad_norm=BOUND, noise_of_mean=1e-3)
    assert set(adapter.trainable) == {"class_embedding.sums.weight"}
    assert adapter.adapted_modules == ["class_embedding"]
    adapter.class_rows.sums.weight.data += 0.1 * torch.randn_like(adapter.class_rows.sums.weight)
    write_adapter(base, adapter, tmp_path)
    every = torch.arange(base.num_class_embeds)
    with torch.no_grad():
        trained = adapter.unet.class_embedding(every)
        stock = PeftModel.from_pretrained(copy.deepcopy(base.unet), tmp_path).eval()
        assert torch.allclose(stock.base_model.model.class_embedding(every), trained, atol=1e-5)
        merged = merge_adapter(copy.deepcopy(base.unet), tmp_path)
        assert torch.allclose(merged.class_embedding(every), trained, atol=1e-5)
    moved = (merged.class_embedding.weight != base.unet.class_embedding.weight).any(dim=1).nonzero().flatten()
    assert moved.tolist() == list(range(1, 9))
    assert "all finite. Fits base" in check_adapter(tmp_path, base_folder)
