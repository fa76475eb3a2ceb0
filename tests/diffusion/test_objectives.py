"""The losses against the papers' formulas in float64, and against diffusers' own schedulers."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dp_peft_diffusion.diffusion.objectives import make_objective
from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.gradients.functional import loop_gradients, vmap_gradients

B, VIEWS, DRAWS, SHAPE = 3, 2, 4, (2, 4, 4)
ROWS = VIEWS * DRAWS
EDM_SCHEDULERS = [
    EDMEulerScheduler(),
    EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction"),
    EDMDPMSolverMultistepScheduler(sigma_data=0.3),
]


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(B, VIEWS, *SHAPE, generator=generator)
    noise = torch.randn(B, ROWS, *SHAPE, generator=generator)
    return clean, noise, torch.randint(1000, (B, ROWS), generator=generator)


def sigmas(seed=0):
    return torch.exp(-1.2 + 1.2 * torch.randn(B, ROWS, generator=torch.Generator().manual_seed(seed)))


def each_row(clean, noise, levels):
    """(example, row, clean image of the row's view, noise, level), one by one."""
    for i in range(B):
        for row in range(ROWS):
            yield i, row, clean[i, row // DRAWS], noise[i, row], levels[i, row]


def network(noisy, times):
    """Some function of input and time, of one row or of many."""
    return torch.tanh(noisy) * (1 + times.float().view(-1, 1, 1, 1) / 100)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_discrete_losses_equal_a_loop_over_rows_with_diffusers_add_noise_and_velocity(
    scheduler_class, prediction_type, beta_schedule
):
    scheduler = scheduler_class(prediction_type=prediction_type, beta_schedule=beta_schedule, beta_end=0.012)
    stock = DDPMScheduler.from_config(scheduler.config)
    clean, noise, timesteps = examples()
    expected = torch.zeros(B, dtype=torch.float64)
    for i, _, x, n, t in each_row(clean, noise, timesteps):
        noisy = stock.add_noise(x[None].double(), n[None].double(), t[None])
        target = n if prediction_type == "epsilon" else stock.get_velocity(x[None].double(), n[None].double(), t[None])
        expected[i] += (network(noisy, t) - target).square().mean() / ROWS
    losses = make_objective(scheduler).losses(network, clean, noise, timesteps)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", EDM_SCHEDULERS)
def test_edm_losses_equal_the_weighted_error_of_diffusers_denoiser(scheduler):
    clean, noise, _ = examples()
    expected = torch.zeros(B, dtype=torch.float64)
    sigma_data = scheduler.config.sigma_data
    for i, _, x, n, sigma in each_row(clean, noise, sigmas()):
        x, n, sigma = x[None].double(), n[None].double(), sigma.double()
        noisy = x + sigma * n
        output = network(scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma))
        denoised = scheduler.precondition_outputs(noisy, output, sigma)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # Karras et al. 2022, table 1
        expected[i] += (weight * (denoised - x).square()).mean() / ROWS
    losses = make_objective(scheduler).losses(network, clean, noise, sigmas())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma", [1e-3, 80.0])
def test_edm_losses_stay_exact_where_almost_nothing_or_almost_all_is_noise(sigma):
    clean, noise, _ = examples()
    levels = torch.full((B, ROWS), sigma)
    objective = make_objective(EDMEulerScheduler())
    single = objective.losses(network, clean, noise, levels)
    double = objective.losses(network, clean.double(), noise.double(), levels.double())
    assert torch.isfinite(single).all()
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@given(timestep=st.integers(0, 999), gamma=st.floats(0.1, 50))
@settings(max_examples=50, deadline=None)
def test_min_snr_weights_follow_hang_et_al(prediction_type, timestep, gamma):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise, _ = examples()
    levels = torch.full((B, ROWS), timestep)
    abar = scheduler.alphas_cumprod[timestep].item()
    snr = abar / (1 - abar)
    weight = min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    weighted = make_objective(scheduler, gamma).losses(network, clean, noise, levels)
    torch.testing.assert_close(weighted, weight * make_objective(scheduler).losses(network, clean, noise, levels))


def test_a_timestep_of_noise_alone_counts_and_never_divides_by_zero():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    clean, noise, _ = examples()
    last = torch.full((B, ROWS), 999)
    rows = clean.repeat_interleave(DRAWS, dim=1)
    losses = make_objective(scheduler).losses(lambda noisy, t: 0 * noisy, clean, noise, last)
    torch.testing.assert_close(losses, rows.square().mean(dim=(1, 2, 3, 4)))  # v is -x where abar is 0
    assert torch.equal(make_objective(scheduler, 5.0).losses(network, clean, noise, last), torch.zeros(B))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDPMScheduler(prediction_type="v_prediction"), *EDM_SCHEDULERS])
def test_the_loss_of_an_example_is_the_same_alone_and_in_a_batch(scheduler):
    clean, noise, timesteps = examples()
    objective = make_objective(scheduler)
    levels = sigmas() if objective.num_timesteps is None else timesteps
    together = objective.losses(network, clean, noise, levels)
    alone = [objective.losses(network, clean[[i]], noise[[i]], levels[[i]]) for i in range(B)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDPMScheduler(prediction_type="v_prediction"), *EDM_SCHEDULERS])
def test_vmap_follows_every_objective(scheduler):
    torch.manual_seed(0)
    model, objective = nn.Conv2d(2, 2, 3, padding=1), make_objective(scheduler, None)
    clean, noise, timesteps = examples()
    levels = sigmas() if objective.num_timesteps is None else timesteps

    def loss_fn(net, batch):
        return objective.losses(lambda noisy, t: net(noisy), batch["clean"], batch["noise"], batch["levels"])

    batch = {"clean": clean, "noise": noise, "levels": levels}
    torch.testing.assert_close(vmap_gradients(model, loss_fn, batch), loop_gradients(model, loss_fn, batch))


def test_log_sigmas_are_those_of_diffusers_euler_scheduler():
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    objective = make_objective(scheduler)
    expected = scheduler.sigmas[:-1].flip(0).log().numpy()  # it lists the noisiest first, then a zero
    assert np.allclose(objective.log_sigmas, expected, atol=1e-4)
    assert objective.num_timesteps == 1000 and make_objective(EDMEulerScheduler()).num_timesteps is None


@pytest.mark.parametrize(
    "scheduler, snr_gamma, word",
    [
        (DDPMScheduler(prediction_type="sample"), None, "sample"),
        (DDPMScheduler(variance_type="learned_range"), None, "learned_range"),
        (DDPMScheduler(rescale_betas_zero_snr=True), None, "v_prediction"),
        (DDIMScheduler(rescale_betas_zero_snr=True), None, "v_prediction"),
        (FlowMatchEulerDiscreteScheduler(), None, "FlowMatch"),
        (EDMEulerScheduler(), 5.0, "--snr_gamma"),
    ],
)
def test_a_schedule_without_such_an_objective_is_refused(scheduler, snr_gamma, word):
    with pytest.raises(UserError, match=word):
        make_objective(scheduler, snr_gamma)
