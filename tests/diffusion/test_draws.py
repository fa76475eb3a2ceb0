"""What an example draws hangs on key, step and id alone; K draws lower the variance of its gradient by K."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats
from tiny_models import tiny_unet

from dp_peft_diffusion.diffusion.draws import draw_dropped_labels, draw_levels, draw_noise, draw_variants
from dp_peft_diffusion.diffusion.noise_levels import level_quantile
from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.gradients.functional import vmap_gradients
from dp_peft_diffusion.recipe import Train

KEY = b"0123456789abcdef"
OBJECTIVE = make_objective(DDPMScheduler(prediction_type="v_prediction"))
UNIFORM = level_quantile(Train(), OBJECTIVE)


def all_draws(step, ids, key=KEY):
    return (
        draw_levels(key, step, ids, 4, 3, UNIFORM),
        draw_noise(key, step, ids, 4, (2, 3)),
        draw_dropped_labels(key, step, ids, 40, 0.5),
        draw_variants(key, step, ids, 5, 64),
    )


def test_an_example_draws_the_same_alone_and_in_any_batch():
    together = all_draws(7, np.array([5, 2, 9]))
    for place, example in enumerate([5, 2, 9]):
        alone = all_draws(7, np.array([example]))
        assert all(torch.equal(a[place], b[0]) for a, b in zip(together, alone, strict=True))


def test_draws_differ_between_keys_steps_and_examples():
    for one, of_step, of_key in zip(
        all_draws(0, np.arange(20)), all_draws(1, np.arange(20)), all_draws(0, np.arange(20), bytes(16)), strict=True
    ):
        assert len(torch.cat([one, of_step, of_key]).flatten(1).unique(dim=0)) == 60


@pytest.mark.parametrize("draws, views", [(1, 1), (4, 1), (1, 3), (4, 3)])
def test_levels_are_spread_over_the_draws_of_each_view_and_uniform_in_all(draws, views):
    rows = draw_levels(KEY, 0, np.arange(5000), draws, views, UNIFORM)
    assert rows.shape == (5000, views * draws)
    parts = rows.unflatten(1, (views, draws)) // (1000 // draws)
    assert torch.equal(parts, torch.arange(draws).expand(5000, views, draws))
    counts = np.bincount(rows.flatten() // 10, minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-6


def test_views_of_an_example_draw_apart():
    one, other = draw_levels(KEY, 0, np.arange(2000), 1, 2, UNIFORM).double().T
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 2000**0.5


def test_a_number_just_below_one_is_still_the_last_timestep():
    class AlmostOne:
        def random(self, shape):
            return np.full(shape, np.nextafter(1, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dp_peft_diffusion.diffusion.draws.generator", lambda *place: AlmostOne())
        assert draw_levels(KEY, 0, np.arange(1), 16, 1, UNIFORM)[0, -1] == 999


def test_noise_is_standard_normal_and_labels_drop_at_their_rate():
    noise = draw_noise(KEY, 3, np.arange(5000), 4, (2, 3))
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    dropped = draw_dropped_labels(KEY, 3, np.arange(5000), 4, 0.2).double().mean().item()
    assert dropped == pytest.approx(0.2, abs=5 * (0.16 / 20000) ** 0.5)


def test_each_variant_is_as_likely_and_none_comes_twice_too_early():
    variants = draw_variants(KEY, 0, np.arange(4000), 5, 8)
    assert stats.chisquare(np.bincount(variants[:, 2], minlength=8)).pvalue > 1e-6
    assert all(len(row.unique()) == 5 for row in variants[:200])
    assert (draw_variants(KEY, 0, np.arange(50), 6, 3).sort(dim=1).values == torch.tensor([0, 0, 1, 1, 2, 2])).all()


def gradients_of_a_white_image(draws, quantile, num_keys):
    """The gradient of one image's loss in the last layer, under draws of so many example ids, (num_keys, numbers)."""
    unet = tiny_unet(num_class_embeds=None)
    unet.conv_out.requires_grad_(True)

    def loss_fn(net, batch):
        def predict(noisy, times):
            return net(noisy, times).sample

        return OBJECTIVE.losses(predict, batch["clean"], batch["noise"], batch["levels"])

    gradients = []
    for ids in np.arange(num_keys).reshape(-1, 200):
        noise, levels = draw_noise(KEY, 0, ids, draws, (1, 8, 8)), draw_levels(KEY, 0, ids, draws, 1, quantile)
        batch = {"clean": torch.ones(200, 1, 1, 8, 8), "noise": noise, "levels": levels}
        gradients.append(torch.cat([g.flatten(1) for g in vmap_gradients(unet, loss_fn, batch).values()], dim=1))
    return torch.cat(gradients).double()


def total_variance(gradients):
    """Trace of the covariance of rows, and its standard error."""
    deviations = (gradients - gradients.mean(dim=0)).square().sum(dim=1)
    n = len(deviations)
    return deviations.sum().item() / (n - 1), deviations.std().item() / n**0.5


def variance_ratio(draws, quantile, num_keys):
    """Variance of the gradient with one draw over that with K, and the standard error of the ratio."""
    (one, one_error), (many, many_error) = (
        total_variance(gradients_of_a_white_image(k, quantile, num_keys)) for k in (1, draws)
    )
    return one / many, one / many * ((one_error / one) ** 2 + (many_error / many) ** 2) ** 0.5


@pytest.mark.parametrize(
    "draws, num_keys",
    [(4, 800), pytest.param(4, 10_000, marks=pytest.mark.slow), pytest.param(16, 4000, marks=pytest.mark.slow)],
)
def test_k_draws_at_one_timestep_divide_the_variance_of_a_gradient_by_k(draws, num_keys):
    ratio, error = variance_ratio(draws, lambda uniform: np.full(uniform.shape, 400), num_keys)
    assert abs(ratio - draws) < 5 * error  # p below 1e-6


@pytest.mark.parametrize("num_keys", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_k_draws_spread_over_all_timesteps_divide_it_by_more(num_keys):
    ratio, error = variance_ratio(4, UNIFORM, num_keys)
    assert ratio - 5 * error > 4
